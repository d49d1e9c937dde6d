"""Transfer results with their pre-training runs: score, images seen and compute (paper, Figure 5)."""

import collections
import functools
import hashlib
import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from pipeline import storage
from pipeline.address import data_name
from pipeline.credentials import redacted
from pipeline.errors import UserError
from pipeline.tracking import names
from pipeline.tracking.description import checkpoint_name
from pipeline.tracking.search import RunInfo, read_runs
from pipeline.tracking.server import resolve_tracking_uri

TRAINING, VALIDATION, DECONTAMINATION = "training data", "validation data", "decontamination"
EVALUATION = "evaluation data"
GROUPS = ("natural", "specialized", "structured")


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One transfer result with its pre-training run. Scores are top-1 in percent; None means unknown."""

    suite: str
    started: int
    """When the transfer run started, in milliseconds since 1970."""
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
    """Fingerprint of the pre-training data."""
    data_name: str | None
    datasets: dict[str, str]
    """What the run was trained, validated and evaluated on, by TRAINING, VALIDATION, DECONTAMINATION and EVALUATION:
    names with fingerprints. Without what is unknown."""
    spread: float | None
    """Standard error of the mean, in points."""
    config: dict[str, str]
    """The parameters of the pre-training that affect its results (all but the runtime settings)."""
    pretrain_run: str | None
    pretrain_url: str | None
    pretrain_path: str | None
    transfer_run: str
    transfer_url: str
    transfer_path: str


def leaderboard(*, suite: str | None = None, uri: str | None = None) -> list[Row]:
    """Every finished transfer result, best first within its suite. Only the newest result per checkpoint, suite and
    evaluation data is listed.

    Raises UserError if there are no results.
    """
    pretrained = _Pretrained(read_runs(names.PRETRAIN, uri=uri))
    rows: dict[tuple[str, str, str], Row] = {}
    for run in read_runs(names.TRANSFER, with_param="suite", uri=uri):  # parents, newest first
        if not any(key.startswith(names.SCORE) for key in run.metrics):
            continue
        row = _row(run, pretrained.source(run))
        if suite in (None, run.params.get("suite")):
            rows.setdefault((row.suite, row.checkpoint, row.datasets.get(EVALUATION, "")), row)
    if not rows:
        where = redacted(resolve_tracking_uri(uri))
        what = f'of suite "{suite}" ' if suite else ""
        raise UserError(
            f"no transfer run {what}with scores yet in {where}; run jobs/transfer.py first, or set --tracking-uri"
        )
    return sorted(by_evaluation_data(rows.values()), key=lambda row: (row.suite, -row.mean))


def by_evaluation_data(rows: Iterable[Row]) -> list[Row]:
    """The rows, with the evaluation data in the name of each suite that has scores on different data, as these are not
    comparable."""
    rows, sets = list(rows), collections.defaultdict(set)
    for row in rows:
        sets[row.suite].add(row.datasets.get(EVALUATION))
    return [
        replace(row, suite=f"{row.suite} on {row.datasets[EVALUATION]}")
        if EVALUATION in row.datasets and len(sets[row.suite] - {None}) > 1
        else row
        for row in rows
    ]


class _Pretrained:
    """The pre-training runs of a server, by id and by the folder that they write."""

    def __init__(self, runs: Iterable[RunInfo]):
        self.by_id: dict[str, RunInfo] = {}
        self.by_output: dict[str, RunInfo] = {}
        for run in runs:  # newest first: the newest of several runs in one folder is used
            self.by_id[run.id] = run
            if output := run.tags.get(names.PLACE + "runtime.output"):
                self.by_output.setdefault(storage.normalise(output), run)

    def source(self, transfer: RunInfo) -> RunInfo | None:
        """The run that produced the checkpoint of a transfer run, found by lineage tag
        or else by the checkpoint's folder."""
        linked = self.by_id.get(transfer.tags.get(names.LINEAGE + "pretrain", ""))
        if linked:
            return linked
        folder = storage.normalise(transfer.tags.get(names.CHECKPOINT, ""))
        while folder not in self.by_output and "/" in folder:
            folder = folder.rpartition("/")[0]
        return self.by_output.get(folder)


