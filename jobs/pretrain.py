"""Pre-train a Vision Transformer on a prepared dataset.

    python jobs/pretrain.py --recipe NAME --data URI --output URI [--workers 8] [any field below]
    ray job submit --working-dir . -- python jobs/pretrain.py --recipe NAME ...

Every line below is a field of the recipe and a flag over it. The same command again continues the run in --output, from
its last complete checkpoint, on the same or another number of workers. With no arguments: the demo recipe.
"""

import os
import sys

sys.path[0] = os.path.dirname(
    os.path.dirname(os.path.abspath(__file__))
)  # the project; jobs/ itself would hide the stdlib's inspect

from pipeline import cluster
from pipeline.config import diff, parse_recipe, run_job, to_yaml
from pipeline.training.recipes import RECIPES


def main(argv: list[str]) -> None:
    config, base, recipe = parse_recipe(argv, RECIPES, "demo", prog="jobs/pretrain.py", description=__doc__ or "")
    from pipeline.training import run

    plan = run.check(config)  # bad input ends here, before Ray or anything else starts
    if config.dry_run:
        print(run.describe(plan, diff(config, base)))
        print(to_yaml(config))
        return
    cluster.connect(config.address, num_cpus=max(2, round(config.workers * config.cpus_per_worker)))
    run.pretrain(config, base, recipe=recipe)


if __name__ == "__main__":
    run_job(main)
