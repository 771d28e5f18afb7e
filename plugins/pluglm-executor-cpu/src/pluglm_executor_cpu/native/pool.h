// Threads that stay: one call a token wakes them, every operation of the token ends at their barrier.
//
// A waiting thread spins for a moment, because the next operation or token is microseconds away; then it gives its
// turn away (at a barrier) or sleeps (between calls), so that an idle model costs nothing.
#pragma once
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

class Pool {
public:
    using Job = void (*)(void *what, int thread, int count);

    explicit Pool(int count) : count_(count) {
        try {
            for (int i = 1; i < count; i++) threads_.emplace_back([this, i] { work(i); });
        } catch (...) {  // a thread that is destroyed while it runs ends the process
            end();
            throw;
        }
    }

    ~Pool() { end(); }

    int count() const { return count_; }

    // Runs job(what, i, count) on every thread, the caller being thread 0. The job's last act is `barrier()`.
    void run(Job job, void *what) {
        job_ = job;
        what_ = what;
        wake();
        job(what, 0, count_);
    }

    void barrier() {
        if (count_ == 1) return;
        const unsigned turn = turn_.load(std::memory_order_relaxed);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) == count_ - 1) {
            arrived_.store(0, std::memory_order_relaxed);
            turn_.store(turn + 1, std::memory_order_release);
            return;
        }
        for (int spins = 0; turn_.load(std::memory_order_acquire) == turn; spins++) {
            if (spins < 2000) pause();
            else std::this_thread::yield();
        }
    }

private:
    void end() {
        stop_ = true;
        wake();
        for (std::thread &thread : threads_) thread.join();
    }

    static void pause() {
#if defined(__x86_64__) || defined(__i386__)
        __builtin_ia32_pause();
#elif defined(__aarch64__)
        asm volatile("yield");
#endif
    }

    void wake() {
        calls_.fetch_add(1);
        if (sleeping_.load() == 0) return;
        std::lock_guard<std::mutex> guard(lock_);
        awake_.notify_all();
    }

    void work(int index) {
        for (unsigned seen = 0;;) {
            for (int spins = 0; calls_.load(std::memory_order_acquire) == seen && spins < 10000; spins++) pause();
            if (calls_.load() == seen) {
                std::unique_lock<std::mutex> guard(lock_);
                sleeping_.fetch_add(1);  // before the look at `calls_`: a caller sees either the sleeper or none to wake
                awake_.wait(guard, [&] { return calls_.load() != seen; });
                sleeping_.fetch_sub(1);
            }
            seen++;
            if (stop_) return;
            job_(what_, index, count_);
        }
    }

    const int count_;
    Job job_ = nullptr;
    void *what_ = nullptr;
    alignas(64) std::atomic<unsigned> calls_{0};
    alignas(64) std::atomic<unsigned> turn_{0};
    alignas(64) std::atomic<int> arrived_{0};
    alignas(64) std::atomic<int> sleeping_{0};
    std::atomic<bool> stop_{false};
    std::mutex lock_;
    std::condition_variable awake_;
    std::vector<std::thread> threads_;  // last: they use all of the above
};
