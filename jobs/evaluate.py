r"""Evaluate each checkpoint once, on a schedule, and keep the best one as champion.

    python jobs/evaluate.py --runs runs/x                new checkpoints
    python jobs/evaluate.py --runs s3://bucket/runs/x --suite vtab1k \
        --data s3://bucket/vtab --output s3://bucket/evaluate --every 30m
    python jobs/evaluate.py --model b16_imagenet --suite vtab1k --once \
        --data s3://bucket/vtab --fail-on-regression     for cron
    python jobs/evaluate.py --runs runs/x --dry-run      only lists the work
    python jobs/evaluate.py --runs runs/x --prune --keep-last 2
        lists the checkpoints that nothing refers to; --delete removes them

The runs may still be training: this job only reads their checkpoints. The scores of a run form a learning curve in the
MLflow experiment "evaluate". Several schedulers can share one --output. When one dies, another takes over its work.

Exit codes: 0 success, 1 an evaluation failed, 2 wrong input, 3 a regression (with --fail-on-regression).
"""

import dataclasses
import json
import logging
import sys
from typing import TextIO

from pipeline import config, logs, storage
from pipeline.errors import UserError
from pipeline.lines import fit
from pipeline.operations import evaluation

logger = logging.getLogger("jobs.evaluate")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Command(evaluation.EvaluateConfig):
    """jobs/evaluate.py"""

    once: bool = False
    """Run one pass and exit. This is the default without --every."""
    every: str | None = None
    """Interval between passes, with a unit: 90s, 30m, 2h or 1d. A pass that overruns the interval delays the next one
    to the following tick."""
    dry_run: bool = False
    """List what would be evaluated or deleted, and change nothing."""
    fail_on_regression: bool = False
    """Exit with code 3 when a new score is worse by more than --margin."""
    prune: bool = False
    """Instead of evaluating, list the checkpoints of --runs that nothing refers to."""
    keep_last: int = 3
    """Number of newest checkpoints of each run that --prune keeps."""
    delete: bool = False
    """Delete what --prune lists."""
    json: bool = False
    """Print only JSON, one document per pass."""


def main(argv: list[str]) -> int:
    command = config.parse(argv, {"default": Command}, "default", prog="jobs/evaluate.py", description=__doc__ or "")
    if command.once and command.every:
        raise UserError("--once and --every are mutually exclusive; give one of them")
    if command.register and not command.model:
        raise UserError("--register needs --model: the name of the registered model")
    if command.prune:
        return prune(command)
    if command.delete:
        raise UserError("--delete removes what --prune lists; give --prune, too")
    fields = dataclasses.fields(evaluation.EvaluateConfig)
    what = evaluation.EvaluateConfig(**{field.name: getattr(command, field.name) for field in fields})
    from pipeline.operations import doctor

    doctor.preflight(None, what.tracking_uri)
    stdout = logs.reserve_stdout() if command.json else sys.stdout
    if command.every is None:
        return report(command, evaluation.evaluate_once(what, dry_run=command.dry_run), stdout)
    for _ in evaluation.ticks(evaluation.seconds(command.every)):
        try:
            report(command, evaluation.evaluate_once(what, dry_run=command.dry_run), stdout)
        except UserError as error:  # an unavailable server or store may be back for the next pass
            logger.error("%s", error)
        except Exception:
            logger.exception("this pass failed; the next pass will retry")
    return 0


def report(command: Command, done: evaluation.Round, stdout: TextIO) -> int:
    if command.json:
        print(json.dumps(dataclasses.asdict(done)), file=stdout, flush=True)
    else:
        for what in ("pending", "failed", "regressions", "promoted", "claimed_elsewhere"):
            for item in getattr(done, what):
                print(fit(f"{what.replace('_', ' ')}: {item}"), file=stdout, flush=True)
        counts = "  ".join(f"{name}={len(items)}" for name, items in dataclasses.asdict(done).items())
        print(fit(f"evaluate: {counts}"), file=stdout, flush=True)
    if done.failed:
        return 1
    return 3 if done.regressions and command.fail_on_regression else 0


def prune(command: Command) -> int:
    from pipeline.tracking import resolve_tracking_uri
    from pipeline.training import checkpoint

    runs = tuple(storage.normalise(run) for run in command.runs)
    if not runs:
        raise UserError("--prune needs --runs: the run folders to search")
    found = evaluation.prunable(runs, command.keep_last, resolve_tracking_uri(command.tracking_uri))
    delete = command.delete and not command.dry_run
    for item in found:
        if delete:
            checkpoint.remove(item)
        if not command.json:
            print(fit(f"{'deleted' if delete else 'would delete'} {item.uri}"), flush=True)
    if command.json:
        print(json.dumps({"deleted" if delete else "would_delete": [item.uri for item in found]}))
    return 0


if __name__ == "__main__":
    config.run_job(main)
