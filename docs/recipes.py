"""Generates docs/recipes.md: every recipe with its model, data, length and estimated cost.

    python docs/recipes.py

The estimates are those of `python jobs/plan.py --recipe NAME --gpus N --gpu h100`.
"""

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from pipeline.help import families, first_sentence
from pipeline.operations.planning.config import PlanConfig
from pipeline.operations.planning.estimate import plan
from pipeline.operations.planning.table import LIMITS
from pipeline.training.recipes import RECIPES

GPUS, GPU = 8, "h100"
ON_A_LAPTOP = ("demo", "masked_demo", "cifar10")
HEAD = f"""# Recipes

`python jobs/pretrain.py --recipe NAME` starts a run; each value has a flag. GPU-hours and cost are estimates of `jobs/plan.py` for
{GPUS} {GPU.upper()} GPUs at the default price, from [measured training steps](benchmarks.md#gpus), without communication. A run
limited by reading shards reads {PlanConfig().read_gbps:g} GB/s on each node, the default of `--read-gbps`; it costs less on fewer GPUs or with a
faster disk. `python docs/recipes.py` generates this page.
"""


def length(steps: str) -> str:
    """1000000steps -> 1,000,000 steps"""
    return re.sub(r"(\d+)([a-z]+)", lambda match: f"{int(match[1]):,} {match[2]}", steps)


def row(name: str) -> str:
    training = RECIPES[name]()
    about = first_sentence(RECIPES[name])
    if name in ON_A_LAPTOP:
        return f"| `{name}` | {training.model.variant} | {length(training.steps)} | on a laptop | | | {about} |"
    result = plan(PlanConfig(training=training, gpus=GPUS, gpu=GPU), name)
    run = result["run"]
    return f"| `{name}` | {training.model.variant} | {length(training.steps)} | {run['gpu_hours']:,.0f} | {run['cost']:,.0f} | {LIMITS[run['limited_by']]} | {about} |"


def page() -> str:
    lines = [HEAD]
    for family, members in families(RECIPES):
        lines += [
            f"## {family or 'Other'}\n",
            "| recipe | model | length | GPU-hours | cost, $ | limited by | description |",
            "| --- | --- | --- | ---: | ---: | --- | --- |",
        ]
        lines += [*(row(name) for name in members), ""]
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    Path(__file__).with_suffix(".md").write_text(page())
