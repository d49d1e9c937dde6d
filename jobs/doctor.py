r"""Check for anything that would stop a run, before launching it. Takes the flags of jobs/pretrain.py.

    python jobs/doctor.py                      this machine, for the demo
    python jobs/doctor.py --recipe b16_imagenet --data s3://bucket/data/train \
        --output s3://bucket/runs/b16
    python jobs/doctor.py --address auto --workers 16 --gpus \
        --data s3://bucket/data/train --output s3://bucket/runs/b16
    ray job submit --working-dir . -- python jobs/doctor.py \
        --recipe b16_imagenet --data s3://bucket/data/train

Checks token authentication, the tracking server, read and write access to storage, shared memory, the compiler, stale
build locks, resources for the workers, ports, whether --output is unused, GPUs and NCCL. With --address, or as a Ray
job, it checks every node of the cluster. It deletes its test files. Exit codes: 0 no errors, 1 errors found, 2 wrong
input. """

import dataclasses
import json
from collections.abc import Callable

from pipeline import config
from pipeline.training.config import PretrainConfig
from pipeline.training.recipes import RECIPES


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Command(PretrainConfig):
    """jobs/doctor.py"""

    json: bool = False
    """Print only the findings, as JSON."""


def command(recipe: Callable[[], PretrainConfig]) -> Callable[[], Command]:
    def make() -> Command:
        base = recipe()
        return Command(**{field.name: getattr(base, field.name) for field in dataclasses.fields(PretrainConfig)})

    make.__doc__ = recipe.__doc__
    return make


def main(argv: list[str]) -> int:
    recipes = {name: command(recipe) for name, recipe in RECIPES.items()}
    options = config.parse(argv, recipes, "demo", prog="jobs/doctor.py", description=__doc__ or "")
    from pipeline.operations import doctor

    settings = PretrainConfig(
        **{field.name: getattr(options, field.name) for field in dataclasses.fields(PretrainConfig)}
    )
    results = doctor.examine(settings)
    errors = sum(result.status == "error" for result in results)
    if options.json:
        print(json.dumps({"ok": not errors, "findings": [dataclasses.asdict(result) for result in results]}))
    else:
        print(doctor.results_table(results))
    return 1 if errors else 0


if __name__ == "__main__":
    config.run_job(main)
