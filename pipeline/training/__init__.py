"""Pre-training: `recipes` defines the configs, `run` launches a run, `loop` is the training loop of a worker.

`engine` wraps DeepSpeed, `checkpoint` writes and finds checkpoints, `schedule` computes the learning rate.
"""
