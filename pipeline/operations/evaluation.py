"""Scheduled evaluation: every checkpoint is evaluated once per suite, even with several schedulers and after crashes.

A ledger on shared storage (`pipeline.operations.ledger`) records which process evaluates which checkpoint. A checkpoint
is identified by the checksum of its weights: the same weights under another name are not evaluated again, but new
weights under an old name are. Checkpoints are only read. The transfer scores of a run form a learning curve in a
separate MLflow run, which is linked to the training run."""

import dataclasses
import errno
import http.client
import itertools
import json
import logging
import math
import os
import shlex
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from pipeline import config as configuration
from pipeline import credentials, logs, metrics, storage
from pipeline.errors import Unavailable, UserError
from pipeline.operations.ledger import ATTEMPTS, EvaluationScores, Ledger, LedgerError, Target, read_record
from pipeline.outputs import check_output
from pipeline.tracking import Run, names, registry, resolve_tracking_uri, search, start_run
from pipeline.tracking.description import Description, checkpoint_name, run_name
from pipeline.transfer import TransferConfig, suites
from pipeline.weights import checkpoints

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateConfig:
    """Settings of the scheduled evaluation."""

    suite: str = "demo"
    """Transfer suite. The flags --transfer.NAME change its settings."""
    runs: tuple[str, ...] = ()
    """Run folders of jobs/pretrain.py, finished or running, or checkpoint folders."""
    model: str | None = None
    """Registered MLflow model whose versions are evaluated. Its alias `champion` is moved to the best version."""
    register: bool = False
    """Before evaluating, register the newest checkpoint of each of --runs as a version of --model."""
    data: str | None = None
    """Data of the suite, as for jobs/transfer.py."""
    output: str = "runs/evaluate"
    """Folder or s3:// prefix for the ledger and the results, the same for all schedulers. Several machines need
    s3://."""
    every_step: int = 1
    """Evaluate only checkpoints at multiples of this number of steps."""
    margin: float = 1.0
    """Minimum difference of scores that counts as better or worse, in standard errors."""
    hook: str | None = None
    """Command that receives each event (evaluated, failed, promoted, regression) as JSON on standard input. The
    environment variable VIT_WEBHOOK sets a URL that receives events by POST."""
    tracking_uri: str | None = None
    """MLflow server. None: MLFLOW_TRACKING_URI, or SQLite in the current folder."""
    transfer: TransferConfig = field(default_factory=TransferConfig)
    """Settings of the suite: steps, seeds, workers, address, ..."""


@dataclass(kw_only=True, slots=True)
class Round:
    """Results of one pass."""

    evaluated: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    regressions: list[str] = field(default_factory=list)
    promoted: list[str] = field(default_factory=list)
    claimed_elsewhere: list[str] = field(default_factory=list)
    pending: list[str] = field(default_factory=list)
    """Checkpoints that a dry run would evaluate."""


def suite_version(config: EvaluateConfig) -> str:
    """Identifies the suite, its settings and its data (`pipeline.transfer.suites.suite_version`)."""
    return suites.suite_version(dataclasses.replace(config.transfer, suite=config.suite, data=config.data))


def check_config(config: EvaluateConfig) -> None:
    """Raises UserError for an unknown suite, or settings that cannot work."""
    suites.check_config(dataclasses.replace(config.transfer, suite=config.suite, data=config.data))
    if config.every_step < 1:
        raise UserError(f"--every-step must be at least 1, not {config.every_step}")
    if not (math.isfinite(config.margin) and config.margin >= 0):
        raise UserError(f"--margin must be a number of at least 0, not {config.margin:g}")
    if config.model is not None and (not config.model.strip() or set(config.model) & set("/:")):
        raise UserError(f'--model "{config.model}": the name of a registered model has text without / and :')


def check_data(config: EvaluateConfig) -> None:
    """Raises UserError, before a checkpoint is claimed, when the suite's data sets are missing or unusable."""
    what = dataclasses.replace(config.transfer, suite=config.suite, data=config.data)
    suites.open_datasets(suites.build_tasks(what, suites.NOMINAL))


