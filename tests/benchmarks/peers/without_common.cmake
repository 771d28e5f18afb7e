# Read by CMake at the head of llama.cpp's own project: its helpers for command lines and chats, half of all the work of
# compiling, are left out. The binding turns them on without using them.
set(LLAMA_BUILD_COMMON OFF CACHE BOOL "" FORCE)
