"""Renders scores as a table, and compares two runs."""

import dataclasses
import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.errors import UserError
from pipeline.lines import table as aligned
from pipeline.transfer.protocols import HEAD_METRICS, FineTune, Probe, TransferTask
from pipeline.transfer.references import published_scores
from pipeline.transfer.scores import Score, error_of_mean, read_scores, vtab_means, without_seen

FLAT_MEAN = "The mean is the flat mean over the nineteen tasks, as in the paper; it is not the mean of the group means."
NUMBER_FORMATS = {"loss": ".4f", "left_out": "d"}
SEEN_IMAGES = (
    "*Without seen images*: without the test images in the decontamination report. Tasks without such images are "
    "included unchanged in the means."
)


def plus_minus(score: Score) -> str:
    return f"{score.mean:.2f} ± {score.std:.2f}" if len(score.values) > 1 else f"{score.mean:.2f}"


def suite_report(
    about: Mapping[str, Any],
    tasks: Sequence[TransferTask],
    scores: Sequence[Score],
    failures: Mapping[str, str],
    others: Mapping[str, Mapping[str, float | None]] | None = None,
) -> str:
    """The report as Markdown: settings, a table with published numbers, means and failures.

    about: values to list at the beginning, including `suite`. failures: {job: error}. others: additional columns,
    {title: {row: top-1}}, including the rows `mean` and `mean <group>`."""
    lines = [f"# Transfer: {about['suite']}", ""]
    lines += [f"- {key}: {value}" for key, value in about.items() if key != "suite" and value is not None]
    protocols = sorted((protocol_text(task.protocol), task.name) for task in tasks)
    for protocol, names in itertools.groupby(protocols, key=lambda pair: pair[0]):
        lines.append(f"- {', '.join(name for _, name in names)}: {protocol}")
    published = published_scores(scores)
    complete_vtab, _ = vtab_means({score.name: score.mean for score in scores})
    if complete_vtab is None:  # published means are over all tasks
        published = {model: {k: v for k, v in row.items() if k != "mean"} for model, row in published.items()}
    references = {**(others or {}), **published}
    clean = any(score.clean is not None for score in scores)
    numbers = [name for name in HEAD_METRICS if any(name in score.details for score in scores)]
    rows = [_score_row(score, numbers, clean, references) for score in scores]
    rows += _mean_rows(scores, numbers, clean, references, complete=not failures)
    corrected = ["without seen images", "removed"] if clean else []
    titles = [HEAD_METRICS[name] for name in numbers]
    header = ["task", "group", "top-1 %", "standard error", *titles, *corrected, "images", "lr", *references]
    used = [any(row[i] for row in rows) for i in range(len(header))] if rows else [True] * len(header)
    lines += ["", *_table(*([*itertools.compress(row, used)] for row in (header, *rows)))]
    if published and complete_vtab is not None:
        lines += ["", FLAT_MEAN]
    if clean:
        lines += ["", SEEN_IMAGES]
    if failures:
        lines += ["", "## Failed", "", *(f"- `{name}`: {error}" for name, error in failures.items())]
    return "\n".join(lines) + "\n"


def protocol_text(protocol: FineTune | Probe) -> str:
    """The kind of a protocol and its settings, in words."""
    settings = {f.name: getattr(protocol, f.name) for f in dataclasses.fields(protocol)}
    kind = settings.pop("kind", "fine-tuning")
    if kind != "fewshot":
        settings.pop("shots", None)
    shown = []
    for name, value in settings.items():
        values = value if isinstance(value, tuple) else (value,)
        shown.append(" ".join([name, *(f"{one:g}" if isinstance(one, float) else str(one) for one in values)]))
    return f"{kind} ({', '.join(shown)})"


def _score_row(
    score: Score, numbers: Sequence[str], clean: bool, references: Mapping[str, Mapping[str, float | None]]
) -> list[str]:
    """numbers: keys of `protocols.HEAD_METRICS`."""
    row = [score.name, score.group, plus_minus(score), f"{score.error:.2f}"]
    row += [show_number(score.details, name) for name in numbers]
    if clean:
        row += [f"{statistics.fmean(score.clean):.2f}" if score.clean else "", str(score.removed or "")]
    row += [str(score.images), f"{score.lr:g}" if score.lr else ""]
    return [*row, *(_cell(reference.get(score.name)) for reference in references.values())]