# ---------------------------------------------------------------- targets


def find_targets(config: EvaluateConfig, uri: str) -> list[Target]:
    """The committed checkpoints of `runs` and the versions of `model`, ordered by step, without repeated weights.

    Raises UserError when neither is given or nothing is found.
    """
    if not config.runs and not config.model:
        raise UserError(
            "nothing to evaluate: give --runs (folders of jobs/pretrain.py) or --model (a registered model)"
        )
    found: dict[str, Target] = {}
    for run in config.runs:
        run = storage.normalise(run)
        if storage.exists(storage.join(run, checkpoints.COMMIT)):
            here = [checkpoints.resolve(run)]
            run = run.rpartition("/checkpoints/")[0] or run
        else:
            here = checkpoints.find(run)
            if not here and not storage.exists(run):
                raise UserError(f"{run}: no such run folder")
        for checkpoint in here:
            if checkpoint.step % config.every_step == 0 or checkpoint is here[-1]:
                target = _target(checkpoint, run)
                found[target.key] = target
        if config.register and config.model and here:
            registry.register_first([c.uri for c in reversed(here)], name=config.model, uri=uri)
    for version in registry.versions(config.model, uri) if config.model else []:
        try:
            checkpoint = checkpoints.resolve(version.checkpoint)
        except Unavailable:
            raise
        except UserError as error:  # deleted, or on the disk of another machine
            logger.warning("version %d of %s cannot be evaluated: %s", version.version, version.name, error)
            continue
        target = _target(checkpoint, version.checkpoint.rpartition("/checkpoints/")[0] or version.checkpoint)
        found[target.key] = dataclasses.replace(target, version=version)
    return sorted(found.values(), key=lambda target: (target.run, target.step))


def _target(checkpoint: checkpoints.Checkpoint, run: str) -> Target:
    weights = checkpoint.commit.get("files", {}).get("model.safetensors", checkpoint.commit)
    return Target(
        key=f"step-{checkpoint.step:08d}-{configuration.fingerprint(weights)}",
        checkpoint=checkpoint.uri,
        step=checkpoint.step,
        images_seen=checkpoint.commit.get("images_seen"),
        run=run,
    )


# ---------------------------------------------------------------- one pass


Evaluate = Callable[[EvaluateConfig, Target, str, str], EvaluationScores]


def transfer(config: EvaluateConfig, target: Target, output: str, uri: str) -> EvaluationScores:
    """Runs the suite on one checkpoint (`pipeline.transfer.run_suite`). Results of a killed evaluator are reused."""
    from pipeline.transfer import run_suite
    from pipeline.transfer.scores import read_scores, standard_error

    result = run_suite(
        dataclasses.replace(
            config.transfer,
            suite=config.suite,
            data=config.data,
            checkpoint=target.checkpoint,
            output=output,
            tracking_uri=uri,
        )
    )
    if result.failures and all(error.startswith(f"{Unavailable.__name__}: ") for error in result.failures.values()):
        raise Unavailable("; ".join(result.failures.values()))
    if result.mean is None:
        raise RuntimeError("; ".join(f"{job}: {error}" for job, error in result.failures.items()) or "no scores")
    _, scores = read_scores(result.output)
    return EvaluationScores(mean=result.mean, spread=standard_error(scores), scores=result.scores, run_id=result.run_id)


