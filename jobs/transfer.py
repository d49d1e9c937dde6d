r"""Evaluate one checkpoint on many tasks: fine-tuning and probes run in parallel on Ray.

    python jobs/transfer.py                    the demo, after jobs/pretrain.py
    python jobs/transfer.py --suite folder --checkpoint runs/x --data sets/
    python jobs/transfer.py --suite vtab1k --checkpoint s3://bucket/runs/x \
        --data s3://bucket/vtab --seeds 3
    python jobs/transfer.py --suite vtab1k-224 --checkpoint ViT-B_16.npz \
        --variant B/16 --data sets/vtab --tasks pets dtd
    python jobs/transfer.py --suite head --checkpoint runs/x \
        --data data/val                        top-1 of its own classifier
    python jobs/transfer.py --compare runs/a/transfer runs/b/transfer

Scores are top-1 accuracies in percent. The VTAB score is the mean over the nineteen tasks. The report, the figures and
all results go to --output and to MLflow. To continue a stopped job, repeat its command; more --seeds or --tasks add to
its results. A failed task does not stop the others, but the exit code is then 1. """

import dataclasses
import json
import statistics
import sys
import typing
from collections.abc import Callable

from pipeline import config, logs
from pipeline.errors import UserError
from pipeline.lines import fit
from pipeline.transfer.suites import SUITES, TransferConfig, check_config

if typing.TYPE_CHECKING:
    from pipeline.transfer.run import SuiteResult


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Command(TransferConfig):
    """jobs/transfer.py"""

    compare: tuple[str, ...] = ()
    """Two earlier runs, as output folders or MLflow run ids. Prints the score differences and their standard errors,
    and exits."""
    dry_run: bool = False
    """Check the command, the checkpoint and the data, print the tasks, and exit."""
    json: bool = False
    """Print only the result, as JSON."""


def command(name: str) -> Callable[[], Command]:
    def make() -> Command:
        return Command(suite=name)

    make.__doc__ = SUITES[name].__doc__
    return make


def main(argv: list[str]) -> int:
    recipes = {name: command(name) for name in SUITES}
    options = config.parse(argv, recipes, "demo", prog="jobs/transfer.py", description=__doc__ or "")
    if options.compare:
        return compare(options)
    settings = TransferConfig(**{f.name: getattr(options, f.name) for f in dataclasses.fields(TransferConfig)})
    check_config(settings)  # before torch and Ray are imported
    if options.dry_run:
        return dry_run(options, settings)
    from pipeline.operations import doctor, next_steps
    from pipeline.transfer import run_suite

    doctor.preflight(settings.address, settings.tracking_uri)
    stdout = logs.reserve_stdout() if options.json else sys.stdout
    result = run_suite(settings)
    if options.json:
        print(json.dumps(dataclasses.asdict(result)), file=stdout, flush=True)
    else:
        show(result, options.seeds)
        print(fit(f"report: {result.output}/report.md"))
    for job, error in result.failures.items():
        print(fit(f"failed: {job}: {error}"), file=sys.stderr)
    logs.show(next_steps.after_transfer(settings.suite, settings.tracking_uri))
    return 1 if result.failures else 0


def show(result: "SuiteResult", seeds: int) -> None:
    """Prints the scores as a table, with those of random weights where there are any."""
    from pipeline.transfer import report

    random, width = result.random, 15 if seeds > 1 else 8
    if random:
        print(f"{'':24s}{'encoder':>{width}s}{'random':>9s}")
    for name, score in result.scores.items():
        spread = f" ± {result.std[name]:.2f}" if seeds > 1 else ""
        beside = f"{random[name]:9.2f}" if name in random else ""
        unseen = f"  ({result.clean[name]:.2f} without seen images)" if name in result.clean else ""
        more = "".join(f"  {title} {text}" for title, text in report.describe(result.details.get(name, {})))
        print(fit(f"{name:24s}{f'{score:.2f}{spread}':>{width}s}{beside}{more}{unseen}", indent=33))
    for group, mean in result.group_means.items():
        print(fit(f"{f'mean {group}':24s}{mean:{width}.2f}"))
    if result.mean is not None:
        beside = f"{statistics.fmean(random.values()):9.2f}" if random.keys() == result.scores.keys() else ""
        print(fit(f"{f'mean of {len(result.scores)}':24s}{result.mean:{width}.2f}{beside}"))


def dry_run(options: Command, settings: TransferConfig) -> int:
    from pipeline.transfer.run import open_suite

    suite = open_suite(settings)
    left = {task.name for task in suite.unfinished()}
    images = {task.name: len(suite.datasets[task.test]) for task in suite.tasks}
    if options.json:
        rows = [{"task": name, "images": count, "finished": name not in left} for name, count in images.items()]
        print(json.dumps({"checkpoint": suite.checkpoint.uri, "output": suite.store.output, "tasks": rows}))
        return 0
    for task in suite.tasks:
        state = "" if task.name in left else "  finished"
        print(fit(f"{task.name:24s}{images[task.name]:9d} test images  {task.protocol}{state}", indent=26))
    print(fit(f"output: {suite.store.output}"))
    return 0


def compare(options: Command) -> int:
    from pipeline.transfer import report

    if len(options.compare) != 2:
        raise UserError(f"--compare takes two runs, found {len(options.compare)}")
    text, rows = report.compare_runs(*options.compare, tracking_uri=options.tracking_uri)
    print(json.dumps(rows) if options.json else fit(text))
    return 0


if __name__ == "__main__":
    config.run_job(main)
