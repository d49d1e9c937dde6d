"""Figures of a suite, drawn by matplotlib without pyplot, which would need global state and a display."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from pipeline.transfer.jobs import Result
from pipeline.transfer.mistakes import Pair
from pipeline.transfer.references import published_scores
from pipeline.transfer.scores import Score
from pipeline.transfer.suites import VTAB_GROUPS

MARKS = "ovs^D*"
NAME: dict[str, Any] = {"parse_math": False}  # a dollar sign in a name is not a formula
Others = Mapping[str, Mapping[str, float | None]]
"""Additional scores, {title: {row: top-1 in percent}}."""


def score_bars(scores: Sequence[Score], others: Others | None = None) -> Figure:
    """One bar per row, coloured by group, with the standard deviation between seeds. Other and published models are
    marks."""
    figure, axes = _figure(max(6.0, 0.45 * len(scores) + 2.5), 4.4)
    colours = dict(zip(["", *VTAB_GROUPS], ("#4c72b0", "#55a868", "#c44e52", "#8172b2"), strict=True))
    x = np.arange(len(scores))
    bars = axes.bar(x, [score.mean for score in scores], color=[colours[score.group] for score in scores])
    axes.bar_label(bars, [f"{score.mean:.0f}" for score in scores], label_type="center", fontsize=7, color="white")
    if any(score.std for score in scores):
        deviations = [score.std for score in scores]
        axes.errorbar(
            x, [s.mean for s in scores], yerr=deviations, fmt="none", ecolor="black", elinewidth=0.8, capsize=2
        )
    for (model, row), marker in zip({**(others or {}), **published_scores(scores)}.items(), MARKS, strict=False):
        points = [(i, row[score.name]) for i, score in enumerate(scores) if row.get(score.name) is not None]
        if points:
            axes.plot(
                *zip(*points, strict=True),
                marker,
                color="black",
                mfc="white",
                ms=5,
                label=model,
                linestyle="",
                zorder=3,
            )
    axes.set_xticks(x, [score.name for score in scores], rotation=45, ha="right", fontsize=8, **NAME)
    axes.set_ylabel("top-1 accuracy (%)")
    axes.set_ylim(0, 105)
    axes.set_yticks(range(0, 101, 20))
    axes.spines[["top", "right"]].set_visible(False)
    groups = {score.group for score in scores}
    handles = [
        Patch(color=colours[group], label=group or "this model") for group in ("", *VTAB_GROUPS) if group in groups
    ]
    handles += axes.get_legend_handles_labels()[0]
    if len(handles) > 1:
        figure.legend(handles=handles, fontsize=8, ncols=4, loc="outside upper center", frameon=False)
    return figure


def loss_curves(results: Sequence[Result]) -> Figure | None:
    """Training losses of all fine-tuning runs, one plot per task. Trial learning rates are dashed."""
    drawn = [result for result in results if result.curve]
    names = list(dict.fromkeys(result.task for result in drawn))
    if not names:
        return None
    figure, grid = _grid(len(names), 2.8, 2.3)
    for axes, name in zip(grid, names, strict=False):
        for result in (r for r in drawn if r.task == name):
            steps, losses, _ = zip(*result.curve, strict=True)
            style = "--" if result.phase == "tune" else "-"
            axes.plot(steps, losses, style, linewidth=1, label=f"lr {result.lr:g} seed {result.seed}")
        axes.set_title(name, fontsize=9, **NAME)
        axes.tick_params(labelsize=7)
        axes.set_ylim(bottom=0)
        axes.spines[["top", "right"]].set_visible(False)
        if 1 < len(axes.lines) <= 6:
            axes.legend(fontsize=6, frameon=False)
    figure.supxlabel("step", fontsize=9)
    figure.supylabel("training loss (cross-entropy)", fontsize=9)
    return figure


def confusion_matrices(
    results: Sequence[Result], classes: Mapping[str, Sequence[str]], drawn: Sequence[str] | None = None
) -> Figure | None:
    """Confusion matrices (rows: labels, columns: predictions) of the tasks with few classes, summed over seeds.

    classes: {task: class names}. drawn: only these tasks. Numbers are images, colours are fractions of the images of a
    label.
    """
    matrices: dict[str, np.ndarray] = {}
    for result in results:
        if result.confusion and result.phase == "final" and (drawn is None or result.task in drawn):
            matrices[result.task] = matrices.get(result.task, 0) + np.array(result.confusion)
    if not matrices:
        return None
    side = 0.28 * max(len(counts) for counts in matrices.values()) + 1.6
    figure, grid = _grid(len(matrices), max(2.6, side), max(2.4, side - 0.2), columns=3)
    image = None
    for axes, (name, counts) in zip(grid, matrices.items(), strict=False):
        image = _confusion(axes, counts, list(classes.get(name, ())))
        axes.set_title(name, fontsize=9, **NAME)
    if image is not None:
        bar = figure.colorbar(image, ax=grid, shrink=0.7, pad=0.02)
        bar.set_label("fraction of the label's images", fontsize=8)
        bar.ax.tick_params(labelsize=7)
    return figure


def _confusion(axes: Any, counts: np.ndarray, names: list[str]) -> Any:
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    image = axes.imshow(shares, vmin=0, vmax=1, cmap="Blues")
    names = [name if len(name) <= 14 else name[:13] + "…" for name in names] or [str(i) for i in range(len(counts))]
    axes.set_xticks(
        range(len(counts)), names[: len(counts)], fontsize=7, rotation=90 if max(map(len, names)) > 2 else 0, **NAME
    )
    axes.set_yticks(range(len(counts)), names[: len(counts)], fontsize=7, **NAME)
    for row, column in zip(*np.nonzero(counts), strict=True):
        colour = "white" if shares[row, column] > 0.55 else "black"
        axes.text(column, row, counts[row, column], ha="center", va="center", fontsize=6, color=colour)
    axes.set_xlabel("prediction", fontsize=8)
    axes.set_ylabel("label", fontsize=8)
    axes.tick_params(length=0)
    return image


def confused_pairs(pairs: Sequence[Pair]) -> Figure | None:
    """The most confused pairs of classes as bars: the percentage of a label's images with that prediction."""
    if not pairs:
        return None
    figure, axes = _figure(6.4, 0.32 * len(pairs) + 1.1)
    y = np.arange(len(pairs))[::-1]
    bars = axes.barh(y, [100 * pair.share for pair in pairs], color="#4c72b0")
    axes.bar_label(bars, [f"{pair.count} of {pair.images}" for pair in pairs], fontsize=7, padding=3)
    axes.set_yticks(y, [f"{pair.label} → {pair.prediction}" for pair in pairs], fontsize=8, **NAME)
    axes.set_xlabel("% of the label's images", fontsize=8)
    axes.set_title("Most confused: label → prediction", fontsize=9, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.15)
    return figure


def _figure(width: float, height: float) -> Any:
    figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
    return figure, figure.add_subplot()


def _grid(count: int, width: float, height: float, columns: int = 5) -> Any:
    columns = min(columns, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(width * columns + 0.4, height * rows), dpi=130, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for unused in axes[count:]:
        unused.set_axis_off()
    return figure, list(axes[:count])
