"""Every experiment, metric and tag name that reaches MLflow, in one place.

Runs are compared by name: two spellings of one quantity are two columns that never meet. Parameters need no list: they
are the configuration, flattened to `a.b.c`.
"""

import hashlib
import re
from typing import Any

# Experiments, one per purpose.
PREPARE, PRETRAIN, TRANSFER, EVALUATE = "prepare", "pretrain", "transfer", "evaluate"
COMPARE, VISUALIZE = "compare", "visualize"
PIPELINE = "pipeline"

# Metrics of a training step. MLflow's `step` is the optimiser step; IMAGES_SEEN is logged beside every point, because
# only images are comparable between batch sizes.
IMAGES_SEEN = "images_seen"
LOSS = "train/loss"
GRAD_NORM = "train/grad_norm"
LEARNING_RATE = "train/lr"
IMAGES_PER_SECOND = "train/images_per_second"
MFU = "train/mfu"  # model FLOPs utilisation, 0..1; absent on a CPU that others use, too
GOODPUT = "train/goodput"  # share of the time since the workers started that went into steps, 0..1
DATA_WAIT = "train/data_wait"  # share of the step spent waiting for the loader, 0..1
MEMORY_GB = "train/memory_gb"  # peak of the device (or of the process on CPU), 1e9 bytes
SKIPPED = "train/skipped"  # steps not taken so far, for any reason
REPLACED = "train/replaced"  # images so far that did not decode and were replaced by others
SPIKES = "train/spikes"  # those of them whose loss was a spike
VAL_LOSS = "val/loss"
VAL_TOP1 = "val/top1"  # percent, as every accuracy here
FEWSHOT_TOP1 = "val/fewshot_top1"  # linear probe on frozen features of a few images per class, percent
FEWSHOT_SECONDS = "val/fewshot_seconds"  # what the probe cost

# A preparation, over all splits; `step` is the number of inputs so far. The rate is that of one attempt.
INPUTS = "data/inputs"
ROWS = "data/rows"
REJECTS = "data/rejects"
REJECTED = "data/rejected/"  # + reason
DUPLICATES = "data/duplicates"
BYTES = "data/bytes"
PREPARED_PER_SECOND = "data/inputs_per_second"

# Cost of a run over all its attempts (Run.log_cost), logged at the end of each.
COST = "cost/"
SECONDS = "cost/seconds"
GPU_HOURS = "cost/gpu_hours"
TRAIN_FLOPS = "cost/train_flops"  # 3 x forward FLOPs x images seen
ENERGY_KWH = "cost/energy_kwh"

# Scores of a transfer suite: top-1 in percent, per task and aggregated (paper, Table 2: the flat mean of 19 tasks).
SCORE = "score/"  # + task
MEAN_SCORE = "score_mean"
MEAN_ERROR = "score_mean/std_error"  # standard error of MEAN_SCORE, in points
PARTIAL_MEAN = "score_mean/partial"  # the mean when only some of the suite's tasks were asked for
GROUP_SCORE = "score_mean/"  # + natural | specialized | structured
CLEAN_SCORE = "score_clean/"  # + task: without the test images that are in the pre-training data
CLEAN_MEAN = "score_clean_mean"

# Prefixes.
NONFINITE = "nonfinite/"  # + metric: how many values were NaN or infinite so far (they are not stored themselves)
SYSTEM = "system/"  # + node + "/" + quantity
NODE_ENERGY = "gpu_energy_kwh"  # the quantity that ENERGY_KWH adds up

# Tags.
RECIPE = "recipe"
COMMIT = "commit"
DIRTY = "commit.dirty"  # "true": code/diff.patch among the artifacts holds the uncommitted change
DATA_URI = "data.uri"  # + "." + role
DATA_FINGERPRINT = "data.fingerprint"  # + "." + role
CHECKPOINT = "checkpoint"  # URI that was read (transfer) or last written (pretrain)
PLACE = "place."  # + key of the configuration that holds a path or an address: tags, since equal runs differ in them
RAY_JOB = "ray.job"
LINEAGE = "lineage."  # + prepare | pretrain | transfer: run id of the run that this one was made from
PIPELINE_NAME = "pipeline"  # of the pipeline whose stage the run is
PIPELINE_STAGE = "pipeline.stage"
PIPELINE_RUN = "pipeline.run"  # id of the pipeline's own run, the same for all of its stages
SPOOL = "spool"  # id given before the server knew the run: makes its creation safe to repeat
VARIANT = "model.variant"  # architecture that a transfer run used
RESUMED = "resumed"  # how many times the run was continued
CHANGED = "resumed.changed"  # configuration that differs from the first attempt
REASON = "reason"  # why a run failed or was stopped; absent while it runs and after success
NONFINITE_TAG = "nonfinite"  # which metrics had non-finite values, how many, since which step

# MLflow's own tag names.
RUN_NAME = "mlflow.runName"
PARENT = "mlflow.parentRunId"
SOURCE_NAME = "mlflow.source.name"
SOURCE_TYPE = "mlflow.source.type"
SOURCE_COMMIT = "mlflow.source.git.commit"
NOTE = "mlflow.note.content"
USER = "mlflow.user"

# What of a configuration names a path, an address or a run.
_PLACES = frozenset(
    (
        *("data", "validation", "output", "cache", "checkpoint", "init_from", "source", "labels", "label_map", "raw"),
        *("decontaminate", "decontamination", "real_labels", "runs", "hook", "address", "tracking_uri", "register"),
        *("fewshot.train", "fewshot.test", "runtime.name"),
    )
)


def is_place(key: str) -> bool:
    """Whether a key of a flat configuration names a path, an address or a run: equal runs differ in them."""
    parts = key.split(".")
    return parts[-1] in _PLACES or ".".join(parts[-2:]) in _PLACES


RANDOM = "random:"
"""Before the address of a checkpoint: its architecture with random weights."""

# What MLflow's stores accept.
MAX_NAME, MAX_VALUE = 250, 5000  # characters of a name, and of the value of a tag or parameter
_REFUSED_IN_NAMES = re.compile(r"[^/\w.\- ]")


def valid_name(name: str) -> str:
    """The name as MLflow accepts it: other characters become `_`, and a hash of the original keeps two such names apart.

    Names contain what users call their files and data sets: `val/v (1)/top1` becomes `val/v _1_-6a1c/top1`.
    """
    return "/".join(_valid_part(part) for part in name.split("/"))[:MAX_NAME]


def _valid_part(part: str) -> str:
    valid = _REFUSED_IN_NAMES.sub("_", part) if part not in ("", ".", "..") else "_"
    if len(valid) > 100:
        valid = valid[:100]
    return valid if valid == part else f"{valid}-{hashlib.sha256(part.encode(errors='replace')).hexdigest()[:4]}"


def valid_path(path: str) -> str:
    """The place of an artifact as every store and file system accepts it; ordinary names stay as they are."""
    parts = []
    for part in path.split("/"):
        stem, dot, ending = part.rpartition(".")
        usable = valid_value(part) == part and len(part.encode()) <= 200 and part not in ("", ".", "..")
        parts.append(part if usable else f"{_valid_part(stem)[:150]}{dot}{_valid_part(ending)[:10]}")
    return "/".join(parts)


def valid_value(value: Any) -> str:
    """The text of a tag or parameter as every store accepts it: no NUL, valid Unicode, not too long."""
    return str(value).replace("\0", "\N{REPLACEMENT CHARACTER}").encode(errors="replace").decode()[:MAX_VALUE]
