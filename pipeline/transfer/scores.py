"""Computes scores from results, and reads and writes scores.json."""

import math
import re
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from models.probes import best_by_mean_rank
from pipeline import storage
from pipeline.errors import UserError
from pipeline.tracking import artifacts
from pipeline.transfer.corrections import read_real_labels, real_labels
from pipeline.transfer.jobs import Job, Result, final_jobs
from pipeline.transfer.predictions import Hits, Predictions
from pipeline.transfer.protocols import HEAD_METRICS, L2_GRID, SEEDLESS, Probe, TransferTask
from pipeline.transfer.store import Store
from pipeline.transfer.suites import VTAB_GROUPS
from pipeline.vtab.tasks import TABLE as VTAB

SCORES = "scores.json"
RUN_ID = re.compile("(?:runs:/)?([0-9a-f]{32})")  # MLflow's


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """Top-1 of a task in percent, per seed. clean: without test images that occur in the pre-training data."""

    name: str
    task: str
    group: str
    values: tuple[float, ...]
    images: int
    test: str
    """The test images (`find_test_images`). The errors of scores on the same images are not independent."""
    lr: float | None = None
    clean: tuple[float, ...] | None = None
    removed: int = 0
    details: dict[str, float] = field(default_factory=dict)
    """More numbers of the suite head (`protocols.HEAD_METRICS`)."""

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def std(self) -> float:
        """Standard deviation between seeds (n - 1); 0 for one seed."""
        return statistics.stdev(self.values) if len(self.values) > 1 else 0.0

    @property
    def error(self) -> float:
        """Standard error of the mean: from the seeds if there are several, otherwise from the size of the test set."""
        if len(self.values) > 1:
            return self.std / len(self.values) ** 0.5
        p = self.mean / 100
        return 100 * math.sqrt(p * (1 - p) / max(1, self.images))


def collect_scores(
    tasks: Sequence[TransferTask],
    seeds: int,
    results: Mapping[str, Result],
    store: Store,
    *,
    l2: float,
    seen: Mapping[str, frozenset[str]],
) -> list[Score]:
    """The scores of every task whose final jobs are all done, in the order of the suite.

    l2: strength for few-shot; 0 chooses the best by mean rank. seen: {task: keys of test images in the pre-training
    data}.
    """
    done = {task: final_jobs(task, seeds, results) for task in tasks}
    complete = {
        task: jobs
        for task, jobs in done.items()
        if len(jobs) >= (1 if isinstance(task.protocol, Probe) and task.protocol.kind in SEEDLESS else seeds)
    }
    column = {shots: _l2_column(tasks, done, results, shots, l2) for shots in _all_shots(tasks)}
    scores: list[Score] = []
    for task, jobs in complete.items():
        found = [results[job.name] for job in jobs]
        keys = seen.get(task.name, frozenset())
        if isinstance(task.protocol, Probe) and task.protocol.kind == "fewshot":
            hits = [store.hits(job) for job in jobs] if keys else []
            scores += [_few_shot_score(task, shots, column[shots], found, hits, keys) for shots in task.protocol.shots]
        else:
            predictions = [store.predictions(job) for job in jobs] if keys or task.real_labels else []
            scores += _task_scores(task, found, predictions, keys)
    return scores


def _few_shot_score(
    task: TransferTask, shots: int, column: int, found: list[Result], hits: list[Hits], seen: frozenset[str]
) -> Score:
    """column: index of the chosen l2 in L2_GRID."""
    return Score(
        name=f"{task.name}-{shots}",
        task=task.name,
        group=task.group,
        values=tuple(result.details[str(shots)][column] for result in found),
        images=found[0].images,
        test=find_test_images(task),
        clean=tuple(h.accuracy(shots, column, without=seen) for h in hits) if seen else None,
        removed=sum(key in seen for key in hits[0].keys) if seen else 0,
    )


def _task_scores(
    task: TransferTask, found: list[Result], predictions: list[Predictions], seen: frozenset[str]
) -> list[Score]:
    """The score of a task and, if requested, its score by ReaL labels. predictions: needed for ReaL labels and
    `seen`."""
    about: dict[str, Any] = {"task": task.name, "group": task.group, "lr": found[0].lr or None}
    about["test"] = find_test_images(task)
    if seen:
        about["removed"] = sum(key in seen for key in predictions[0].keys)
    clean = tuple(p.accuracy(without=seen) for p in predictions) if seen else None
    values = tuple(result.accuracy[""] for result in found)
    numbers = {name: found[0].details[name] for name in HEAD_METRICS if name in found[0].details}
    scores = [Score(name=task.name, values=values, images=found[0].images, clean=clean, details=numbers, **about)]
    if task.real_labels:
        real = read_real_labels(task.real_labels)
        relabelled = [p.with_labels(real_labels(p.keys, real)) for p in predictions]
        clean = tuple(p.accuracy(without=seen) for p in relabelled) if seen else None
        values = tuple(p.accuracy() for p in relabelled)
        images = int(relabelled[0].labelled().sum())
        scores.append(Score(name=f"{task.name}-real", values=values, images=images, clean=clean, **about))
    return scores