def show_number(details: Mapping[str, float], name: str) -> str:
    """A number of `protocols.HEAD_METRICS` as text; empty if there is none."""
    if name not in details:
        return ""
    return f"{details[name]:{NUMBER_FORMATS.get(name, '.2f')}}"


def describe(details: Mapping[str, float]) -> list[tuple[str, str]]:
    """(title, text) of the numbers of `protocols.HEAD_METRICS` that a score has."""
    return [(title, show_number(details, name)) for name, title in HEAD_METRICS.items() if name in details]


def _mean_rows(
    scores: Sequence[Score],
    numbers: Sequence[str],
    clean: bool,
    references: Mapping[str, Mapping[str, float | None]],
    complete: bool,
) -> list[list[str]]:
    """Means of VTAB's groups, and the mean of all rows unless a task is missing."""
    rows = []
    empty = [""] * len(numbers)
    flat, groups = vtab_means({score.name: score.mean for score in scores})
    _, clean_groups = vtab_means(without_seen(scores)) if clean else (None, {})
    for group, value in groups.items():
        theirs = [_cell(reference.get(f"mean {group}")) for reference in references.values()]
        corrected = [f"{clean_groups[group]:.2f}", ""] if clean else []
        error = error_of_mean((score.test, score.error) for score in scores if score.group == group)
        rows.append([f"mean {group}", group, f"{value:.2f}", f"{error:.2f}", *empty, *corrected, "", "", *theirs])
    if len(scores) > 1 and (flat is not None or complete):
        theirs = [_cell(reference.get("mean")) for reference in references.values()]
        corrected = [f"{statistics.fmean(without_seen(scores).values()):.2f}", ""] if clean else []
        mean = statistics.fmean(score.mean for score in scores)
        error = error_of_mean((score.test, score.error) for score in scores)
        rows.append(
            [f"**mean of {len(scores)}**", "", f"**{mean:.2f}**", f"{error:.2f}", *empty, *corrected, "", "", *theirs]
        )
    return rows


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _table(header: Sequence[str], *rows: Sequence[str]) -> list[str]:
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]


def compare_runs(first: str, second: str, tracking_uri: str | None = None) -> tuple[str, list[dict[str, Any]]]:
    """(table, rows) of the differences second - first by task, with standard errors. A star marks differences of more
    than two standard errors. Raises UserError if the runs have no task in common."""
    (about_a, scores_a), (about_b, scores_b) = (read_scores(run, tracking_uri) for run in (first, second))
    b_by_name = {score.name: score for score in scores_b}
    rows: list[dict[str, Any]] = []
    table: list[list[str]] = []
    errors: list[tuple[str, float]] = []
    for a in scores_a:
        if b := b_by_name.get(a.name):
            difference, error = b.mean - a.mean, math.hypot(a.error, b.error)
            star = "*" if abs(difference) > 2 * error and difference else ""
            errors.append((a.test, error))
            rows.append({"task": a.name, "first": a.mean, "second": b.mean, "difference": difference, "error": error})
            table.append([a.name, plus_minus(a), plus_minus(b), f"{difference:+.2f}", f"{error:.2f}", star])
    if not rows:
        raise UserError(f"{first} and {second} have no task in common")
    differences = [row["difference"] for row in rows]
    error = error_of_mean(errors)
    mean = statistics.fmean(differences)
    star = "*" if abs(mean) > 2 * error and mean else ""
    firsts, seconds = (f"{statistics.fmean(row[key] for row in rows):.2f}" for key in ("first", "second"))
    table.append([f"mean of {len(rows)}", firsts, seconds, f"{mean:+.2f}", f"{error:.2f}", star])
    lines = aligned([["task", "first", "second", "difference", "std. error", ""], *table])
    heads = [
        f"{label}: {uri} (checkpoint {about.get('checkpoint')})"
        for label, uri, about in (("first", first, about_a), ("second", second, about_b))
    ]
    alone = {score.name for score in scores_a} ^ set(b_by_name)
    tail = [f"only in one of them: {', '.join(sorted(alone))}"] if alone else []
    note = "error: between seeds, or (one seed) of a test set of that size; scores on the same images count as dependent; * more than two standard errors"
    return "\n".join([*heads, "", lines, "", note, *tail]), rows
