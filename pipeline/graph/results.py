"""Results and progress of jobs, read from their files."""

import contextlib
import math
import time
from dataclasses import dataclass
from typing import Any

from pipeline import storage
from pipeline.errors import UserError
from pipeline.graph.state import FOLDER
from pipeline.tracking import names
from pipeline.weights import checkpoints

RANDOM = "random/"
"""Prefix of tasks whose score is that of an encoder with random weights."""


def read(kind: str, output: str) -> dict[str, Any]:
    """The result in a finished output of a job of that kind; empty if there is none."""
    readers = {
        "prepare": _prepared,
        "vtab": _prepared,
        "pretrain": _trained,
        "transfer": _transferred,
        "promote": _promoted,
    }
    if kind not in readers:
        return {}
    try:
        return readers[kind](output)
    except (UserError, OSError, AttributeError, KeyError, TypeError, ValueError):
        return {}


def _prepared(output: str) -> dict[str, Any]:
    from pipeline.data.format import open_dataset  # imports pyarrow, which takes half a second

    folders = [
        file.uri.rpartition("/")[0] for file in storage.list_files(output) if file.path.endswith("manifest.json")
    ]
    manifests = [open_dataset(folder).manifest for folder in folders if "/_work" not in folder]
    return {
        "prepared": sum(manifest.rows for manifest in manifests),
        "shards": sum(len(manifest.shards) for manifest in manifests),
        "rejects": sum(sum(manifest.rejects.values()) for manifest in manifests),
    }


def _trained(output: str) -> dict[str, Any]:
    newest = checkpoints.latest(output, checksums=False)
    if newest is None:
        return {}
    metrics = newest.commit.get("metrics", {})
    found = {"steps": newest.step}
    found |= {key: metrics[key] for key in ("loss_first", "loss_last") if key in metrics}
    if names.VAL_TOP1 in metrics:
        found["top1"] = metrics[names.VAL_TOP1]  # in percent
    return {key: value for key, value in found.items() if math.isfinite(value)}


def _transferred(output: str) -> dict[str, Any]:
    summary = storage.read_record(storage.join(output, "scores.json"), ["scores"], "run the stage again")
    random = {RANDOM + name: score for name, score in summary.get("random_encoder", {}).items()}
    return {name: score["mean"] for name, score in summary["scores"].items()} | random


def gpus(kind: str, output: str) -> float:
    """GPUs occupied by the workers of a transfer, from its scores.json; 0 for other jobs."""
    if kind != "transfer":
        return 0.0
    with contextlib.suppress(UserError, OSError, TypeError, ValueError):
        return float(storage.read_json(storage.join(output, "scores.json")).get("gpus") or 0.0)
    return 0.0


def _promoted(output: str) -> dict[str, Any]:
    return storage.read_record(storage.join(output, "promotion.json"), remedy="run the stage again")


# ---------------------------------------------------------------- progress

RATE_AFTER = 10.0
"""Seconds between two reports from which a rate is computed; a shorter time has a few steps of a single kind."""


@dataclass(frozen=True, kw_only=True, slots=True)
class JobProgress:
    """The progress of a running job."""

    share: float
    """From 0 to 1."""
    note: str = ""
    left: float | None = None
    """Remaining seconds, by the rate so far; None in the first `RATE_AFTER` seconds."""


def progress_place(root: str, job: str) -> str:
    """The URI at which an attempt writes its progress."""
    return storage.join(root, FOLDER, "progress", f"{job}.json")


def read_progress(root: str, job: str) -> JobProgress | None:
    """The progress of an attempt; None before its first report."""
    with contextlib.suppress(UserError, OSError, KeyError, TypeError, ValueError):
        plain = storage.read_json(progress_place(root, job))
        share, first = float(plain["share"]), float(plain["first"])
        seconds = float(plain["time"]) - float(plain["began"])
        rate = (share - first) / seconds if seconds >= RATE_AFTER else 0.0
        left = max(0.0, (1 - share) / rate - (time.time() - float(plain["time"]))) if rate > 0 else None
        return JobProgress(share=min(1.0, share), note=str(plain.get("note", "")), left=left)
    return None