def _row(run: RunInfo, source: RunInfo | None) -> Row:
    checkpoint = run.tags.get(names.CHECKPOINT, "")
    images = _images_seen(run, checkpoint, source)
    tasks = {key.removeprefix(names.SCORE): v for key, v in sorted(run.metrics.items()) if key.startswith(names.SCORE)}
    suite = run.params.get("suite", "unknown")
    if names.MEAN_SCORE not in run.metrics:  # not comparable with results of all tasks
        suite = f"{suite}, some tasks"
    return Row(
        suite=suite,
        started=run.start_time,
        name=source.name if source else _name(run, checkpoint),
        variant=source.params.get("model.variant") if source else run.tags.get(names.VARIANT),
        checkpoint=checkpoint,
        images_seen=images,
        train_flops=_train_flops(source, images),
        gpu_hours=source.metrics.get(names.GPU_HOURS) if source else None,
        mean=run.metrics.get(names.MEAN_SCORE, statistics.fmean(tasks.values())),
        groups={g: run.metrics[names.GROUP_SCORE + g] for g in GROUPS if names.GROUP_SCORE + g in run.metrics},
        tasks=tasks,
        data=source.tags.get(f"{names.DATA_FINGERPRINT}.train") if source else None,
        data_name=data_name(source.tags.get(f"{names.DATA_URI}.train", "")) if source else None,
        datasets=_datasets(run, source),
        spread=run.metrics.get(names.MEAN_ERROR),
        config={k: v for k, v in source.params.items() if not k.startswith("runtime.")} if source else {},
        pretrain_run=source.id if source else None,
        pretrain_url=source.url if source else None,
        pretrain_path=source.path if source else None,
        transfer_run=run.id,
        transfer_url=run.url,
        transfer_path=run.path,
    )


def _datasets(run: RunInfo, source: RunInfo | None) -> dict[str, str]:
    found: dict[str, str] = {}
    tags = source.tags if source else {}
    for title, role in ((TRAINING, "train"), (VALIDATION, "validation")):
        if fingerprint := tags.get(f"{names.DATA_FINGERPRINT}.{role}"):
            found[title] = f"{data_name(tags.get(f'{names.DATA_URI}.{role}', ''))} {fingerprint[:8]}".strip()
    prefix = f"{names.DATA_DECONTAMINATED}.train"
    if removed := [tags[key] for key in sorted(tags) if key == prefix or key.startswith(f"{prefix}.")]:
        found[DECONTAMINATION] = "; ".join(dict.fromkeys(removed))
    sets = {key: value for key, value in run.tags.items() if key.startswith(f"{names.DATA_FINGERPRINT}.")}
    if sets:
        digest = hashlib.sha256(json.dumps(sets, sort_keys=True).encode()).hexdigest()[:8]
        found[EVALUATION] = f"{data_name(run.tags.get(names.PLACE + 'data', ''))} {digest}".strip()
    return found


def differing(rows: Sequence[Row]) -> list[str]:
    """The kinds of data (keys of `Row.datasets`) in which the rows of one suite are known to differ."""
    kinds = (TRAINING, VALIDATION, DECONTAMINATION, EVALUATION)
    return [kind for kind in kinds if len({row.datasets[kind] for row in rows if kind in row.datasets}) > 1]


def data_note(rows: Sequence[Row]) -> str:
    """One sentence on the data in which the rows of one suite differ; empty if they are not known to differ."""
    kinds = differing(rows)
    if not kinds:
        return ""
    what = " and ".join([", ".join(kinds[:-1]), kinds[-1]] if len(kinds) > 1 else kinds)
    warning = " Scores on different evaluation data are not comparable." if EVALUATION in kinds else ""
    return f"These models differ in {what}.{warning}"


def _name(run: RunInfo, checkpoint: str) -> str:
    """The name of a model whose pre-training run is not on this server."""
    if checkpoint.startswith(names.RANDOM):
        return f"random encoder {run.tags.get(names.VARIANT, '')}".strip()
    return checkpoint_name(checkpoint) or run.name


def _images_seen(run: RunInfo, checkpoint: str, source: RunInfo | None) -> float | None:
    """Images seen by the checkpoint if known (an early checkpoint has seen fewer), or else by the whole run."""
    if names.IMAGES_SEEN in run.tags:
        return float(run.tags[names.IMAGES_SEEN])
    return source.metrics.get(names.IMAGES_SEEN) if source else None


def _train_flops(source: RunInfo | None, images: float | None) -> float | None:
    """3 x forward FLOPs x images: the compute of these weights, without the steps that restarts repeated."""
    if source is None or images is None:
        return None
    try:
        depth = source.params.get("model.depth", "None")
        forward = _forward_flops(
            source.params["model.variant"],
            int(source.params["image_size"]),
            None if depth == "None" else int(depth),
            float(source.params.get("patch_keep_rate", 1.0)),
        )
        return 3.0 * forward * images
    except (KeyError, ValueError, UserError):
        return source.metrics.get(names.TRAIN_FLOPS)


@functools.lru_cache(maxsize=1024)
def _forward_flops(variant: str, image_size: int, depth: int | None, patch_keep_rate: float) -> float:
    from models.cost import flops

    config = {"variant": variant, "num_classes": 1000, "image_size": image_size} | ({"depth": depth} if depth else {})
    return flops(config, patch_keep_rate=patch_keep_rate)
