"""The complete plan of a run."""

import math
from typing import Any

from models.cost import flops, parameters
from models.variants import parse_variant
from pipeline import config as configuration
from pipeline.data.loading.order import check_layout, default_lanes
from pipeline.errors import UserError
from pipeline.hardware import find_gpu
from pipeline.operations.planning.config import GB, PlanConfig, find_corpus
from pipeline.operations.planning.costs import (
    LAUNCHING,
    checkpoint_interval,
    data_plane,
    paper_costs,
    prepare_plan,
)
from pipeline.operations.planning.memory import memory
from pipeline.operations.planning.speed import step_seconds
from pipeline.training.config import PretrainConfig
from pipeline.training.disk import checkpoint_bytes
from pipeline.training.plan import model_options

# Host time for the forward and backward pass of one block, with its share of the engine: a step of S/16 with 128 images on
# an H100, which the host limits, divided by its 12 blocks (tests/benchmarks/gpu.py, section modes). Keys: what is compiled,
# and whether CUDA graphs are recorded. With graphs of the whole model the GPU may be the limit.
BLOCK_LAUNCH_SECONDS = {
    ("nothing", False): 4.1e-3,
    ("blocks", False): 4.7e-3,
    ("blocks", True): 2.1e-3,
    ("model", False): 3.3e-3,
    ("model", True): 1.3e-3,
}


def plan(config: PlanConfig, recipe: str = "") -> dict[str, Any]:
    """The plan as plain values: sizes in bytes, times in seconds or hours (the names say which), costs in dollars.
    Raises UserError for an unknown GPU, a corpus of unknown size, and a number of
    workers that does not divide the batch and its lanes."""
    training, gpu = config.training, find_gpu(config.gpu)
    sizes = ("gpus", "gpus_per_node", "cores", "images", "classes", "corpus_images")
    for flag in (*sizes, "mfu", "failure_hours", "write_gbps", "read_gbps"):
        value = getattr(config, flag)
        if value is not None and value <= 0:
            raise UserError(f"--{flag.replace('_', '-')} must be more than 0")
    if config.mfu is not None and config.mfu > 1:
        raise UserError(f"--mfu {config.mfu:g}: a fraction of the peak, at most 1")
    for flag in ("price", "storage_price"):
        if getattr(config, flag) < 0:
            raise UserError(f"--{flag.replace('_', '-')} must be at least 0")
    images, classes = find_corpus(config, recipe)
    check_layout(training.batch_size, training.lanes or default_lanes(training.batch_size, images), config.gpus)

    options = model_options(training, classes)
    count, nodes = parameters(options), math.ceil(config.gpus / config.gpus_per_node)
    needed = memory(config, options)
    run = run_costs(config, options, images, needed["stages"][str(needed["stage"])])
    result: dict[str, Any] = {
        "recipe": recipe,
        "model": {
            "variant": training.model.variant,
            "parameters": count,
            "forward_gflops_per_image": flops(options) / 1e9,
            "image_size": training.image_size,
        },
        "hardware": {
            "gpus": config.gpus,
            "gpu": config.gpu.lower(),
            "nodes": nodes,
            "memory": gpu.memory,
            "mfu": run["mfu"],
            "cpus_per_worker": training.runtime.cpus_per_worker,
        },
        "memory": needed,
        "run": {"images": images, "classes": classes, **run},
        "data": data_plane(config, images, run["images_seen"], run["wanted_images_per_second"]),
        "checkpoint": checkpoint_costs(config, count, nodes, images, run),
        "paper": paper_costs(config),
    }
    if config.corpus_images:
        result["prepare"] = prepare_plan(config, round(config.corpus_images))
    return result


