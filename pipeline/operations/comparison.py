"""A leaderboard across pre-training runs: transfer score against what the pre-training cost (paper, Figure 5)."""

import dataclasses
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline import storage
from pipeline.errors import UserError
from pipeline.tracking import names
from pipeline.tracking.search import RunInfo, search_runs

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GROUPS = ("natural", "specialized", "structured")


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One transfer result with the pre-training run behind it. Scores are top-1 in percent; None is unknown."""

    suite: str
    name: str
    variant: str | None
    checkpoint: str
    images_seen: float | None
    train_flops: float | None
    gpu_hours: float | None
    mean: float
    groups: dict[str, float]
    tasks: dict[str, float]
    data: str | None
    pretrain_run: str | None
    pretrain_url: str | None
    pretrain_path: str | None
    transfer_run: str
    transfer_url: str
    transfer_path: str


def leaderboard(*, suite: str | None = None, uri: str | None = None) -> list[Row]:
    """Every finished transfer result, best first within its suite; of repeated ones (same checkpoint and suite) the newest.

    Raises UserError when nothing has been transferred yet.
    """
    pretrained = {run.id: run for run in search_runs(names.PRETRAIN, uri=uri)}
    rows: dict[tuple[str, str], Row] = {}
    for run in search_runs(names.TRANSFER, uri=uri):  # newest first
        if names.PARENT in run.tags or not any(key.startswith(names.SCORE) for key in run.metrics):
            continue
        row = _row(run, _source(run, pretrained))
        if suite in (None, run.params.get("suite")):
            rows.setdefault((row.suite, row.checkpoint), row)
    if not rows:
        what = f'of suite "{suite}" ' if suite else ""
        raise UserError(f"no transfer run {what}with scores yet; run jobs/transfer.py first, or set --tracking-uri")
    return sorted(rows.values(), key=lambda row: (row.suite, -row.mean))


def _source(run: RunInfo, pretrained: dict[str, RunInfo]) -> RunInfo | None:
    """The pre-training run of a transfer run: by its lineage tag, else the one whose output holds the checkpoint."""
    linked = pretrained.get(run.tags.get(names.LINEAGE + "pretrain", ""))
    if linked:
        return linked
    checkpoint = run.tags.get(names.CHECKPOINT) or run.params.get("checkpoint", "")
    for candidate in pretrained.values():
        output = candidate.params.get("runtime.output")
        if output and (storage.normalise(checkpoint) + "/").startswith(storage.normalise(output) + "/"):
            return candidate
    return None


def _row(run: RunInfo, source: RunInfo | None) -> Row:
    checkpoint = run.tags.get(names.CHECKPOINT) or run.params.get("checkpoint", "")
    images = _images_seen(checkpoint, source)
    tasks = {key.removeprefix(names.SCORE): v for key, v in sorted(run.metrics.items()) if key.startswith(names.SCORE)}
    suite = run.params.get("suite", "unknown")
    if names.MEAN_SCORE not in run.metrics:  # only some of its tasks: no rival for those that have all
        suite = f"{suite}, some tasks"
    return Row(
        suite=suite,
        name=source.name if source else checkpoint.rstrip("/").rpartition("/")[2] or run.name,
        variant=source.params.get("model.variant") if source else run.params.get("variant"),
        checkpoint=checkpoint,
        images_seen=images,
        train_flops=_train_flops(source, images),
        gpu_hours=source.metrics.get(names.GPU_HOURS) if source else None,
        mean=run.metrics.get(names.MEAN_SCORE, statistics.fmean(tasks.values())),
        groups={g: run.metrics[names.GROUP_SCORE + g] for g in GROUPS if names.GROUP_SCORE + g in run.metrics},
        tasks=tasks,
        data=source.tags.get(f"{names.DATA_FINGERPRINT}.train") if source else None,
        pretrain_run=source.id if source else None,
        pretrain_url=source.url if source else None,
        pretrain_path=source.path if source else None,
        transfer_run=run.id,
        transfer_url=run.url,
        transfer_path=run.path,
    )


def _images_seen(checkpoint: str, source: RunInfo | None) -> float | None:
    """Of the checkpoint itself (an early one of a long run cost less), else of the whole run."""
    try:
        return float(storage.read_json(storage.join(checkpoint, "COMMIT.json"))["images_seen"])
    except (OSError, UserError, KeyError, TypeError):  # moved, another machine's disk, or not ours
        return source.metrics.get(names.IMAGES_SEEN) if source else None


def _train_flops(source: RunInfo | None, images: float | None) -> float | None:
    """3 x forward x images: what was computed for these weights. Restarts repeat steps; that is not the model's cost."""
    if source is None or images is None:
        return None
    try:
        from models.cost import flops

        config = {
            "variant": source.params["model.variant"],
            "num_classes": 1000,
            "image_size": int(source.params["image_size"]),
        }
        if source.params.get("model.depth", "None") != "None":
            config["depth"] = int(source.params["model.depth"])
        return 3.0 * flops(config, patch_keep_rate=float(source.params.get("patch_keep_rate", 1.0))) * images
    except (KeyError, ValueError, UserError):
        return source.metrics.get(names.TRAIN_FLOPS)


# ---------------------------------------------------------------- written forms


def to_markdown(rows: list[Row], limit: int | None = None, inside: bool = False) -> str:
    """One table a suite, best first; names link to the runs when the server has addresses.

    inside: links for MLflow's own pages, whatever the server's address. limit: rows a suite at most.
    """
    lines = ["# Transfer scores by pre-training run", ""]
    for suite in dict.fromkeys(row.suite for row in rows):
        part = [row for row in rows if row.suite == suite][:limit]
        groups = [group for group in GROUPS if any(group in row.groups for row in part)]
        head = ["#", "pre-training", "model", "images seen", "exaFLOPs", "GPU hours", "mean", *groups, "transfer"]
        lines += [f"## {suite}", "", _line(head), _line(["---:", "---", "---", *["---:"] * (4 + len(groups)), "---"])]
        for rank, row in enumerate(part, 1):
            pretrain, transfer = (
                (row.pretrain_path, row.transfer_path) if inside else (row.pretrain_url, row.transfer_url)
            )
            cells = [str(rank), _link(row.name, pretrain), row.variant or "–", _si(row.images_seen)]
            cells += [
                _exa(row.train_flops),
                f"{row.gpu_hours:.1f}" if row.gpu_hours else "–",
                f"{row.mean:.2f}",
            ]
            cells += [f"{row.groups[group]:.2f}" if group in row.groups else "–" for group in groups]
            lines.append(_line([*cells, _link(row.transfer_run[:8], transfer)]))
        lines.append("")
    return "\n".join(lines)


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
    """Score against pre-training compute on a log axis, a panel per suite; None when no row's compute is known.

    Marks tell the families apart as in the paper: ViT circles, hybrids squares, ResNets triangles. Checkpoints of one
    run are joined by a line: its learning curve.
    """
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
        # The last checkpoint of a run carries its name, above the point on one side and below it on the next.
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
        panel.set_title(f"{suite} ({len(part[0].tasks)} tasks)" if part[0].tasks else suite)
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
