"""The names of all experiments, metrics and tags in MLflow.

MLflow compares runs by name, so each quantity must have one spelling. Parameters are not listed here: they are the
configuration, flattened to `a.b.c`.
"""

import hashlib
import re
from typing import Any

# Experiments, one per purpose.
PREPARE, PRETRAIN, TRANSFER, EVALUATE = "prepare", "pretrain", "transfer", "evaluate"
COMPARE, VISUALIZE = "compare", "visualize"
PIPELINE = "pipeline"

# Metrics of a training step. MLflow's `step` is the optimiser step. IMAGES_SEEN is logged with every point, because
# steps are not comparable between batch sizes.
IMAGES_SEEN = "images_seen"
LOSS = "train/loss"
GRAD_NORM = "train/grad_norm"
LEARNING_RATE = "train/lr"
IMAGES_PER_SECOND = "train/images_per_second"
MFU = "train/mfu"  # model FLOPs utilisation, 0..1; not logged on CPUs, which other processes share
GOODPUT = "train/goodput"  # fraction of the time since the workers started that was spent in steps, 0..1
DATA_WAIT = "train/data_wait"  # fraction of the step time spent waiting for the loader, 0..1
MEMORY_GB = "train/memory_gb"  # peak memory of the device (or of the process on CPU), in 1e9 bytes
SKIPPED = "train/skipped"  # number of skipped steps so far, for any reason
REPLACED = "train/replaced"  # number of images so far that could not be decoded and were replaced
MIXTURE_IMAGES = "mixture/images/"  # + data set of a mixture: number of its images so far
MIXTURE_EPOCHS = "mixture/epochs/"  # + data set of a mixture: images seen, in epochs of the data set
SPIKES = "train/spikes"  # number of steps skipped because of a loss spike
VAL_LOSS = "val/loss"
VAL_TOP1 = "val/top1"  # percent, like all accuracies
FEWSHOT_TOP1 = "val/fewshot_top1"  # linear probe on frozen features of a few images per class, in percent
FEWSHOT_SECONDS = "val/fewshot_seconds"  # time of the probe

# Metrics of `prepare`, over all splits; `step` is the number of inputs so far. The rate is that of the current attempt.
INPUTS = "data/inputs"
ROWS = "data/rows"
REJECTS = "data/rejects"
REJECTED = "data/rejected/"  # + reason
DUPLICATES = "data/duplicates"
BYTES = "data/bytes"
PREPARED_PER_SECOND = "data/inputs_per_second"

# Cost of a run over all its attempts (Run.log_cost), logged at the end of each attempt.
COST = "cost/"
SECONDS = "cost/seconds"
GPU_HOURS = "cost/gpu_hours"
TRAIN_FLOPS = "cost/train_flops"  # 3 x forward FLOPs x images seen
ENERGY_KWH = "cost/energy_kwh"

# Scores of a transfer suite: top-1 in percent, per task and aggregated (paper, Table 2: the flat mean of 19 tasks).
SCORE = "score/"  # + task
MEAN_SCORE = "score_mean"
MEAN_ERROR = "score_mean/std_error"  # standard error of MEAN_SCORE, in points
PARTIAL_MEAN = "score_mean/partial"  # the mean if only some tasks of the suite were run
GROUP_SCORE = "score_mean/"  # + natural | specialized | structured
CLEAN_SCORE = "score_clean/"  # + task: without test images that occur in the pre-training data
CLEAN_MEAN = "score_clean_mean"

# Prefixes.
NONFINITE = "nonfinite/"  # + metric: number of NaN and infinite values so far; the values are not stored
SYSTEM = "system/"  # + node + "/" + quantity
NODE_ENERGY = "gpu_energy_kwh"  # per node; ENERGY_KWH is the sum

