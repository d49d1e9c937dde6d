"""Renders the leaderboard as text, as Markdown, as JSON, and as a plot of score against compute (figure 5 of the paper)."""

import dataclasses
from typing import TYPE_CHECKING, Any

from pipeline.errors import plural
from pipeline.lines import fit, table
from pipeline.tracking.leaderboard import GROUPS, Row, data_note, differing

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def to_markdown(rows: list[Row], limit: int | None = None, inside: bool = False) -> str:
    """One table per suite, best first. Names link to the runs if the server has a web address.

    inside: relative links, for pages inside MLflow. limit: maximum rows per suite.
    """
    lines = ["# Transfer scores by pre-training run", ""]
    for suite in dict.fromkeys(row.suite for row in rows):
        part = [row for row in rows if row.suite == suite][:limit]
        groups = [group for group in GROUPS if any(group in row.groups for row in part)]
        kinds = differing(part)
        head = [
            "#",
            "pre-training",
            "model",
            *kinds,
            "images seen",
            "exaFLOPs",
            "GPU hours",
            "mean",
            *groups,
            "transfer",
        ]
        note = data_note(part)
        lines += [f"## {suite}", "", *([note, ""] if note else []), _line(head)]
        lines.append(_line(["---:", "---", "---", *["---"] * len(kinds), *["---:"] * (4 + len(groups)), "---"]))
        for rank, row in enumerate(part, 1):
            pretrain, transfer = (
                (row.pretrain_path, row.transfer_path) if inside else (row.pretrain_url, row.transfer_url)
            )
            cells = [str(rank), _link(row.name, pretrain), row.variant or "–"]
            cells += [row.datasets.get(kind, "–") for kind in kinds]
            cells.append(_si(row.images_seen))
            cells += [
                _exa(row.train_flops),
                f"{row.gpu_hours:.1f}" if row.gpu_hours else "–",
                f"{row.mean:.2f}",
            ]
            cells += [f"{row.groups[group]:.2f}" if group in row.groups else "–" for group in groups]
            lines.append(_line([*cells, _link(row.transfer_run[:8], transfer)]))
        lines.append("")
    return "\n".join(lines)


SHORT = {"natural": "natural", "specialized": "special.", "structured": "struct."}


def to_text(rows: list[Row]) -> str:
    """One table per suite, best first, for a terminal of 80 columns."""
    parts = []
    for suite in dict.fromkeys(row.suite for row in rows):
        part = [row for row in rows if row.suite == suite]
        groups = [group for group in GROUPS if any(group in row.groups for row in part)]
        cost = [] if groups else ["images", "GPU h"]  # there is no room for all; --output writes all
        cells = [["#", "pre-training", "model", "exaFLOPs", *cost, "mean %", *(SHORT[group] for group in groups)]]
        for rank, row in enumerate(part, 1):
            spent = [_si(row.images_seen), f"{row.gpu_hours:.1f}" if row.gpu_hours else "–"]
            scores = [f"{row.groups[group]:.2f}" if group in row.groups else "–" for group in groups]
            about = [str(rank), row.name, row.variant or "–", _exa(row.train_flops)]
            cells.append([*about, *(spent if cost else []), f"{row.mean:.2f}", *scores])
        note = data_note(part)
        parts.append(
            "\n".join([f"suite {suite}, top-1 accuracy", table(cells, left=(1, 2)), *([fit(note, 0)] if note else [])])
        )
    return "\n\n".join(parts)


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _link(text: str, url: str | None) -> str:
    return f"[{text}]({url})" if url and url.startswith(("http", "#")) else text


def _si(value: float | None) -> str:
    if value is None:
        return "–"
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f}"


def _exa(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value / 1e18:,.0f}" if value >= 1e20 else f"{value / 1e18:.3g}"


def to_json(rows: list[Row]) -> list[dict[str, Any]]:
    return [dataclasses.asdict(row) for row in rows]


def figure(rows: list[Row]) -> "Figure | None":
    """Score against pre-training compute on a log axis, one panel per suite; None if the compute of all rows is
    unknown.

    Markers as in the paper: circles for ViT, squares for hybrids, triangles for ResNets. A line connects the
    checkpoints of a run."""
    from matplotlib.figure import Figure

    known = [row for row in rows if row.train_flops]
    suites = list(dict.fromkeys(row.suite for row in known))
    if not suites:
        return None
    canvas = Figure(figsize=(6.4 * len(suites), 4.8), layout="constrained", dpi=120)
    panels = canvas.subplots(1, len(suites), squeeze=False)[0]
    for panel, suite in zip(panels, suites, strict=True):
        part = [row for row in known if row.suite == suite]
        for run in dict.fromkeys(row.pretrain_run for row in part):
            curve = sorted((row for row in part if row.pretrain_run == run), key=lambda row: row.train_flops or 0)
            panel.plot([_exaflops(row) for row in curve], [row.mean for row in curve], "-", color="0.75", zorder=1)
        for family, mark, colour in (("ViT", "o", "C0"), ("Hybrid", "s", "C1"), ("ResNet (BiT)", "^", "C2")):
            members = [row for row in part if _family(row.variant) == family]
            if members:
                points = [_exaflops(row) for row in members], [row.mean for row in members]
                panel.scatter(*points, s=70, marker=mark, color=colour, edgecolor="white", label=family, zorder=2)
        # The last checkpoint of a run is labelled, alternately above and below the point.
        best: dict[str | None, Row] = {}
        for row in sorted(part, key=_exaflops):
            best[row.pretrain_run] = row
        for index, row in enumerate(sorted(best.values(), key=_exaflops)):
            text = f"{row.name} ({row.variant})" if row.variant and row.variant not in row.name else row.name
            offset = (0, 9) if index % 2 == 0 else (0, -16)
            at = (_exaflops(row), row.mean)
            panel.annotate(text, at, xytext=offset, textcoords="offset points", ha="center", fontsize=8)
        panel.set_xscale("log")
        panel.set_xlabel("pre-training compute [exaFLOPs]")
        panel.set_ylabel("mean transfer accuracy [%]")
        panel.set_title(f"{suite} ({plural(len(part[0].tasks), 'task')})" if part[0].tasks else suite)
        panel.grid(True, which="both", alpha=0.25)
        panel.margins(x=0.25, y=0.2)
        panel.set_ylim(top=min(100.0, panel.get_ylim()[1]))
        panel.legend(loc="lower right", frameon=False)
    return canvas


def _exaflops(row: Row) -> float:
    return (row.train_flops or 0.0) / 1e18


def _family(variant: str | None) -> str:
    if variant and "+" in variant:
        return "Hybrid"
    return "ResNet (BiT)" if variant and variant.startswith("R") and "/" not in variant else "ViT"