def evaluate_once(config: EvaluateConfig, *, dry_run: bool = False, evaluate: Evaluate = transfer) -> Round:
    """Runs one pass: evaluates new checkpoints, logs the results, moves `champion`, and reports regressions.

    Errors of one checkpoint (evaluation, damaged ledger file) are listed in `failed` and do not stop the others.
    """
    check_config(config)
    uri = resolve_tracking_uri(config.tracking_uri)
    check_output(config.output)
    version = suite_version(config)
    ledger = Ledger(storage.join(storage.normalise(config.output), f"{config.suite}-{version}"))
    done = Round()
    fresh: list[Target] = []
    targets = find_targets(dataclasses.replace(config, register=config.register and not dry_run), uri)
    for number, target in enumerate(targets):
        try:
            if ledger.result(target) is None:
                if evaluate is transfer:
                    check_data(config)
                if dry_run:
                    done.pending.append(target.checkpoint)
                    continue
                with logs.part_of_job(number / len(targets), (number + 1) / len(targets)):
                    is_evaluated = _evaluate_target(config, ledger, target, version, uri, evaluate, done)
                if not is_evaluated:
                    continue
                fresh.append(target)
            if not dry_run:
                record(config, ledger, target, version, uri)
        except LedgerError as error:
            logger.error("%s", error)
            done.failed.append(f"{target.checkpoint}: {error}")
    if dry_run:
        return done
    metrics.publish({metrics.EVALUATIONS_FAILED: len(done.failed)}, run=config.output)
    if config.model:
        done.promoted = promote(config, version, uri)
    for target, message in regressions(config, ledger, fresh, version, uri):
        done.regressions.append(message)
        notify(config, "regression", target, reason=message)
    return done


def _evaluate_target(
    config: EvaluateConfig, ledger: Ledger, target: Target, version: str, uri: str, evaluate: Evaluate, done: Round
) -> bool:
    """Claims and evaluates one checkpoint. Returns whether this process wrote the result."""
    if ledger.failures(target) >= ATTEMPTS:
        done.failed.append(f"{target.checkpoint}: failed {ATTEMPTS} times, see {ledger.folder(target)}")
        return False
    claim = ledger.claim(target)
    if claim is None:
        done.claimed_elsewhere.append(target.checkpoint)
        return False
    with claim:
        logger.info("evaluating %s on %s (%s)", target.checkpoint, config.suite, version)
        try:
            outcome = evaluate(config, target, storage.join(ledger.folder(target), "transfer"), uri)
        except UserError:
            raise  # the command is wrong, or the store away, and not the checkpoint
        except Exception as error:
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
                raise  # the same would happen to the next checkpoint
            logger.error("evaluation of %s failed: %s", target.checkpoint, error)
            logger.debug("evaluation of %s failed", target.checkpoint, exc_info=error)
            claim.fail(f"{type(error).__name__}: {error}")
            done.failed.append(f"{target.checkpoint}: {error}")
            notify(config, "failed", target, reason=str(error))
            return False
        if not claim.finish(outcome):
            return False
    done.evaluated.append(target.checkpoint)
    notify(config, "evaluated", target, **dataclasses.asdict(outcome))
    return True


def record(config: EvaluateConfig, ledger: Ledger, target: Target, version: str, uri: str) -> None:
    """Logs a result to MLflow: a point of the run's learning curve, and tags and metrics of the model version.

    Idempotent, because it is repeated if an evaluator died before it finished.
    """
    outcome = ledger.result(target)
    evaluation = f"{config.suite}:{version}"
    versioned = target.version is None or evaluation in target.version.evaluations
    marker = storage.join(ledger.folder(target), "recorded.json")
    if outcome is None or (versioned and storage.exists(marker)):
        return
    series = storage.join(ledger.output, f"series-{configuration.fingerprint(target.run)}.json")
    known = read_record(series).get("run_id") if storage.exists(series) else None
    name = run_name(config.suite, checkpoint_name(target.run))
    tags = {"suite": config.suite, "suite.version": version, names.CHECKPOINT: target.checkpoint}
    if known is not None and not isinstance(known, str):
        raise LedgerError(f"{series}: contains no run id; remove it")
    about = Description(
        what=f"Learning curve of transfer: the suite {config.suite} on the checkpoints of {target.run}.",
        data=(f"data sets of {config.data or 'the suite'}, among the inputs of the transfer runs",),
        to_continue="repeat the command to evaluate new checkpoints.",
    )
    with start_run(
        names.EVALUATE, name, config=None if known else config, tags=tags, about=about, run_id=known, tracking_uri=uri
    ) as run:
        points = {names.SCORE + task: value for task, value in outcome.scores.items()}
        points |= {names.MEAN_SCORE: outcome.mean, names.MEAN_ERROR: outcome.spread}
        if target.images_seen is not None:
            points[names.IMAGES_SEEN] = target.images_seen
        run.log(points, target.step)
        if not known:
            if trained_by := registry.run_of(target.checkpoint, uri):
                run.link("pretrain", trained_by)
            _log_datasets(run, config)
            storage.create_bytes(series, json.dumps({"run_id": run.id}).encode())
    if target.version is not None and not versioned:
        registry.record_evaluation(target.version, evaluation, dataclasses.asdict(outcome), run.id, uri)
    storage.write_json(marker, {"run_id": run.id, "time": time.time()})


