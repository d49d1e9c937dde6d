"""From results to scores, and from scores to a table, figures and a comparison."""

import itertools
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from models.probes import best_by_mean_rank
from pipeline import storage
from pipeline.errors import UserError
from pipeline.tracking import artifacts
from pipeline.transfer.fanout import Job, Result, Store, final_jobs
from pipeline.transfer.suites import GROUPS, L2_GRID, Probe, Task

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SCORES = "scores.json"
RUN_ID = re.compile("(?:runs:/)?([0-9a-f]{32})")  # MLflow's

# The paper's Table 9, VTAB-1k, in the order of GROUPS. Its mean is the flat mean of the nineteen.
TABLE_9 = {
    "ViT-H/14 JFT": (
        *(95.3, 85.5, 75.2, 99.7, 97.2, 65.0, 88.9, 83.3, 96.7, 91.4, 76.6),
        *(91.7, 63.8, 53.1, 79.4, 63.3, 84.5, 33.2, 51.2),
    ),
    "ViT-L/16 JFT": (
        *(95.4, 81.9, 74.3, 99.7, 96.7, 63.5, 87.4, 83.6, 96.5, 89.7, 77.1),
        *(86.4, 63.1, 49.7, 74.5, 60.5, 82.2, 36.2, 51.1),
    ),
    "ViT-L/16 I21k": (
        *(90.8, 84.1, 74.1, 99.3, 92.7, 61.0, 80.9, 82.5, 95.6, 85.2, 75.3),
        *(70.3, 56.1, 41.9, 74.7, 64.9, 79.9, 30.5, 41.7),
    ),
}
# BiT's per-task numbers are not printed: flat mean, and the groups (natural, specialized, structured) of its repository.
BIT = {
    "BiT-L R152x4": (76.29, None, None, None),
    "BiT-M R152x4 (re-run)": (73.51, 80.77, 85.67, 61.08),
    "BiT-M R101x3": (72.65, 80.29, 85.75, 59.40),
}
# Table 2 (JFT columns and L/16 I21k: ImageNet at 512 px with Polyak averaging) and B/16 of Table 5 (384 px, without).
TABLE_2 = {
    "ViT-H/14 JFT": (88.55, 90.72, 99.50, 94.55, 97.56, 99.68),
    "ViT-L/16 JFT": (87.76, 90.54, 99.42, 93.90, 97.32, 99.74),
    "ViT-L/16 I21k": (85.30, 88.62, 99.15, 93.25, 94.67, 99.61),
    "BiT-L R152x4": (87.54, 90.54, 99.37, 93.51, 96.62, 99.63),
    "ViT-B/16 I21k (384 px)": (83.97, 88.35, 98.95, 91.67, 94.43, 99.38),
}
TABLE_2_NAMES = ("imagenet", "imagenet-real", "cifar10", "cifar100", "pets", "flowers102")


# ---------------------------------------------------------------- scores


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """Top-1 in percent of one row of the table, once per seed. `clean`: without images that the pre-training had seen."""

    name: str
    task: str
    group: str
    values: tuple[float, ...]
    images: int
    lr: float | None = None
    clean: tuple[float, ...] | None = None
    removed: int = 0

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def std(self) -> float:
        """Between seeds (n - 1); 0 for a single one."""
        return statistics.stdev(self.values) if len(self.values) > 1 else 0.0

    @property
    def error(self) -> float:
        """Standard error of the mean: of the seeds when there are several, else of the test set's size."""
        if len(self.values) > 1:
            return self.std / len(self.values) ** 0.5
        p = self.mean / 100
        return 100 * math.sqrt(p * (1 - p) / max(1, self.images))