def run_costs(config: PlanConfig, options: dict[str, Any], images: int, split: dict[str, Any]) -> dict[str, Any]:
    """Steps, images, FLOPs, speed, hours and dollars of a run over a corpus of `images`.

    split: how a GPU's part of the batch is computed (`memory`): micro_batch and accumulation. The speed is the smallest
    of `limits`; wanted_images_per_second is the speed of a run that never waits for data."""
    training = config.training
    train_flops = 3 * flops(options, patch_keep_rate=training.patch_keep_rate)
    rates = limits(config, options, split)
    rate = min(rates.values())
    steps = configuration.steps(training.steps, batch_size=training.batch_size, examples_per_epoch=images)
    seen = steps * training.batch_size
    hours = seen / rate / 3600
    return {
        "steps": steps,
        "images_seen": seen,
        "train_exaflops": seen * train_flops / 1e18,
        "images_per_second": rate,
        "wanted_images_per_second": min(rates["gpus"], rates["launching"]),
        "mfu": rates["gpus"] * train_flops / (config.gpus * find_gpu(config.gpu).peak_flops),
        "limits": rates,
        "launch_seconds": launch_seconds(training, options),
        "limited_by": min(rates, key=lambda name: rates[name]),
        "step_seconds": training.batch_size / rate,
        "hours": hours,
        "gpu_hours": hours * config.gpus,
        "cost": hours * config.gpus * config.price,
    }


def limits(config: PlanConfig, options: dict[str, Any], split: dict[str, Any]) -> dict[str, float]:
    """Images per second that each part of the run allows: the GPUs, kernel launches, decoding of JPEG shards on the
    CPUs, and reading the shards. Communication between GPUs is not included (tests/benchmarks/scaling.py models it).
    """
    training, nodes = config.training, math.ceil(config.gpus / config.gpus_per_node)
    passes = 3 + recomputed_share(training)
    image = data_plane(config, 1, 1, 1.0)["jpeg"]
    micro = training.engine.micro_batch
    parts = training.batch_size // config.gpus // micro if micro else split["accumulation"]
    cores = max(1, training.runtime.cpus_per_worker - LAUNCHING)
    computing = step_seconds(
        find_gpu(config.gpu), options, images=training.batch_size / config.gpus, passes=passes, mfu=config.mfu,
        partition=1 / config.gpus if training.engine.zero else 1.0, patch_keep_rate=training.patch_keep_rate,
    )  # fmt: skip
    return {
        "gpus": training.batch_size / computing,
        "launching": training.batch_size / (max(1, parts) * launch_seconds(training, options)),
        "decoding": config.gpus * cores / image["cores"],
        "reading": nodes * config.read_gbps * GB / image["read_bytes_per_second"],
    }


def launch_seconds(training: PretrainConfig, options: dict[str, Any]) -> float:
    """Host time for launching the kernels of a micro-batch, forward and backward."""
    engine = training.engine
    graphs = engine.compile_mode in ("reduce-overhead", "max-autotune")
    block = BLOCK_LAUNCH_SECONDS[(engine.compile_scope, graphs) if engine.compile else ("nothing", False)]
    return count_blocks(options) * block * (3 + recomputed_share(training)) / 3


def count_blocks(options: dict[str, Any]) -> int:
    """Number of transformer blocks, plus the units of a stem or ResNet."""
    shape = parse_variant(options["variant"])
    return int(options.get("depth") or shape.depth) + sum(shape.stem or ())


def recomputed_share(training: PretrainConfig) -> float:
    """Fraction of the forward pass that is recomputed. Recomputing only norms, GELU and dropout counts as 0."""
    engine, depth = training.engine, training.model.depth or parse_variant(training.model.variant).depth
    if not engine.activation_checkpointing or engine.checkpoint_keeps == "products":
        return 0.0
    if engine.checkpointed_blocks is None or not depth:
        return 1.0
    return min(engine.checkpointed_blocks, depth) / depth


def checkpoint_costs(
    config: PlanConfig, parameters: int, nodes: int, images: int, run: dict[str, Any]
) -> dict[str, Any]:
    """Size, write time and optimal interval of checkpoints. run: the result of `run_costs`."""
    training = config.training
    size = checkpoint_bytes(parameters, optimizer=training.optimizer.name, ema=bool(training.ema_decay))
    write_seconds = size["total"] / (nodes * config.write_gbps * GB)
    interval = checkpoint_interval(write_seconds, config.failure_hours / config.gpus * 3600)
    units = {"batch_size": training.batch_size, "examples_per_epoch": images}
    return {
        **size,
        "write_seconds": write_seconds,
        "interval_seconds": interval,
        "interval_steps": max(1, round(interval / run["step_seconds"])),
        "recipe_interval_steps": configuration.steps(
            training.runtime.checkpoint_every, **units, total_steps=run["steps"]
        ),
        "expected_failures": run["gpu_hours"] / config.failure_hours,
    }
