"""Evaluate checkpoints on a schedule: each one once, recorded in MLflow, the best one champion.

    python jobs/evaluate.py --runs runs/demo/pretrain                    what lacks an evaluation, now
    python jobs/evaluate.py --runs s3://bucket/run --suite vtab1k --data s3://bucket/vtab --output s3://bucket/evaluate --every 30m
    python jobs/evaluate.py --model vit --suite vtab1k ... --once --fail-on-regression      from cron
    python jobs/evaluate.py --runs runs/demo/pretrain --dry-run          only says what it would evaluate
    python jobs/evaluate.py --runs runs/demo/pretrain --prune --keep 2   lists checkpoints that nothing refers to; --delete

A run may still be training: its checkpoints are only read, and their scores become its learning curve of transfer in the
experiment "evaluate". Any number of schedulers may share --output; one that dies is succeeded by another.

Exit code: 0 done, 1 an evaluation failed, 2 bad input, 3 a regression (with --fail-on-regression).
"""

import dataclasses
import json
import logging

from pipeline import config, storage
from pipeline.errors import UserError
from pipeline.operations import evaluation

logger = logging.getLogger("jobs.evaluate")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Command(evaluation.EvaluateConfig):
    """Whatever of --runs and --model lacks an evaluation of --suite."""

    once: bool = False
    """One pass, then exit (the default without --every)."""
    every: str | None = None
    """Run for ever, one pass each 90s, 30m, 2h, 1d; times missed by a long pass are skipped."""
    dry_run: bool = False
    """Say what would be evaluated or deleted; change nothing."""
    fail_on_regression: bool = False
    """Exit with 3 when a new score is worse by more than noise."""
    prune: bool = False
    """Instead of evaluating: list checkpoints of --runs that nothing refers to."""
    keep: int = 3
    """--prune spares the last so many of each run."""
    delete: bool = False
    """Delete what --prune lists."""
    json: bool = False
    """Print each pass as JSON, and nothing else, on stdout."""


def main(argv: list[str]) -> int:
    command = config.parse(argv, {"default": Command}, "default", prog="evaluate.py", description=__doc__ or "")
    if command.once and command.every:
        raise UserError("--once and --every contradict each other; give one of them")
    if command.register and not command.model:
        raise UserError("--register needs --model: the name of the registered model")
    if command.prune:
        return prune(command)
    fields = dataclasses.fields(evaluation.EvaluateConfig)
    what = evaluation.EvaluateConfig(**{field.name: getattr(command, field.name) for field in fields})
    from pipeline.operations import doctor

    doctor.preflight(None, what.tracking_uri)
    if command.every is None:
        return report(command, evaluation.evaluate_once(what, dry_run=command.dry_run))
    for _ in evaluation.ticks(evaluation.seconds(command.every)):
        try:
            report(command, evaluation.evaluate_once(what, dry_run=command.dry_run))
        except UserError as error:  # a server or store that is away now may be back at the next time
            logger.error("%s", error)
        except Exception:
            logger.exception("this pass failed; the next one tries again")
    return 0


def report(command: Command, done: evaluation.Round) -> int:
    if command.json:
        print(json.dumps(dataclasses.asdict(done)), flush=True)
    else:
        for what in ("pending", "failed", "regressions", "promoted", "claimed_elsewhere"):
            for item in getattr(done, what):
                print(f"{what.replace('_', ' ')}: {item}", flush=True)
        counts = "  ".join(f"{name}={len(items)}" for name, items in dataclasses.asdict(done).items())
        print(f"evaluate: {counts}", flush=True)
    if done.failed:
        return 1
    return 3 if done.regressions and command.fail_on_regression else 0


def prune(command: Command) -> int:
    from pipeline.tracking import resolve_tracking_uri
    from pipeline.training import checkpoint

    runs = tuple(storage.normalise(run) for run in command.runs)
    if not runs:
        raise UserError("--prune needs --runs: the run folders to look through")
    found = evaluation.prunable(runs, command.keep, resolve_tracking_uri(command.tracking_uri))
    delete = command.delete and not command.dry_run
    for item in found:
        if delete:
            checkpoint.remove(item)
        if not command.json:
            print(f"{'deleted' if delete else 'would delete'} {item.uri}", flush=True)
    if command.json:
        print(json.dumps({"deleted" if delete else "would_delete": [item.uri for item in found]}))
    return 0


if __name__ == "__main__":
    config.run_job(main)