def _all_shots(tasks: Sequence[TransferTask]) -> list[int]:
    probes = [task.protocol for task in tasks if isinstance(task.protocol, Probe) and task.protocol.kind == "fewshot"]
    return sorted({shots for probe in probes for shots in probe.shots})


def _l2_column(
    tasks: Sequence[TransferTask],
    done: Mapping[TransferTask, list[Job]],
    results: Mapping[str, Result],
    shots: int,
    l2: float,
) -> int:
    """The index in L2_GRID for a number of shots: that of `l2`, or for 0 the best by mean rank over the tasks."""
    if l2:
        return L2_GRID.index(l2)
    rows = [
        np.mean([results[job.name].details[str(shots)] for job in done[task]], axis=0)
        for task in tasks
        if done[task] and isinstance(task.protocol, Probe) and shots in task.protocol.shots
        if task.protocol.kind == "fewshot"
    ]
    return best_by_mean_rank(np.array(rows)) if rows else 0


def vtab_means(scores: Mapping[str, float]) -> tuple[float | None, dict[str, float]]:
    """(flat mean over VTAB's nineteen tasks, {group: mean}). The flat mean is VTAB's score: 77.63 for H/14.

    The mean of the three group means is a different number (79.57), which some papers print. If a task is missing, the
    flat mean is None, and its group has no entry."""
    groups = {
        group: statistics.fmean(scores[name] for name in names)
        for group, names in VTAB_GROUPS.items()
        if all(name in scores for name in names)
    }
    flat = (
        statistics.fmean(scores[n] for names in VTAB_GROUPS.values() for n in names)
        if len(groups) == len(VTAB_GROUPS)
        else None
    )
    return flat, groups


def find_test_images(task: TransferTask) -> str:
    """An identifier of the test images of a task: the address of their dataset. Tasks of VTAB that label the same
    images, such as clevr_count and clevr_distance, have the same one."""
    folders = task.test.uri.split("/")
    return "/".join(VTAB[name].dataset if name in VTAB else name for name in folders)


def standard_error(scores: Sequence[Score]) -> float:
    """Standard error of the mean of the scores, in points (`error_of_mean`)."""
    return error_of_mean((score.test, score.error) for score in scores)


def error_of_mean(errors: Iterable[tuple[str, float]]) -> float:
    """Standard error of a mean. errors: (test images, standard error) of each value.

    Values on the same images are not independent: a model that finds these images easy does well in all of them. Their
    correlation is unknown, so it is taken to be 1, which makes the result an upper bound; values on different images
    are independent. Var(sum of x) = sum of Cov(x, y) <= (sum of the errors)^2 within the same images."""
    sums: defaultdict[str, list[float]] = defaultdict(list)
    for images, error in errors:
        sums[images].append(error)
    return math.hypot(*map(sum, sums.values())) / sum(map(len, sums.values()))


def without_seen(scores: Sequence[Score]) -> dict[str, float]:
    """{row: accuracy without test images that occur in the pre-training data}; rows
    without such images are unchanged."""
    return {score.name: statistics.fmean(score.clean or score.values) for score in scores}


# ---------------------------------------------------------------- scores.json


def write_scores(
    output: str, about: Mapping[str, Any], scores: Sequence[Score], failures: Mapping[str, str], partial: bool = False
) -> dict:
    """Writes scores.json and returns its content. `mean` is over all rows, or None if a task failed; `partial` is true
    if the suite has more tasks."""
    _, groups = vtab_means({score.name: score.mean for score in scores})
    complete = bool(scores) and not failures
    summary = {
        **about,
        "mean": statistics.fmean(score.mean for score in scores) if complete else None,
        "partial": partial,
        "groups": groups,
        "mean_clean": statistics.fmean(without_seen(scores).values())
        if complete and any(score.clean for score in scores)
        else None,
        "scores": {s.name: {**asdict(s), "mean": s.mean, "std": s.std} for s in scores},
        "failures": dict(failures),
    }
    storage.write_json(storage.join(output, SCORES), summary)
    return summary


def read_scores(run: str, tracking_uri: str | None = None) -> tuple[dict[str, Any], list[Score]]:
    """(summary, scores) of a transfer run, given its output folder or its MLflow
    run id. Raises UserError if there are none."""
    if match := RUN_ID.fullmatch(run):
        uri = artifacts.fetch(f"runs:/{match[1]}/{SCORES}", tracking_uri)
    else:
        uri = run if run.endswith(".json") else storage.join(run, SCORES)
    try:
        summary = storage.read_record(uri, ["scores"], "run the transfer again")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(
            f"{run}: no transfer results ({SCORES} is missing); give the --output of a run, or its id in MLflow"
        ) from error
    try:
        return summary, [_score(entry) for entry in summary["scores"].values()]
    except (TypeError, AttributeError) as error:
        raise UserError(f"{uri}: not the scores of a transfer run ({error}); run the transfer again") from error


def _score(entry: dict[str, Any]) -> Score:
    kept = {key: value for key, value in entry.items() if key in Score.__dataclass_fields__}
    kept |= {key: tuple(kept[key]) for key in ("values", "clean") if kept.get(key)}
    return Score(**kept)