def collect(
    tasks: Sequence[Task],
    seeds: int,
    results: Mapping[str, Result],
    store: Store,
    *,
    l2: float,
    flagged: Mapping[str, frozenset[str]],
) -> list[Score]:
    """The scores of every task whose final jobs are all done, in the order of the suite."""
    scores = []
    done = {task: final_jobs(task, seeds, results) for task in tasks}
    column = {shots: _l2_column(tasks, done, results, shots, l2) for shots in _all_shots(tasks)}
    for task, jobs in done.items():
        if len(jobs) < (1 if isinstance(task.protocol, Probe) and task.protocol.kind == "knn" else seeds):
            continue
        found = [results[job.name] for job in jobs]
        about: dict[str, Any] = {"task": task.name, "group": task.group, "images": found[0].images}
        keys = flagged.get(task.name, frozenset())
        clean: dict[str, Any] = {}
        if isinstance(task.protocol, Probe) and task.protocol.kind == "fewshot":
            hits = [store.hits(job) for job in jobs] if keys else []
            for shots in task.protocol.shots:
                if keys:
                    clean["clean"] = tuple(h.accuracy(shots, column[shots], without=keys) for h in hits)
                    clean["removed"] = sum(key in keys for key in hits[0].keys)
                values = tuple(result.details[str(shots)][column[shots]] for result in found)
                scores.append(Score(name=f"{task.name}-{shots}", values=values, **about, **clean))
            continue
        about["lr"] = found[0].lr or None
        predictions = [store.predictions(job) for job in jobs] if keys or task.real_labels else []
        if keys:
            clean["clean"] = tuple(p.accuracy(without=keys) for p in predictions)
            clean["removed"] = sum(key in keys for key in predictions[0].keys)
        values = tuple(result.accuracy[""] for result in found)
        scores.append(Score(name=task.name, values=values, **about, **clean))
        if task.real_labels:
            real = read_real_labels(task.real_labels)
            relabelled = [p.with_labels(real_labels(p.keys, real)) for p in predictions]
            about["images"] = int(relabelled[0].labelled().sum())
            if keys:
                clean["clean"] = tuple(p.accuracy(without=keys) for p in relabelled)
            scores.append(
                Score(name=f"{task.name}-real", values=tuple(p.accuracy() for p in relabelled), **about, **clean)
            )
    return scores


def _all_shots(tasks: Sequence[Task]) -> list[int]:
    probes = [task.protocol for task in tasks if isinstance(task.protocol, Probe) and task.protocol.kind == "fewshot"]
    return sorted({shots for probe in probes for shots in probe.shots})


def _l2_column(
    tasks: Sequence[Task], done: Mapping[Task, list[Job]], results: Mapping[str, Result], shots: int, l2: float
) -> int:
    """Which of L2_GRID counts for a number of shots: the given one, or (0) the best by mean rank over the tasks."""
    if l2:
        return L2_GRID.index(l2)
    rows = [
        np.mean([results[job.name].details[str(shots)] for job in done[task]], axis=0)
        for task in tasks
        if done[task] and isinstance(task.protocol, Probe) and shots in task.protocol.shots
        if task.protocol.kind == "fewshot"
    ]
    return best_by_mean_rank(np.array(rows)) if rows else 0


def means(scores: Mapping[str, float]) -> tuple[float | None, dict[str, float]]:
    """VTAB's score, the FLAT mean over its nineteen tasks (77.63 for H/14), and the means of the groups.

    The mean of the three group means is another number (79.57), which some papers print: it is not offered. None, and no
    entry for a group, while a task is missing.
    """
    groups = {
        group: statistics.fmean(scores[name] for name in names)
        for group, names in GROUPS.items()
        if all(name in scores for name in names)
    }
    flat = (
        statistics.fmean(scores[n] for names in GROUPS.values() for n in names) if len(groups) == len(GROUPS) else None
    )
    return flat, groups


def spread(scores: Sequence[Score]) -> float:
    """Standard error of the mean over the rows."""
    return math.sqrt(sum(score.error**2 for score in scores)) / len(scores)


def without_seen(scores: Sequence[Score]) -> dict[str, float]:
    """Every row's accuracy without the test images that the pre-training had seen; a row without any as it is."""
    return {score.name: statistics.fmean(score.clean or score.values) for score in scores}


# ---------------------------------------------------------------- ReaL, contamination


