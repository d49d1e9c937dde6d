"""The rule by which a checkpoint becomes the champion of a pipeline's registered model.

Every compared checkpoint becomes a version of the model, with its scores. `champion` is the version that was promoted last;
`candidate` is the best version that was never promoted.
"""

import inspect
import json
import logging
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pipeline import config as configuration
from pipeline import storage
from pipeline.errors import UserError, nearest

logger = logging.getLogger(__name__)

PROMOTION = "promotion.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class PromoteConfig:
    """The promotion rule and the scores it applies to."""

    model: str
    """Registered MLflow model: the pipeline's name."""
    scores: tuple[str, ...]
    """Output folders of jobs/transfer.py; those of one checkpoint are averaged."""
    output: str
    """Folder for promotion.json."""
    metric: str = "mean"
    """mean, or the name of a task in percent."""
    at_least: float | None = None
    """Minimum score for promotion."""
    no_worse_than: Literal["champion"] | None = None
    """champion: do not promote a score below that of the current champion on the same suite."""
    margin: float = 0.0
    """Allowed difference below the score of the champion, in standard errors of the difference."""
    tracking_uri: str | None = None
    """MLflow server; default MLFLOW_TRACKING_URI, or SQLite in this folder."""


@dataclass(kw_only=True, slots=True)
class Measured:
    """The scores of one checkpoint."""

    checkpoint: str
    values: dict[str, float] = field(default_factory=dict)
    """{suite/task: top-1 in percent}"""
    errors: dict[str, tuple[str, float]] = field(default_factory=dict)
    """{suite/task: (test images, standard error)}"""
    measures: list[Any] = field(default_factory=list)
    """Protocols and datasets of the scores. Only scores with equal measures are compared."""
    run_id: str = ""
    """MLflow run of a transfer."""

    @property
    def mean(self) -> float:
        """Mean of all scores."""
        return statistics.fmean(self.values.values())

    @property
    def spread(self) -> float:
        """Standard error of the mean."""
        from pipeline.transfer.scores import error_of_mean

        return error_of_mean(self.errors.values())


def main(argv: Sequence[str], show: Callable[[str], None]) -> int:
    """Runs `jobs/pipeline.py promote`. Returns 0 whether or not a version is promoted; promotion.json has the result."""
    about = inspect.cleandoc(__doc__ or "")
    config = configuration.parse_command(list(argv), PromoteConfig, prog="jobs/pipeline.py promote", description=about)
    result = promote(config)
    storage.write_json(storage.join(config.output, PROMOTION), result)
    show(f"promote: {result['why']}")
    return 0


def promote(config: PromoteConfig) -> dict[str, Any]:
    """Registers the compared checkpoints and moves the aliases. Returns the result as plain values.

    Raises UserError for missing or incomplete scores and for an unknown metric.
    """
    from pipeline.tracking import registry, resolve_tracking_uri

    found = [_chosen(one, config.metric) for one in measure(config.scores)]
    uri = resolve_tracking_uri(config.tracking_uri)
    for one in found:
        version = registry.register(one.checkpoint, name=config.model, uri=uri)
        outcome = {"mean": one.mean, "spread": one.spread, "scores": _as_in_the_run(one.values)}
        registry.record_evaluation(version, _key(one), outcome, one.run_id, uri)
    versions = registry.versions(config.model, uri)
    champion = next((v for v in versions if registry.CHAMPION in v.aliases), None)
    best = max(found, key=lambda one: one.mean)
    mine = next(v for v in versions if v.checkpoint == storage.normalise(best.checkpoint))
    refusal = _refusal(config, best, mine, champion)
    if refusal is None:
        registry.promote(mine, uri)
    candidate = registry.name_candidate(config.model, _key(best), uri)
    name = f"version {mine.version} with {best.mean:.2f}"
    before = f", before version {champion.version}" if champion and champion.version != mine.version else ""
    return {
        "model": config.model,
        "metric": config.metric,
        "promoted": mine.version if refusal is None else None,
        "champion": mine.version if refusal is None else (champion.version if champion else None),
        "candidate": candidate,
        "score": best.mean,
        "checkpoint": mine.checkpoint,
        "scores": {one.checkpoint: one.mean for one in found},
        "why": f"{config.model} {name} is champion{before}"
        if refusal is None
        else f"{config.model} {name} is not promoted: {refusal}",
        "time": time.time(),
    }


