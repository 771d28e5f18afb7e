"""What `speed.py` compares: the contenders, each in a process of its own, and the models all of them read."""
