"""Pre-training: `recipes` say what to run, `run` launches it, `loop` is what a worker does.

`engine` is the only file that knows DeepSpeed; `checkpoint` writes and finds checkpoints; `schedule` is the learning rate.
"""
