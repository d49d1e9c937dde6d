"""What a run will take, before anything is rented: memory, time, money, data rate, storage, checkpoints.

    print(dry_run(config, "b16_imagenet", {}))       # what jobs/pretrain.py --dry-run prints
    result = plan(PlanConfig(training=RECIPES["h14_jft300m_14ep"](), gpus=64, gpu="h100"), "h14_jft300m_14ep")
    print(table(result))

    config      PlanConfig, published corpora         estimate    plan: all of it together
    memory      bytes per GPU, the micro-batch        preview     dry_run: the plan of one pre-training run
    costs       data, checkpoints, the paper's runs   table       a plan for people

Counted, not guessed: parameters and FLOPs (the model on torch's meta device), model states of each ZeRO stage, and the
tensors that the backward pass keeps (one forward pass on shapes alone). Assumed, and flags of jobs/plan.py where it
matters: utilisation, prices, failure rate, write speed, bytes and CPU time of an image (module constants, measured).
"""