def read_real_labels(uri: str) -> list[list[int]]:
    """ImageNet-ReaL's real.json: for each of the 50,000 validation images, in order, its labels (arXiv 2006.07159)."""
    labels = storage.read_json(uri)
    if not isinstance(labels, list) or not all(isinstance(entry, list) for entry in labels):
        raise UserError(f"{uri}: not ImageNet-ReaL's real.json (a list of label lists)")
    return labels


def real_labels(keys: Sequence[str], real: Sequence[Sequence[int]]) -> np.ndarray:
    """Labels (N,M), padded with -1, of validation images: ILSVRC2012_val_00000001 has entry 0.

    Images with an empty list are left out of the accuracy. Raises UserError for a key without such a number.
    """
    width = max(1, max(map(len, real)))
    labels = np.full((len(keys), width), -1, np.int64)
    for row, key in zip(labels, keys, strict=True):
        match = re.search(r"ILSVRC2012_val_(\d{8})", key)
        if not match or not 1 <= int(match[1]) <= len(real):
            raise UserError(f'"{key}" is no image of the ImageNet validation set, which ReaL labels are for')
        entry = real[int(match[1]) - 1]
        row[: len(entry)] = entry
    return labels


# ---------------------------------------------------------------- tables


def plus_minus(score: Score) -> str:
    return f"{score.mean:.2f} ± {score.std:.2f}" if len(score.values) > 1 else f"{score.mean:.2f}"


def markdown(
    about: Mapping[str, Any], tasks: Sequence[Task], scores: Sequence[Score], failures: Mapping[str, str]
) -> str:
    """The report: what was run, the table against the paper, means, failures."""
    lines = [f"# Transfer: {about['suite']}", ""]
    lines += [f"- {key}: {value}" for key, value in about.items() if key != "suite" and value is not None]
    for protocol, names in itertools.groupby(
        sorted((repr(task.protocol), task.name) for task in tasks), key=lambda pair: pair[0]
    ):
        lines.append(f"- protocol of {', '.join(name for _, name in names)}: `{protocol}`")
    references = _references(scores)
    clean = any(score.clean is not None for score in scores)
    header = [
        "task",
        "group",
        "top-1 %",
        *(["without seen images", "removed"] if clean else []),
        "images",
        "lr",
        *references,
    ]
    rows = []
    for score in scores:
        row = [score.name, score.group, plus_minus(score)]
        if clean:
            row += [f"{statistics.fmean(score.clean):.2f}" if score.clean else "", str(score.removed or "")]
        row += [str(score.images), f"{score.lr:g}" if score.lr else ""]
        rows.append([*row, *(_cell(reference.get(score.name)) for reference in references.values())])
    flat, groups = means({score.name: score.mean for score in scores})
    _, clean_groups = means(without_seen(scores)) if clean else (None, {})
    for group, value in groups.items():
        theirs = [_cell(reference.get(f"mean {group}")) for reference in references.values()]
        beside = [f"{clean_groups[group]:.2f}", ""] if clean else []
        rows.append([f"mean {group}", group, f"{value:.2f}", *beside, "", "", *theirs])
    if scores and (flat is not None or not failures):
        theirs = [_cell(reference.get("mean")) if flat is not None else "" for reference in references.values()]
        beside = [f"{statistics.fmean(without_seen(scores).values()):.2f}", ""] if clean else []
        mean = statistics.fmean(score.mean for score in scores)
        rows.append([f"**mean of {len(scores)}**", "", f"**{mean:.2f}**", *beside, "", "", *theirs])
    lines += ["", *_table(header, rows)]
    if references and flat is not None:
        lines += [
            "",
            "The mean is the flat mean over the nineteen tasks, as in the paper; it is not the mean of the group means.",
        ]
    if clean:
        lines += [
            "",
            "*Without seen images*: test images that the decontamination report flags are left out; a task without any "
            "enters the means as it is.",
        ]
    if failures:
        lines += ["", "## Failed", "", *(f"- `{name}`: {error}" for name, error in failures.items())]
    return "\n".join(lines) + "\n"


