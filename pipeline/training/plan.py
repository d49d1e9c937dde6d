"""The plan of a run: a config resolved against its dataset, with horizons in steps and batch sizes per worker.

`make_plan` validates the config; `TrainPlan` is the same on the driver and on every worker.
"""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from models.variants import parse_variant
from pipeline import config as configuration
from pipeline.data.format import Dataset
from pipeline.data.loading.order import check_layout, default_lanes
from pipeline.data.mixture import Mixture, check_samples, smallest
from pipeline.errors import UserError, plural
from pipeline.hardware import find_gpu
from pipeline.training.config import EngineConfig, PretrainConfig
from pipeline.training.memory import fit_micro_batch
from pipeline.training.schedule import schedule_warning

logger = logging.getLogger(__name__)
MAX_SEED = 1 << 63  # of PyTorch's generators, as a signed number


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainPlan:
    """Resolved settings of a run. Intervals and lengths are in optimiser steps."""

    config: PretrainConfig
    classes: tuple[str, ...]
    samples: int
    channels: int
    data_fingerprint: str
    mixture: Mapping[str, str]
    """Shares of the data sets of a mixture, by fingerprint; empty for one data set."""
    workers: int
    lanes: int
    per_worker: int
    """Images of each worker in one step: `accumulation` micro-batches of `micro_batch` images."""
    micro_batch: int
    accumulation: int
    steps_per_epoch: int
    total: int
    warmup: int
    cooldown: int
    log_every: int
    validate_every: int
    checkpoint_every: int
    schedule_warning: str = ""
    """Why the schedule does not fit the length of the run (`schedule.schedule_warning`)."""

    @property
    def model_options(self) -> dict[str, Any]:
        """Arguments of `create_model`."""
        return model_options(self.config, len(self.classes), self.channels)

    @property
    def identity(self) -> dict[str, Any]:
        """The settings that identify a run: everything that affects the result."""
        mixture = {"mixture": dict(self.mixture)} if self.mixture else {}
        return {**self.config.identity, "lanes": self.lanes, "data": self.data_fingerprint, **mixture}

    @property
    def derived(self) -> dict[str, Any]:
        """Values derived from the config and the dataset, for display."""
        left_out = ("config", "classes", "schedule_warning")
        plain = {name: getattr(self, name) for name in self.__dataclass_fields__ if name not in left_out}
        resize = self.config.evaluation_view.resize
        return {**plain, "classes": len(self.classes), "validation_resize": resize, "model": self.model_options}


def loading_threads(config: PretrainConfig) -> int:
    """Threads that read and decode images in each worker."""
    return config.runtime.threads or max(1, int(config.runtime.cpus_per_worker))


def model_options(config: PretrainConfig, num_classes: int, channels: int = 3) -> dict[str, Any]:
    """Arguments of `create_model`."""
    options: dict[str, Any] = {k: v for k, v in configuration.to_dict(config.model).items() if v is not None}
    if parse_variant(config.model.variant).depth == 0:  # a ResNet has no tokens to pool, place or drop
        options = {k: v for k, v in options.items() if k in ("variant", "head_bias")}
    if config.loss == "masked":
        num_classes = 0
        options = {k: v for k, v in options.items() if k not in ("pre_logits", "head_bias")} | {"mpp": config.target}
    if channels != 3:
        options["channels"] = channels
    return {"num_classes": num_classes, "image_size": config.image_size, **options}


def make_plan(config: PretrainConfig, dataset: Dataset, workers: int, *, gpu_memory: float | None = None) -> TrainPlan:
    """The plan of `config` for `dataset` and a number of workers. Raises UserError for settings that cannot work.

    gpu_memory: bytes of each worker's GPU. None: memory of the GPU in `runtime.gpu`."""
    check_values(config)
    check_data(config, dataset)
    batch = config.batch_size
    lanes = config.lanes or default_lanes(batch, smallest(dataset))
    check_layout(batch, lanes, workers)
    check_samples(dataset, lanes)
    processes = config.runtime.loading_processes or 1
    if lanes // workers % processes:
        raise UserError(
            f"--loading-processes {processes} cannot share the {plural(lanes // workers, 'lane')} of each worker; use a divisor"
        )
    per_worker = batch // workers
    channels = dataset.manifest.image.get("channels", 3)
    micro = config.engine.micro_batch
    if micro is None:
        memory = gpu_memory or find_gpu(config.runtime.gpu).memory
        micro = _micro_batch(config, model_options(config, len(dataset.classes), channels), workers, memory)
    if micro < 1 or per_worker % micro:
        raise UserError(
            f"engine.micro_batch {micro} does not divide the {plural(per_worker, 'image')} of each worker (batch_size {batch} over "
            f"{plural(workers, 'worker')})"
        )
    steps_per_epoch = len(dataset) // lanes // (batch // lanes)
    return TrainPlan(
        config=config,
        classes=tuple(dataset.classes),
        samples=len(dataset),
        channels=channels,
        data_fingerprint=dataset.manifest.fingerprint,
        mixture=dataset.share_texts if isinstance(dataset, Mixture) else {},
        workers=workers,
        lanes=lanes,
        per_worker=per_worker,
        micro_batch=micro,
        accumulation=per_worker // micro,
        steps_per_epoch=steps_per_epoch,
        **_horizons(config, steps_per_epoch * batch),
    )