# Tags.
RECIPE = "recipe"
COMMIT = "commit"
DIRTY = "commit.dirty"  # "true": the artifact code/diff.patch has the uncommitted changes
DATA_URI = "data.uri"  # + "." + role
DATA_FINGERPRINT = "data.fingerprint"  # + "." + role
DATA_DECONTAMINATED = "data.decontaminated"  # + "." + role: evaluation sets whose images were removed, or "none"
DATA_SHARE = "data.share"  # + "." + role of a data set of a mixture
CHECKPOINT = "checkpoint"  # URI that was read (transfer) or last written (pretrain)
PLACE = "place."  # + key of a path or address in the configuration; a tag, because it does not affect results
RAY_JOB = "ray.job"
LINEAGE = "lineage."  # + prepare | pretrain | transfer: id of the run that produced the input
PIPELINE_NAME = "pipeline"  # name of the pipeline, if the run is one of its stages
PIPELINE_STAGE = "pipeline.stage"
PIPELINE_RUN = "pipeline.run"  # id of the pipeline's own run, the same for all stages
SPOOL = "spool"  # id that was assigned before the run was created, so that its creation can be repeated safely
VARIANT = "model.variant"  # architecture of the model of a transfer run
RESUMED = "resumed"  # number of times the run was continued
CHANGED = "resumed.changed"  # configuration that differs from the first attempt
REASON = "reason"  # why a run failed or was stopped; not set while it runs and after success
NONFINITE_TAG = "nonfinite"  # metrics with non-finite values, with their number and first step

# MLflow's own tag names.
RUN_NAME = "mlflow.runName"
PARENT = "mlflow.parentRunId"
SOURCE_NAME = "mlflow.source.name"
SOURCE_TYPE = "mlflow.source.type"
SOURCE_COMMIT = "mlflow.source.git.commit"
NOTE = "mlflow.note.content"
USER = "mlflow.user"

# Keys of the configuration that hold a path, an address or a run.
_PLACES = frozenset(
    (
        *("data", "validation", "output", "cache", "checkpoint", "init_from", "source", "labels", "label_map", "raw"),
        *(
            "decontaminate",
            "decontamination",
            "real_labels",
            "class_names",
            "runs",
            "hook",
            "address",
            "tracking_uri",
            "register",
        ),
        *("fewshot.train", "fewshot.test", "runtime.name"),
    )
)


def is_place(key: str) -> bool:
    """Whether a key of a flat configuration holds a path, an address or a run, which do not affect results."""
    parts = key.split(".")
    return parts[-1] in _PLACES or ".".join(parts[-2:]) in _PLACES


RANDOM = "random:"
"""Prefix of a checkpoint's address that means its architecture with random weights."""

# Limits of MLflow's stores.
MAX_NAME, MAX_VALUE = 250, 5000  # characters of a name, and of the value of a tag or parameter
_REFUSED_IN_NAMES = re.compile(r"[^/\w.\- ]")


def valid_name(name: str) -> str:
    """A name that MLflow accepts. Other characters become `_`, and a hash of the original name is added to keep names
    distinct.

    Names may contain names of files and data sets: `val/v (1)/top1` becomes `val/v _1_-6a1c/top1`.
    """
    return "/".join(_valid_part(part) for part in name.split("/"))[:MAX_NAME]


def _valid_part(part: str) -> str:
    valid = _REFUSED_IN_NAMES.sub("_", part) if part not in ("", ".", "..") else "_"
    if len(valid) > 100:
        valid = valid[:100]
    return valid if valid == part else f"{valid}-{hashlib.sha256(part.encode(errors='replace')).hexdigest()[:4]}"


def valid_path(path: str) -> str:
    """An artifact path that every store and file system accepts; ordinary names are unchanged."""
    parts = []
    for part in path.split("/"):
        stem, dot, ending = part.rpartition(".")
        usable = valid_value(part) == part and len(part.encode()) <= 200 and part not in ("", ".", "..")
        parts.append(part if usable else f"{_valid_part(stem)[:150]}{dot}{_valid_part(ending)[:10]}")
    return "/".join(parts)


def valid_value(value: Any) -> str:
    """The text of a tag or parameter that every store accepts: no NUL, valid Unicode, at most MAX_VALUE characters."""
    return str(value).replace("\0", "\N{REPLACEMENT CHARACTER}").encode(errors="replace").decode()[:MAX_VALUE]
