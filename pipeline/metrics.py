"""Live metrics of a job for Prometheus, through the exporter that Ray runs on every node.

    metrics.publish({metrics.TRAIN_LOSS: 2.31, metrics.TRAIN_STEP: 100}, run="b16")

Each metric is a gauge `ray_vit_<name>`, with Ray's labels and the label `run`, the last part of the output's address. A
gauge keeps its last value while its process runs. MLflow stores the history of a run; the gauges are for dashboards and
alerts of the cluster (`infra/monitoring`). `publish` does nothing if the process is not connected to Ray."""

import contextlib
import sys
from collections.abc import Mapping
from typing import Any

TRAIN_STEP = "train_step"
TRAIN_LAST_STEP_TIME = "train_last_step_time_seconds"
TRAIN_LOSS = "train_loss"
TRAIN_IMAGES_PER_SECOND = "train_images_per_second"
TRAIN_DATA_WAIT = "train_data_wait"
TRAIN_GOODPUT = "train_goodput"
VALIDATION_TOP1 = "validation_top1_percent"
UNITS = "work_units"
UNITS_DONE = "work_units_done"
UNITS_FAILED = "work_units_failed"
EVALUATIONS_FAILED = "evaluations_failed"
UNDELIVERED = "tracking_undelivered_records"

DESCRIPTIONS = {
    TRAIN_STEP: "Optimiser steps done.",
    TRAIN_LAST_STEP_TIME: "Time of the last logged step, in seconds since 1970.",
    TRAIN_LOSS: "Training loss of the last logged step.",
    TRAIN_IMAGES_PER_SECOND: "Training images per second, over all workers, since the previous logged step.",
    TRAIN_DATA_WAIT: "Fraction of the training time spent waiting for data, 0 to 1.",
    TRAIN_GOODPUT: "Fraction of the time since the workers started that was spent in training steps, 0 to 1.",
    VALIDATION_TOP1: "Top-1 accuracy of the last validation, in percent.",
    UNITS: "Units of resumable work in this job: prepare, duplicates, VTAB, features.",
    UNITS_DONE: "Units that have a receipt.",
    UNITS_FAILED: "Units of this attempt that ended in an error.",
    EVALUATIONS_FAILED: "Checkpoints whose evaluation failed in the last pass.",
    UNDELIVERED: "Records on this machine's disk that are not delivered to the MLflow server.",
}

_gauges: dict[str, Any] = {}


def publish(values: Mapping[str, float], run: str) -> None:
    """Sets gauges. values: {name from this module: value}. Errors of Ray are
    ignored, so that a gauge cannot stop a run."""
    if unknown := values.keys() - DESCRIPTIONS.keys():
        raise KeyError(f"unknown live metric: {', '.join(sorted(unknown))}")
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return
    with contextlib.suppress(Exception):
        for name, value in values.items():
            _gauge(name).set(float(value), tags={"run": run_label(run)})


def run_label(output: str) -> str:
    """The label of a run: the last part of its output's address, without internal folders such as `_work`."""
    parts = [part for part in output.split("/") if part and not part.startswith("_")]
    return parts[-1] if parts else output


def _gauge(name: str) -> Any:
    if name not in _gauges:
        from ray.util.metrics import Gauge

        _gauges[name] = Gauge(f"vit_{name}", DESCRIPTIONS[name], tag_keys=("run",))
    return _gauges[name]
