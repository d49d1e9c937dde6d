"""Figures of a suite, drawn by matplotlib without pyplot: no global state, no display."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from pipeline.transfer.jobs import Result
from pipeline.transfer.references import published_scores
from pipeline.transfer.scores import Score
from pipeline.transfer.suites import GROUPS


def score_bars(scores: Sequence[Score]) -> Figure:
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
    for (model, row), marker in zip(published_scores(scores).items(), "ovs^D*", strict=False):
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


def loss_curves(results: Sequence[Result]) -> Figure | None:
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


def confusion_matrices(results: Sequence[Result]) -> Figure | None:
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
    figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
    return figure, figure.add_subplot()


def _grid(count: int) -> Any:
    columns = min(5, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(2.4 * columns, 2.1 * rows), dpi=130, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for unused in axes[count:]:
        unused.set_axis_off()
    return figure, list(axes[:count])
