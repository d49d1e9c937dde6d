r"""Estimate a pre-training run without starting it: memory per GPU, time, cost, data rate, storage, checkpoints.

    python jobs/plan.py --recipe h14_jft300m_14ep --gpus 64 --gpu h100
    python jobs/plan.py --recipe b16_imagenet --gpus 8 --gpu a100 --mfu 0.35 \
        --training.engine.zero 2
    python jobs/plan.py --recipe l16_imagenet21k_90ep --images 5e6 \
        --classes 9000 --json
    python jobs/plan.py --recipe h14_jft300m_14ep --gpus 64 --cores 256 \
        --corpus-images 300e6 --scaling scaling.png

Recipes for published corpora include the corpus size, so a plan needs no data. The exit code is 2 when no plan can be
made. """

import dataclasses
import json
import os
from collections.abc import Callable

from pipeline import config, storage
from pipeline.errors import UserError
from pipeline.operations.planning.config import PlanConfig
from pipeline.outputs import check_output
from pipeline.training.recipes import RECIPES, PretrainConfig


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Command(PlanConfig):
    """jobs/plan.py"""

    scaling: str | None = None
    """PNG file for a plot of the simulated weak and strong scaling."""
    network: float | None = None
    """Network bandwidth of a node in GB/s. None: the value of the usual cloud instance with this GPU."""
    json: bool = False
    """Print only the plan, as JSON."""


def command(recipe: Callable[[], PretrainConfig]) -> Callable[[], Command]:
    def make() -> Command:
        return Command(training=recipe())

    make.__doc__ = recipe.__doc__
    return make


def _check_file(uri: str) -> None:
    """Raises UserError for a plot that cannot be written."""
    place = storage.normalise(uri)
    folder = os.path.dirname(place)
    if not place.endswith(".png"):
        raise UserError(f"--scaling {uri}: the file name must end in .png")
    check_output(folder, "scaling")
    if not storage.is_remote(place) and not os.path.isdir(folder):
        raise UserError(f"--scaling {uri}: there is no folder {folder}; create it, or correct the name")


def main(argv: list[str]) -> None:
    recipes = {name: command(recipe) for name, recipe in RECIPES.items()}
    options, _, recipe = config.parse_recipe(
        argv, recipes, "h14_jft300m_14ep", prog="jobs/plan.py", description=__doc__ or ""
    )
    from pipeline.operations.planning.estimate import plan
    from pipeline.operations.planning.table import plan_table

    if options.scaling:
        _check_file(options.scaling)
    if options.network is not None and options.network <= 0:
        raise UserError("--network must be more than 0")
    result = plan(options, recipe)
    if options.scaling:
        from pipeline.operations import scaling

        width = 4 if options.training.engine.precision == "fp32" else 2
        result["scaling"] = scaling.simulate(result, width=width, network=options.network)
        scaling.draw(result["scaling"], options.scaling, f"{recipe} on {result['hardware']['gpu']}")
    if options.json:
        print(json.dumps(result))
        return
    print(plan_table(result))
    if options.scaling:
        print(f"\n{scaling.scaling_table(result['scaling'])}\n    wrote {options.scaling}")


if __name__ == "__main__":
    config.run_job(main)