def _references(scores: Sequence[Score]) -> dict[str, dict[str, float | None]]:
    """Published numbers for the rows at hand, by model: {row: top-1 or None}."""
    names = {score.name for score in scores}
    vtab = [name for group in GROUPS.values() for name in group]
    references: dict[str, dict[str, float | None]] = {}
    if any(score.group in GROUPS for score in scores):
        for model, row in TABLE_9.items():
            values: dict[str, float | None] = dict(zip(vtab, row, strict=True))
            flat, groups = means(dict(zip(vtab, row, strict=True)))
            references[model] = values | {"mean": flat} | {f"mean {group}": mean for group, mean in groups.items()}
        for model, bit in BIT.items():
            references[model] = dict(zip(("mean", *(f"mean {group}" for group in GROUPS)), bit, strict=True))
    elif names & set(TABLE_2_NAMES):
        for model, tops in TABLE_2.items():
            references[model] = dict(zip(TABLE_2_NAMES, tops, strict=True))
    return references


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]


# ---------------------------------------------------------------- figures


def bars(scores: Sequence[Score]) -> "Figure":
    """One bar per row, coloured by group, with the deviation between seeds and, for VTAB, the paper's models as marks."""
    figure, axes = _figure(max(5.0, 0.45 * len(scores) + 2), 4.2)
    colours = dict(zip(["", *GROUPS], ("#4c72b0", "#55a868", "#c44e52", "#8172b2"), strict=True))
    x = np.arange(len(scores))
    axes.bar(x, [score.mean for score in scores], color=[colours[score.group] for score in scores])
    if any(score.std for score in scores):
        deviations = [score.std for score in scores]
        axes.errorbar(
            x, [s.mean for s in scores], yerr=deviations, fmt="none", ecolor="black", elinewidth=0.8, capsize=2
        )
    for (model, row), marker in zip(_references(scores).items(), "ovs^D*", strict=False):
        points = [(i, row[score.name]) for i, score in enumerate(scores) if row.get(score.name) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), marker, color="black", markersize=3.5, label=model, linestyle="")
    axes.set_xticks(x, [score.name for score in scores], rotation=60, ha="right", fontsize=8)
    axes.set_ylabel("top-1 (%)")
    axes.set_ylim(0, 100)
    for spine in ("top", "right"):
        axes.spines[spine].set_visible(False)
    groups = {score.group for score in scores if score.group}
    for group in (g for g in GROUPS if g in groups):
        axes.bar([0], [0], color=colours[group], label=group)
    if axes.get_legend_handles_labels()[0]:
        figure.legend(fontsize=7, ncols=6, loc="outside upper center", frameon=False)
    return figure


def curves(results: Sequence[Result]) -> "Figure | None":
    """Training loss of every fine-tuning, one small plot per task; trial learning rates are dashed."""
    drawn = [result for result in results if result.curve]
    names = list(dict.fromkeys(result.task for result in drawn))
    if not names:
        return None
    figure, grid = _grid(len(names))
    for axes, name in zip(grid, names, strict=False):
        for result in (r for r in drawn if r.task == name):
            steps, losses, _ = zip(*result.curve, strict=True)
            style = "--" if result.phase == "tune" else "-"
            axes.plot(steps, losses, style, linewidth=1, label=f"lr {result.lr:g} seed {result.seed}")
        axes.set_title(name, fontsize=8)
        axes.tick_params(labelsize=6)
        axes.set_ylim(bottom=0)
        if 1 < len(axes.lines) <= 6:
            axes.legend(fontsize=5)
    figure.supxlabel("step", fontsize=8)
    figure.supylabel("training loss", fontsize=8)
    return figure


