"""Required storage and CPU throughput, cost of checkpoints, and cost of the paper's runs on another GPU."""

import math
from typing import Any

from pipeline import config as configuration
from pipeline.data.format import ROW_GROUP_BYTES, SHARD_BYTES
from pipeline.hardware import find_gpu
from pipeline.operations.planning.config import CORPORA, GB, PREPARE_SECONDS, PlanConfig
from pipeline.operations.planning.speed import step_seconds

# Bytes of a stored image of side 256 (jpeg) or 224 (patches), and the CPU time to load, crop and flip it
# (tests/benchmarks/results/loader_speed.json, one core). A part of the time does not depend on the size (32 px: 0.048
# ms); the rest, and the bytes, are proportional to the area. "originals" are ImageNet's files.
JPEG_BYTES, JPEG_SECONDS = 24_000, 0.39e-3
PATCH_SECONDS = 0.021e-3
IMAGE_SECONDS = 0.04e-3
# Additional CPU time for an image of 224 px: each layer of RandAugment, and mixup (loader on one core, 512 JPEGs of 256
# px).
RANDAUGMENT_SECONDS, MIXUP_SECONDS = 0.12e-3, 0.03e-3
LAUNCHING = 1
"""Cores per GPU for the thread that launches its kernels."""
ORIGINAL_BYTES, ORIGINAL_SECONDS = 110_000, 1.4e-3

GET_PRICE = 0.4e-6  # $ per request of S3 Standard; one request per row group

# Table 2 of the paper: recipe -> TPUv3 core-days of pre-training.
PAPER_CORE_DAYS = {"h14_jft300m_14ep": 2500, "l16_jft300m_14ep": 680, "l16_imagenet21k_90ep": 230}


def data_plane(config: PlanConfig, images: int, seen: int, rate: float) -> dict[str, Any]:
    """Required throughput of storage and CPUs at `rate` images per second, for each way of storing images.
    cores_per_gpu: whole cores, including the one that launches kernels."""
    side, augment = config.training.image_size, config.training.augment
    channels, area = 3, (side / 224) ** 2
    strong = augment.randaug_layers * RANDAUGMENT_SECONDS + (MIXUP_SECONDS if augment.mixup else 0.0)
    forms = {
        "jpeg": (JPEG_BYTES * area, IMAGE_SECONDS + (JPEG_SECONDS + strong) * area),
        "patches": (side * side * channels, PATCH_SECONDS * area),
        "originals": (ORIGINAL_BYTES, ORIGINAL_SECONDS + strong * area),
    }
    return {
        name: {
            "bytes_per_image": round(size),
            "stored": round(images * size),
            "storage_cost_per_month": images * size / GB * config.storage_price,
            "read_bytes_per_second": rate * size,
            "cores": rate * seconds,
            "cores_per_gpu": math.ceil(rate * seconds / config.gpus + LAUNCHING),
            "read": round(seen * size),
            "request_cost": seen * size / ROW_GROUP_BYTES * GET_PRICE if name != "originals" else seen * GET_PRICE,
        }
        for name, (size, seconds) in forms.items()
    }


def checkpoint_interval(write_seconds: float, seconds_between_failures: float) -> float:
    """Optimal checkpoint interval in seconds, which minimises the time for writing and for repeated work.

    Daly, "A higher order estimate of the optimum checkpoint interval" (2006), eq. 37; its first term is Young's (1974).
    """
    if write_seconds >= 2 * seconds_between_failures:
        return seconds_between_failures
    x = write_seconds / (2 * seconds_between_failures)
    young = math.sqrt(2 * write_seconds * seconds_between_failures)
    return young * (1 + math.sqrt(x) / 3 + x / 9) - write_seconds


def paper_costs(config: PlanConfig) -> list[dict[str, Any]]:
    """The pre-training runs of the paper (table 2) on the planned GPU, with their TPU time."""
    from models.cost import flops
    from pipeline.training.plan import model_options
    from pipeline.training.recipes import RECIPES

    rows = []
    for recipe, core_days in PAPER_CORE_DAYS.items():
        training = RECIPES[recipe]()
        images, classes = next(size for key, size in CORPORA.items() if key in recipe)
        steps = configuration.steps(training.steps, batch_size=training.batch_size, examples_per_epoch=images)
        options, keep = model_options(training, classes), training.patch_keep_rate
        seconds = config.gpus * step_seconds(
            find_gpu(config.gpu), options, images=training.batch_size / config.gpus, partition=1 / config.gpus,
            patch_keep_rate=keep, mfu=config.mfu,
        )  # fmt: skip
        hours = steps * seconds / 3600
        total = 3 * flops(options, patch_keep_rate=keep) * steps * training.batch_size
        rows.append(
            {
                "recipe": recipe,
                "train_exaflops": total / 1e18,
                "tpu_v3_core_days": core_days,
                "gpu_days": hours / 24,
                "cost": hours * config.price,
            }
        )
    return rows


def prepare_plan(config: PlanConfig, images: int) -> dict[str, Any]:
    """Estimate of jobs/prepare.py for a number of original images (110 KB each, resized to a shorter side of 256)."""
    core_hours = images * PREPARE_SECONDS / 3600
    forms = {"jpeg": JPEG_BYTES, "patches": 224 * 224 * 3}
    return {
        "images": images,
        "input_bytes": images * ORIGINAL_BYTES,
        "core_hours": core_hours,
        "cores": config.cores,
        "hours": core_hours / config.cores,
        "output": {
            name: {
                "bytes": images * size,
                "shards": math.ceil(images * size / SHARD_BYTES),
                "storage_cost_per_month": images * size / GB * config.storage_price,
            }
            for name, size in forms.items()
        },
    }