def _log_datasets(run: Run, config: EvaluateConfig) -> None:
    """Logs the readable data sets of the suite as inputs of the run."""
    settings = dataclasses.replace(config.transfer, suite=config.suite, data=config.data)
    for role, uri, manifest in suites.find_datasets(settings):
        about = {"fingerprint": manifest["fingerprint"], "rows": manifest.get("rows")}
        run.log_dataset(uri, about, role=role, linked=False)


# ---------------------------------------------------------------- champion and regressions


def promote(config: EvaluateConfig, version: str, uri: str) -> list[str]:
    """Moves `champion` to the best version if it is significantly better than the current one."""
    assert config.model
    key = f"{config.suite}:{version}"
    scored = [v for v in registry.versions(config.model, uri) if key in v.evaluations]
    if not scored:
        return []
    best = max(scored, key=lambda v: v.evaluations[key]["mean"])
    champion = next((v for v in registry.versions(config.model, uri) if registry.CHAMPION in v.aliases), None)
    if champion is not None:
        if champion.version == best.version:
            return []
        if key not in champion.evaluations:
            logger.warning(
                "champion stays version %d: it has no evaluation of %s to compare with", champion.version, key
            )
            return []
        present, other = champion.evaluations[key], best.evaluations[key]
        if other["mean"] - present["mean"] <= noise(config.margin, present["spread"], other["spread"]):
            return []
    registry.promote(best, uri)
    registry.name_candidate(config.model, key, uri)
    before = f", before {champion.evaluations[key]['mean']:.2f} (version {champion.version})" if champion else ""
    message = f"{best.name} version {best.version} is champion: {best.evaluations[key]['mean']:.2f}{before}"
    notify(config, "promoted", None, model=best.name, version=best.version, checkpoint=best.checkpoint, reason=message)
    return [message]


def noise(margin: float, *spreads: float) -> float:
    """Significance threshold: `margin` standard errors of the difference of two means."""
    return margin * math.sqrt(sum(spread**2 for spread in spreads))


def regressions(
    config: EvaluateConfig, ledger: Ledger, fresh: list[Target], version: str, uri: str
) -> Iterator[tuple[Target, str]]:
    """New results that are worse than the champion (for model versions) or than an earlier checkpoint of the same
    run."""
    if not fresh:
        return
    key = f"{config.suite}:{version}"
    champion = None
    if config.model:
        champion = next((v for v in registry.versions(config.model, uri) if registry.CHAMPION in v.aliases), None)
    everything = [
        (other, _readable_result(ledger, other))
        for other in find_targets(dataclasses.replace(config, register=False), uri)
    ]
    for target in fresh:
        mine = ledger.result(target)
        assert mine is not None
        rivals = [
            (f"step {other.step}", result)
            for other, result in everything
            if result is not None and other.run == target.run and other.step < target.step
        ]
        if target.version is not None and champion is not None and key in champion.evaluations:
            kept = champion.evaluations[key]
            rivals.append(
                (
                    f"champion, version {champion.version}",
                    EvaluationScores(mean=kept["mean"], spread=kept["spread"], scores={}),
                )
            )
        if not rivals:
            continue
        label, best = max(rivals, key=lambda rival: rival[1].mean)
        if best.mean - mine.mean > noise(config.margin, best.spread, mine.spread):
            yield target, f"{target.checkpoint}: {config.suite} {mine.mean:.2f} after {best.mean:.2f} ({label})"