def confusions(results: Sequence[Result]) -> "Figure | None":
    """Confusion matrices (rows: label) of the tasks with few classes, added up over seeds."""
    matrices: dict[str, np.ndarray] = {}
    for result in results:
        if result.confusion and result.phase == "final":
            matrices[result.task] = matrices.get(result.task, 0) + np.array(result.confusion)
    if not matrices:
        return None
    figure, grid = _grid(len(matrices))
    for axes, (name, counts) in zip(grid, matrices.items(), strict=False):
        shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
        axes.imshow(shares, vmin=0, vmax=1, cmap="Blues")
        axes.set_title(name, fontsize=8)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_xlabel("prediction", fontsize=6)
        axes.set_ylabel("label", fontsize=6)
    return figure


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure  # no pyplot: no global state, no display

    figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
    return figure, figure.add_subplot()


def _grid(count: int) -> Any:
    from matplotlib.figure import Figure

    columns = min(5, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(2.4 * columns, 2.1 * rows), dpi=130, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for unused in axes[count:]:
        unused.set_axis_off()
    return figure, list(axes[:count])


# ---------------------------------------------------------------- comparison


def write_scores(
    output: str, about: Mapping[str, Any], scores: Sequence[Score], failures: Mapping[str, str], partial: bool = False
) -> dict:
    """scores.json. `mean` is over all rows, None when a task failed; `partial` says that the suite has more tasks."""
    _, groups = means({score.name: score.mean for score in scores})
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
    """What a transfer run wrote, by its output folder or MLflow's id. Raises UserError when there is none at `run`."""
    if match := RUN_ID.fullmatch(run):
        uri = artifacts.fetch(f"runs:/{match[1]}/{SCORES}", tracking_uri)
    else:
        uri = run if run.endswith(".json") else storage.join(run, SCORES)
    try:
        summary = storage.read_json(uri)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(
            f"{run}: no transfer results here ({SCORES} is missing); give the --output of a run, or its id in MLflow"
        ) from error
    scores = []
    for entry in summary["scores"].values():
        kept = {key: value for key, value in entry.items() if key in Score.__dataclass_fields__}
        kept |= {key: tuple(kept[key]) for key in ("values", "clean") if kept.get(key)}
        scores.append(Score(**kept))
    return summary, scores


def compare(first: str, second: str, tracking_uri: str | None = None) -> tuple[str, list[dict[str, Any]]]:
    """The differences second - first, task by task, each with its standard error; a star marks more than two of them."""
    (about_a, scores_a), (about_b, scores_b) = (read_scores(run, tracking_uri) for run in (first, second))
    b_by_name = {score.name: score for score in scores_b}
    rows: list[dict[str, Any]] = []
    table: list[list[str]] = []
    for a in scores_a:
        if b := b_by_name.get(a.name):
            difference, error = b.mean - a.mean, math.hypot(a.error, b.error)
            star = "*" if abs(difference) > 2 * error and difference else ""
            rows.append({"task": a.name, "first": a.mean, "second": b.mean, "difference": difference, "error": error})
            table.append([a.name, plus_minus(a), plus_minus(b), f"{difference:+.2f}", f"{error:.2f}", star])
    if not rows:
        raise UserError(f"{first} and {second} have no task in common")
    differences = [row["difference"] for row in rows]
    error = math.sqrt(sum(row["error"] ** 2 for row in rows)) / len(rows)
    mean = statistics.fmean(differences)
    star = "*" if abs(mean) > 2 * error and mean else ""
    firsts, seconds = (f"{statistics.fmean(row[key] for row in rows):.2f}" for key in ("first", "second"))
    table.append([f"mean of {len(rows)}", firsts, seconds, f"{mean:+.2f}", f"{error:.2f}", star])
    lines = _table(["task", "first", "second", "difference", "std. error", ""], table)
    heads = [
        f"{label}: {uri} (checkpoint {about.get('checkpoint')})"
        for label, uri, about in (("first", first, about_a), ("second", second, about_b))
    ]
    alone = {score.name for score in scores_a} ^ set(b_by_name)
    tail = [f"only in one of them: {', '.join(sorted(alone))}"] if alone else []
    note = "error: between seeds, or (one seed) of a test set of that size; * more than two standard errors"
    return "\n".join([*heads, "", *lines, "", note, *tail]), rows