def _refusal(config: PromoteConfig, best: Measured, mine: Any, champion: Any) -> str | None:
    """Why the rule does not promote the best version; None if it does."""
    if config.at_least is not None and best.mean < config.at_least:
        return f"less than {config.at_least:g}"
    if champion is None or config.no_worse_than is None or champion.version == mine.version:
        return None
    key = _key(best)
    if key not in champion.evaluations:
        return f"the champion, version {champion.version}, has no score with the same protocol and data"
    present = champion.evaluations[key]
    allowed = config.margin * math.hypot(best.spread, present["spread"])
    if best.mean < present["mean"] - allowed:
        return f"the champion, version {champion.version}, has {present['mean']:.2f}"
    return None


def _as_in_the_run(values: Mapping[str, float]) -> dict[str, float]:
    """Renames "suite/task" to the name in the run of the transfer: the task alone, if all scores are of one suite.

    A second name for the same number would be a separate row in every comparison.
    """
    if len({name.partition("/")[0] for name in values}) > 1:
        return dict(values)
    return {name.partition("/")[2] or name: value for name, value in values.items()}


def _key(one: Measured) -> str:
    """suite:measure for registry.record_evaluation; equal for comparable scores."""
    suites = "+".join(sorted({name.partition("/")[0] for name in one.values}))
    return f"{suites}:{configuration.fingerprint([sorted(map(json.dumps, one.measures)), sorted(one.values)])}"


def measure(folders: Sequence[str]) -> list[Measured]:
    """The scores in transfer's output folders by checkpoint. Raises UserError for missing or failed tasks."""
    from pipeline.transfer.scores import read_scores

    found: dict[str, Measured] = {}
    for folder in folders:
        about, scores = read_scores(folder)
        if about.get("failures") or not scores:
            raise UserError(f"{folder}: some tasks failed; run the transfer again before a promotion")
        one = found.setdefault(about["checkpoint"], Measured(checkpoint=about["checkpoint"]))
        one.run_id = about.get("run_id") or one.run_id
        one.measures.append(_protocols(folder, [score.task for score in scores]))
        for score in scores:
            one.values[f"{about['suite']}/{score.name}"] = score.mean
            one.errors[f"{about['suite']}/{score.name}"] = (score.test, score.error)
    counts = {len(one.values) for one in found.values()}
    if len(counts) > 1:
        raise UserError(
            "the checkpoints have scores for different tasks; in `over`, name transfers that all of them have"
        )
    return list(found.values())


def _protocols(folder: str, tasks: Sequence[str]) -> Any:
    """{task: protocol and fingerprints of its datasets} of a transfer."""
    record = storage.read_record(storage.join(folder, "run.json"), ["tasks"], "run the transfer again")
    return {task: record["tasks"][task] for task in sorted(set(tasks)) if task in record["tasks"]}


def _chosen(one: Measured, metric: str) -> Measured:
    """The scores that the metric selects: all for `mean`, or those of one task."""
    if metric == "mean":
        return one
    names = [name for name in one.values if metric in (name, name.partition("/")[2])]
    if not names:
        tasks = [name.partition("/")[2] for name in one.values]
        raise UserError(f'metric: no score "{metric}"{nearest(metric, tasks)}; scores: mean, {", ".join(tasks)}')
    values = {name: one.values[name] for name in names}
    errors = {name: one.errors[name] for name in names}
    return Measured(
        checkpoint=one.checkpoint, values=values, errors=errors, measures=[*one.measures, metric], run_id=one.run_id
    )