def _readable_result(ledger: Ledger, target: Target) -> EvaluationScores | None:
    try:
        return ledger.result(target)
    except LedgerError:  # reported by evaluate_once
        return None


def notify(config: EvaluateConfig, event: str, target: Target | None, **details: Any) -> None:
    """Sends an event to the hook and the webhook. Failures are logged as warnings."""
    message: dict[str, Any] = {"event": event, "suite": config.suite, **details}
    if target is not None:
        message |= {"checkpoint": target.checkpoint, "step": target.step, "run": target.run}
    data = json.dumps(message).encode()
    if config.hook:
        try:
            subprocess.run(shlex.split(config.hook), input=data, timeout=60, check=True)
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            logger.warning("hook failed on %s: %s", event, error)
    if address := os.environ.get("VIT_WEBHOOK"):
        try:
            address, login = credentials.split_login(address)
            request = urllib.request.Request(address, data, {"Content-Type": "application/json", **login})
            urllib.request.urlopen(request, timeout=10).close()
        except (
            OSError,
            ValueError,
            http.client.HTTPException,
        ) as error:  # the URL may contain a token and is not logged
            about = error.code if isinstance(error, urllib.error.HTTPError) else type(error).__name__
            logger.warning("webhook failed on %s: %s", event, about)


# ---------------------------------------------------------------- schedule and pruning


def seconds(text: str) -> float:
    """Parses "90s", "30m", "2h", "1d" or a number of seconds. Raises UserError for anything else."""
    units = {"s": 1, "m": 60, "h": 3600, "d": 86400}
    number, unit = (text[:-1], units[text[-1]]) if text and text[-1] in units else (text, 1)
    try:
        value = float(number) * unit
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise UserError(f'cannot parse the interval "{text}"; write 90s, 30m, 2h or 1d')
    return value


def ticks(
    every: float, clock: Callable[[], float] = time.monotonic, sleep: Callable[[float], None] = time.sleep
) -> Iterator[int]:
    """Yields 0, 1, 2, ... every `every` seconds. If a pass overruns, the missed ticks are skipped."""
    start, count = clock(), 0
    while True:
        yield count
        count = max(count + 1, math.ceil((clock() - start) / every))
        sleep(max(0.0, start + count * every - clock()))


def prunable(runs: tuple[str, ...], keep_last: int, uri: str) -> list[checkpoints.Checkpoint]:
    """Checkpoints that can be deleted: all except the last `keep_last` valid ones of each run, the best valid one by
    validation, registered versions, and checkpoints of transfer runs. None of a run with fewer valid checkpoints. Reads
    the checkpoints that stay."""
    if keep_last < 1:
        raise UserError("--keep-last must be at least 1, because a run cannot continue without its last checkpoint")
    referred = {run.tags.get(names.CHECKPOINT) for run in search.search_runs(names.TRANSFER, uri=uri)}
    referred |= {version.checkpoint for model in registry.model_names(uri) for version in registry.versions(model, uri)}
    spared = {storage.normalise(address) for address in referred if address}
    found = []
    for run in runs:
        here = checkpoints.find(run)
        valid = (c for c in reversed(here) if checkpoints.damage(c) is None)
        kept = [checkpoint.uri for checkpoint in itertools.islice(valid, keep_last)]
        if len(kept) < keep_last:
            continue
        ranked = checkpoints.by_score(here, names.VAL_TOP1)
        best = next((c.uri for c in ranked if c.uri in kept or checkpoints.damage(c) is None), None)
        found += [c for c in here if c.uri not in spared and c.uri not in (*kept, best)]
    return found