def _micro_batch(config: PretrainConfig, options: Mapping[str, Any], workers: int, gpu_memory: float) -> int:
    """Images of one forward pass if the config does not set it: on a CPU the worker's whole batch, on a GPU as many as
    fit.

    With fewer workers than planned, each worker has more images but not more
    memory. Raises UserError if not even one image fits."""
    images = math.gcd(config.batch_size // workers, config.batch_size // config.runtime.workers)
    if not config.runtime.gpus:
        return images
    fit = fit_micro_batch(config, options, stage=config.engine.zero, gpus=workers, memory=gpu_memory, images=images)
    if fit.micro_batch:
        return fit.micro_batch
    raise UserError(
        f"{config.model.variant} needs {(fit.used + fit.per_image) / 1e9:.0f} GB with one image, by estimate, and a GPU has "
        f"{gpu_memory / 1e9:.0f} GB; try {'; '.join(memory_remedies(config)) or 'a GPU with more memory'}; --engine.micro-batch 1 tries it "
        "all the same"
    )


def memory_remedies(config: PretrainConfig) -> list[str]:
    """Settings that reduce device memory further, as flags that are compatible with the run's other settings."""
    engine, settings = config.engine, []
    if not engine.activation_checkpointing:
        settings.append("--engine.activation-checkpointing")
    elif engine.checkpoint_keeps != "nothing" or engine.checkpointed_blocks is not None:
        settings.append("--engine.checkpoint-keeps nothing --engine.checkpointed-blocks None (recompute every block)")
    fp32_gradients = " --engine.gradient-precision model" if engine.gradient_precision == "fp32" else ""
    if engine.zero < 2:
        settings.append(f"--engine.zero {engine.zero + 1} (now {engine.zero}; divides among more workers)")
    elif engine.zero == 2:
        eager = " --engine.no-compile" if engine.compile else ""  # stage 3 cannot be compiled
        settings.append(f"--engine.zero 3{eager}{fp32_gradients} (now 2; divides among more workers)")
    if not engine.offload and engine.zero and config.optimizer.name != "muon":
        settings.append(f"--engine.offload{fp32_gradients} (optimiser states in host memory)")
    if engine.precision == "fp32" and not (config.optimizer.name == "muon" and engine.zero == 0):
        settings.append("--engine.precision bf16" + (" --engine.no-tf32" if engine.tf32 else ""))
    return settings


def _horizons(config: PretrainConfig, examples_per_epoch: int) -> Mapping[str, Any]:
    """Fields of TrainPlan that the config gives as horizons ("7epochs"), in steps."""
    units = {"batch_size": config.batch_size, "examples_per_epoch": examples_per_epoch}
    total = configuration.steps(config.steps, **units)
    if total < 1:
        raise UserError(f'steps "{config.steps}" is less than one step of {config.batch_size} images')

    def steps(horizon: str) -> int:
        return configuration.steps(horizon, **units, total_steps=total)

    lengths = {"warmup": steps(config.schedule.warmup), "cooldown": steps(config.schedule.cooldown)}
    return {
        "total": total,
        "warmup": min(lengths["warmup"], total),
        "cooldown": lengths["cooldown"],
        "schedule_warning": schedule_warning(config.schedule, total=total, **lengths),
        "log_every": max(1, steps(config.runtime.log_every)),
        "validate_every": max(1, steps(config.runtime.validate_every)),
        "checkpoint_every": max(1, steps(config.runtime.checkpoint_every)),
    }


# ---------------------------------------------------------------- checks


def check_values(config: PretrainConfig) -> None:
    """Checks of a config that do not need the data. Raises UserError, which names the field."""
    _check_ranges(config)
    find_gpu(config.runtime.gpu)
    engine, optimizer, runtime = config.engine, config.optimizer, config.runtime
    if config.validation_resize is not None and config.validation_resize < config.image_size:
        raise UserError(
            f"--validation-resize {config.validation_resize} is less than --image-size {config.image_size}; give "
            f"--validation-resize {round(config.image_size * 8 / 7)}, or --no-validation-resize"
        )
    if runtime.register is not None and (not runtime.register.strip() or set(runtime.register) & set("/:")):
        raise UserError(
            f'register "{runtime.register}" is not a valid model name in MLflow: it must be non-empty, without / and :'
        )
    variant = parse_variant(config.model.variant)
    if engine.precision == "fp16" and not runtime.gpus:
        raise UserError("engine.precision fp16 needs a GPU; use bf16 or fp32 on the CPU")
    _check_engine(engine)
    if optimizer.name == "muon":
        if engine.offload or (engine.zero == 0 and engine.precision != "fp32"):
            raise UserError(
                "optimizer.name muon needs engine.zero 1, 2 or 3 without engine.offload (or zero 0 in fp32)"
            )
        if variant.depth == 0:
            raise UserError(
                "optimizer.name muon trains the matrices of transformer blocks, and a ResNet has none; use adamw or sgd"
            )
    if not 0 < config.patch_keep_rate <= 1:
        raise UserError(f"patch_keep_rate {config.patch_keep_rate} is not a fraction in (0, 1]")
    if config.patch_keep_rate < 1 and variant.stem is not None:
        raise UserError(
            f"patch_keep_rate drops image patches, but {config.model.variant} needs whole images; leave it at 1"
        )
    if config.patch_keep_rate < 1 and config.augment.mixup:
        raise UserError(
            "patch_keep_rate keeps different patches of each image, and mixup blends whole images; use only one of them"
        )


def _check_engine(engine: EngineConfig) -> None:
    """Checks for incompatible engine options. Raises UserError naming both."""
    if engine.offload and engine.zero == 0:
        raise UserError("engine.offload needs engine.zero 1, 2 or 3")
    if engine.compile and engine.zero == 3:
        raise UserError(
            "engine.compile with engine.zero 3 would run eagerly: ZeRO-3's hooks cut every block's graph; use engine.zero 2, or "
            "--engine.no-compile"
        )
    if engine.gradient_precision == "fp32" and (engine.zero != 2 or engine.precision != "bf16" or engine.offload):
        raise UserError(
            "engine.gradient_precision fp32 needs engine.zero 2 and engine.precision bf16, without engine.offload"
        )
    if engine.overlap_comm and engine.zero == 0:
        raise UserError("engine.overlap_comm needs engine.zero 1, 2 or 3")
    partial = engine.checkpointed_blocks is not None or engine.checkpoint_keeps != "nothing"
    if partial and not engine.activation_checkpointing:
        raise UserError(
            "engine.checkpointed_blocks and engine.checkpoint_keeps need engine.activation_checkpointing; add it"
        )
    if engine.tf32 and engine.precision != "fp32":
        raise UserError(f"engine.tf32 is for engine.precision fp32, not {engine.precision}")


def _check_ranges(config: PretrainConfig) -> None:
    """Range checks: negative counts, infinite rates, fractions above one. Raises UserError naming the field."""
    runtime, optimizer = config.runtime, config.optimizer
    configuration.check_finite(config)
    at_least = {
        "batch_size": (config.batch_size, 1),
        "image_size": (config.image_size, 1),
        "shuffle_window": (config.shuffle_window, 1),
        "spike_window": (config.spike_window, 1),
        "seed": (config.seed, 0),
        "workers": (runtime.workers, 1),
        "engine.micro_batch": (config.engine.micro_batch, 1),
        "engine.checkpointed_blocks": (config.engine.checkpointed_blocks, 1),
        "threads": (runtime.threads, 1),
        "loading_processes": (runtime.loading_processes, 1),
        "keep_last": (runtime.keep_last, 1),
        "max_failures": (runtime.max_failures, 0),
        "stop_after_skipped": (runtime.stop_after_skipped, 1),
        "stop_grace": (runtime.stop_grace, 0),
        "stalled_after": (runtime.stalled_after, 0),
        "wait_warning": (runtime.wait_warning, 0),
        "optimizer.weight_decay": (optimizer.weight_decay, 0),
        "optimizer.lr": (optimizer.lr, 0),
        "optimizer.muon_lr": (optimizer.muon_lr, 0),
        "schedule.end": (config.schedule.end, 0),
        "schedule.timescale": (config.schedule.timescale, 1),
        "model.depth": (config.model.depth, 1),
        "max_replaced": (runtime.max_replaced, 0),
        "fewshot.shots": (runtime.fewshot.shots, 1),
        "fewshot.l2": (runtime.fewshot.l2, 0),
    }
    for field, (value, least) in at_least.items():
        if value is not None and not (math.isfinite(value) and value >= least):
            raise UserError(f"{field} {value} must be a number of at least {least}")
    positive = {"cpus_per_worker": runtime.cpus_per_worker, "optimizer.clip": optimizer.clip, "spike": config.spike}
    positive["optimizer.eps"] = optimizer.eps
    for field, value in positive.items():
        if value is not None and not (math.isfinite(value) and value > 0):
            raise UserError(f"{field} {value} must be a number above 0")
    shares = {
        "ema_decay": config.ema_decay,
        "label_smoothing": config.label_smoothing,
        "model.dropout": config.model.dropout,
        "model.drop_path": config.model.drop_path,
        "optimizer.betas[0]": optimizer.betas[0],
        "optimizer.betas[1]": optimizer.betas[1],
        "optimizer.momentum": optimizer.momentum,
    }
    for field, value in shares.items():
        if not 0 <= value < 1:
            raise UserError(f"{field} {value} must be at least 0 and below 1")
    if config.seed >= MAX_SEED:
        raise UserError(f"seed {config.seed} must be below {MAX_SEED}")
    least_workers = runtime.min_workers
    if least_workers is not None and not 1 <= least_workers <= runtime.workers:
        raise UserError(f"min_workers {least_workers} must be between 1 and workers ({runtime.workers})")


def check_data(config: PretrainConfig, dataset: Dataset) -> None:
    """Checks that a dataset fits this config. Raises UserError naming the flag, or how to prepare the data again."""
    uri, image, augment = config.runtime.data, dataset.manifest.image, config.augment
    if config.loss != "masked" and not dataset.classes:
        raise UserError(f"{uri} has no classes; train on labelled data, or with --loss masked")
    if len(dataset.classes) == 1 and config.loss == "softmax" and not config.runtime.one_class:
        raise UserError(
            f"{uri} has one class ({dataset.classes[0]}), so accuracy is always 100%; prepare it "
            "so that its classes are found (--class-level, --label-column, --labels), or train with --one-class"
        )
    patch = parse_variant(config.model.variant).patch
    if config.image_size < patch:
        raise UserError(
            f"--image-size {config.image_size} is smaller than one patch of {config.model.variant}; give at least {patch}"
        )
    if config.image_size % patch:
        logger.warning(
            "--image-size %d is not a multiple of the patch size of %s, %d: the last %d rows and columns of each image are ignored",
            config.image_size, config.model.variant, patch, config.image_size % patch,
        )  # fmt: skip
    if dataset.multilabel and config.loss == "softmax":
        raise UserError(f"{uri} has several labels per image; use --loss sigmoid (and --model.head-bias -10)")
    if config.batch_size > len(dataset):
        batch = 1 << len(dataset).bit_length() - 1
        lanes = config.lanes or default_lanes(batch, smallest(dataset))
        if batch % lanes:
            lanes = default_lanes(batch, smallest(dataset))
        more = f" --lanes {lanes}" if config.lanes not in (None, lanes) else ""
        more += " --workers 1" if lanes % config.runtime.workers else ""
        raise UserError(
            f"--batch-size {config.batch_size} is larger than {uri} with {plural(len(dataset), 'image')}; "
            f"give --batch-size {batch}{more}, or use more images"
        )
    if dataset.encoding == "patches":
        if (image["height"], image["width"], image["patch_size"]) != (config.image_size, config.image_size, patch):
            raise UserError(
                f"{uri} holds {image['height']}x{image['width']} images cut into patches of {image['patch_size']}, but the "
                f"run has image_size {config.image_size} and {config.model.variant}; prepare with --size and "
                "--patch-size to match, or use encoding jpeg"
            )
        if augment.crop == "inception" or augment.randaug_layers:
            raise UserError(f"{uri} is already cut into patches, so only flips are possible; use --augment.crop squash")
    elif augment.size != config.image_size:
        raise UserError(
            f"--augment.size {augment.size}, the training crop, differs from --image-size {config.image_size}; set both to "
            "the same value"
        )
