"""What a job says of itself while it runs and when it is done, read from its own files."""

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
"""Before the name of a task: the score of an encoder with random weights."""


def read(kind: str, output: str) -> dict[str, Any]:
    """What the job of that kind reports of a finished output; empty when it says nothing."""
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
    from pipeline.data.format import open_dataset  # pyarrow, half a second that an idle pipeline saves

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
    """GPUs that a transfer's workers occupied, as it says itself; 0 of other jobs."""
    if kind != "transfer":
        return 0.0
    with contextlib.suppress(UserError, OSError, TypeError, ValueError):
        return float(storage.read_json(storage.join(output, "scores.json")).get("gpus") or 0.0)
    return 0.0


def _promoted(output: str) -> dict[str, Any]:
    return storage.read_record(storage.join(output, "promotion.json"), remedy="run the stage again")


# ---------------------------------------------------------------- progress


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """How far a running job is."""

    share: float
    note: str = ""
    left: float | None = None
    """Seconds, as far as its rate says."""


def progress_place(root: str, job: str) -> str:
    """Where the attempt of that name writes how far it is."""
    return storage.join(root, FOLDER, "progress", f"{job}.json")


def read_progress(root: str, job: str) -> Progress | None:
    """How far an attempt is; None while it has not said so."""
    with contextlib.suppress(UserError, OSError, KeyError, TypeError, ValueError):
        plain = storage.read_json(progress_place(root, job))
        share, first = float(plain["share"]), float(plain["first"])
        seconds = float(plain["time"]) - float(plain["began"])
        rate = (share - first) / seconds if seconds > 0 else 0.0
        left = max(0.0, (1 - share) / rate - (time.time() - float(plain["time"]))) if rate > 0 else None
        return Progress(share=min(1.0, share), note=str(plain.get("note", "")), left=left)
    return None
