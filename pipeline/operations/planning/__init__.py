"""Estimates the memory, time, cost, data rate, storage and checkpoints of a run before it starts.

    print(dry_run(config, "b16_imagenet", {}))       # what jobs/pretrain.py --dry-run prints
    result = plan(PlanConfig(training=RECIPES["h14_jft300m_14ep"](), gpus=64, gpu="h100"), "h14_jft300m_14ep")
    print(plan_table(result))

    config      PlanConfig, published corpora           estimate    plan: the whole estimate
    memory      bytes per GPU, the micro-batch          preview     dry_run: the plan of one pre-training run
    costs       data, checkpoints, runs of the paper    table       a plan as text

Computed exactly: parameters and FLOPs (from the model on torch's meta device), model states of each ZeRO stage, and
activation memory (from a forward pass with fake tensors). Assumed: utilisation, prices, failure rate and write speed
(flags of jobs/plan.py), and bytes and CPU time per image (measured module constants)."""
