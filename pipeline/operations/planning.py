"""What a run will take, before anything is rented: memory, time, money, data rate, storage, checkpoints.

    print(dry_run(config, "b16_imagenet", {}))       # what jobs/pretrain.py --dry-run prints
    result = plan(PlanConfig(training=RECIPES["h14_jft300m_14ep"](), gpus=64, gpu="h100"), "h14_jft300m_14ep")
    print(table(result))

Counted, not guessed: parameters and FLOPs (the model on torch's meta device), model states of each ZeRO stage, and the
tensors that the backward pass keeps (one forward pass on shapes alone). Assumed, and flags of jobs/plan.py where it
matters: utilisation, prices, failure rate, write speed, bytes and CPU time of an image (module constants, measured).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pipeline import config as configuration
from pipeline import storage
from pipeline.data.format import ROW_GROUP_BYTES, SHARD_BYTES
from pipeline.errors import UserError
from pipeline.hardware import find_gpu
from pipeline.training.config import PretrainConfig

if TYPE_CHECKING:
    from pipeline.data.format import Dataset
    from pipeline.training.plan import TrainPlan

GB = 1e9

# Left to the CUDA context, NCCL, kernels and the allocator's fragments.
USABLE_MEMORY = 0.92
# DeepSpeed gathers gradients for reduction in a buffer of so many elements (reduce_bucket_size's default).
BUCKET_ELEMENTS = 500_000_000

# Images and classes of the corpora that recipes are named after (arXiv 2010.11929, section 4.1; torchvision for ImageNet).
CORPORA = {
    "jft": (303_000_000, 18_291),
    "imagenet21k": (14_000_000, 21_843),
    "imagenet": (1_281_167, 1_000),
    "augreg21k": (14_000_000, 21_843),
    "augreg": (1_281_167, 1_000),
    "cifar10": (50_000, 10),
    "demo": (1_437, 10),
}

# A stored image of side 256 (jpeg) or 224 (patches), and the CPU time to hand it to the device, cropped and flipped
# (tests/benchmarks/results/loader_speed.json, one core). Both grow with the area. "originals" are ImageNet's own files.
JPEG_BYTES, JPEG_SECONDS = 24_000, 0.58e-3
PATCH_SECONDS = 0.024e-3
ORIGINAL_BYTES, ORIGINAL_SECONDS = 110_000, 1.4e-3
PREPARE_SECONDS = 2.0e-3  # decode an original, shrink to 256, encode

CPU_UTILISATION = 0.4  # of the rate of large matrix products, by small models on two cores

GET_PRICE = 0.4e-6  # $ per request of S3 standard, one for each row group

# Table 2 of the paper: recipe -> TPUv3 core-days of pre-training.
PAPER_CORE_DAYS = {"h14_jft300m_14ep": 2500, "l16_jft300m_14ep": 680, "l16_imagenet21k_90ep": 230}


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanConfig:
    """What the plan is made for. Fields of the recipe are flags under --training."""

    training: PretrainConfig = field(default_factory=PretrainConfig)
    gpus: int = 8
    """Number of GPUs."""
    gpu: str = "h100"
    """GPU model: h100, h200, gh200, b200, a100, a100-40gb, l40s, a10g, l4 or v100."""
    gpus_per_node: int = 8
    """GPUs per machine."""
    price: float = 2.5
    """Price in $ per GPU-hour."""
    mfu: float = 0.4
    """Model FLOPs utilisation, 0 to 1: the share of the GPU's dense bf16 peak that training reaches, without
    recomputed activations."""
    images: float | None = None
    """Images in the corpus. Published recipes know theirs; otherwise it is read from --training.data."""
    classes: int | None = None
    """Classes in the corpus. Published recipes know theirs; otherwise it is read from --training.data."""
    storage_price: float = 0.023
    """Price of object storage in $ per GB and month."""
    failure_hours: float = 50_000
    """GPU-hours between failures that stop the run. Llama 3 reports 419 failures in 54 days on 16,384 GPUs."""
    write_gbps: float = 1.0
    """Speed at which one node writes a checkpoint, in GB/s."""
    corpus_images: float | None = None
    """Also plan jobs/prepare.py for this number of original images."""
    cores: int = 64
    """CPU cores for jobs/prepare.py."""


def plan(config: PlanConfig, recipe: str = "") -> dict[str, Any]:
    """The plan as plain values. Sizes in bytes, times in seconds or hours as named, money in dollars.

    Raises UserError for an unknown GPU, a corpus of unknown size, and workers that do not divide the batch and its lanes.
    """
    from models.cost import flops, parameters
    from pipeline.data.loading.order import check_layout, default_lanes
    from pipeline.training.plan import model_options

    training, gpu = config.training, find_gpu(config.gpu)
    for flag in ("gpus", "gpus_per_node", "mfu", "failure_hours", "write_gbps", "cores"):
        if getattr(config, flag) <= 0:
            raise UserError(f"--{flag.replace('_', '-')} must be more than 0")
    images, classes = _corpus(config, recipe)
    check_layout(training.batch_size, training.lanes or default_lanes(training.batch_size, images), config.gpus)

    options = model_options(training, classes)
    count, forward = parameters(options), flops(options)
    train_flops = 3 * flops(options, patch_keep_rate=training.patch_keep_rate)
    peak = gpu.peak_flops
    rate = config.gpus * peak * config.mfu / train_flops * (3 / 4 if training.engine.activation_checkpointing else 1)
    units = {"batch_size": training.batch_size, "examples_per_epoch": images}
    steps = configuration.steps(training.steps, **units)
    seen = steps * training.batch_size
    hours = seen / rate / 3600
    step_seconds = training.batch_size / rate
    nodes = math.ceil(config.gpus / config.gpus_per_node)

    checkpoint = checkpoint_bytes(count, optimizer=training.optimizer.name, average=bool(training.ema_decay))
    write_seconds = checkpoint["total"] / (nodes * config.write_gbps * GB)
    interval = checkpoint_interval(write_seconds, config.failure_hours / config.gpus * 3600)
    result: dict[str, Any] = {
        "recipe": recipe,
        "model": {
            "variant": training.model.variant,
            "parameters": count,
            "forward_gflops_per_image": forward / 1e9,
            "image_size": training.image_size,
        },
        "hardware": {
            "gpus": config.gpus,
            "gpu": config.gpu.lower(),
            "nodes": nodes,
            "memory": gpu.memory,
            "mfu": config.mfu,
        },
        "memory": memory(config, options, count),
        "run": {
            "images": images,
            "classes": classes,
            "steps": steps,
            "images_seen": seen,
            "train_exaflops": seen * train_flops / 1e18,
            "images_per_second": rate,
            "step_seconds": step_seconds,
            "hours": hours,
            "gpu_hours": hours * config.gpus,
            "cost": hours * config.gpus * config.price,
        },
        "data": data_plane(config, images, seen, rate),
        "checkpoint": {
            **checkpoint,
            "write_seconds": write_seconds,
            "interval_seconds": interval,
            "interval_steps": max(1, round(interval / step_seconds)),
            "recipe_interval_steps": configuration.steps(training.runtime.checkpoint_every, **units, total_steps=steps),
            "expected_failures": hours * config.gpus / config.failure_hours,
        },
        "paper": paper_costs(config),
    }
    if config.corpus_images:
        result["prepare"] = prepare_plan(config, round(config.corpus_images))
    return result


def _corpus(config: PlanConfig, recipe: str) -> tuple[int, int]:
    """(images, classes): as given, as published, or as in the dataset that the config names."""
    images, classes = next((size for key, size in CORPORA.items() if key in recipe), (None, None))
    if images is None and config.images is None:
        from pipeline.data import open_dataset

        try:
            dataset = open_dataset(config.training.runtime.data)
        except UserError as error:
            raise UserError(f"how large is the corpus? give --images and --classes ({error})") from error
        images, classes = len(dataset), len(dataset.classes)
    given = images if config.images is None else round(config.images)
    if not given or given < config.training.batch_size:
        raise UserError(f"--images {given} is less than one batch of {config.training.batch_size}")
    return given, classes or 1_000 if config.classes is None else config.classes


# ---------------------------------------------------------------- memory


def model_states(
    parameters: int,
    stage: int,
    gpus: int,
    *,
    precision: str = "bf16",
    optimizer: str = "adamw",
    offload: bool = False,
    average: bool = False,
    largest_layer: int = 0,
) -> int:
    """Bytes per GPU of parameters, gradients and optimiser states under DeepSpeed (arXiv 1910.02054, section 3.1).

    In bf16: 2 for the parameter and 2 for its gradient; in float32 4 for the master copy, 8 for Adam's moments and 4 for the
    gradient that the optimiser steps with. Stage 1 divides the float32 part by the number of GPUs, 2 also the gradients,
    3 also the parameters, of which one layer (`largest_layer` elements) is gathered at a time, with its gradient. Stage 3
    counts 18 bytes a parameter as DeepSpeed's estimator does: its low-precision gradients turn into float32 in pieces.
    """
    low = 4 if precision == "fp32" else 2
    moments = {"adamw": 8, "sgd": 4, "muon": 4}[optimizer]  # Muon: one for matrices, which are nearly everything
    # Stage 0 in float32 is a plain optimiser: no master copy beside the parameters.
    high = moments if precision == "fp32" and stage == 0 else 4 + 4 + moments
    high += 4 * average
    on_gpu = 0 if offload else high / (gpus if stage >= 1 else 1)
    gradients = 0 if stage == 3 or (offload and stage == 2) else low / (gpus if stage == 2 else 1)
    weights = low / (gpus if stage >= 3 else 1)
    return round(parameters * (on_gpu + gradients + weights)) + (2 * low * largest_layer if stage == 3 else 0)


def activations(
    options: Mapping[str, Any],
    loss: str = "softmax",
    *,
    precision: str = "bf16",
    activation_checkpointing: bool = False,
):
    """(bytes per image that the backward pass keeps, bytes of the largest of them), without parameters.

    One forward pass and loss on fake tensors, at two batch sizes: shapes and types of the real model, no memory and no
    arithmetic. torch.compile keeps less; a dropout mask counts 2 bytes an element, as on a CPU (1 on a GPU).
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from models import create_model
    from models.losses import training_loss

    options = {key: value for key, value in options.items() if key != "mpp"}
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    side, channels = options["image_size"], options.get("channels", 3)
    totals, largest = [], 0
    with torch.device("meta"):
        shapes = create_model(**options).to(dtype).train()
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = shapes.to_empty(device="cpu")
        own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        for batch in (1, 2):
            kept: dict[int, tuple[int, Any]] = {}  # the storage itself is kept, or its address would be used again

            def keep(tensor, kept=kept):
                storage = tensor.untyped_storage()
                if storage._cdata not in own:
                    kept[storage._cdata] = (storage.nbytes(), storage)
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                outputs = model(torch.empty(batch, channels, side, side, dtype=dtype))
                if loss != "masked":
                    labels = torch.zeros(batch, dtype=torch.long)
                    training_loss(outputs, {"label": labels}, loss)
            totals.append(sum(nbytes for nbytes, _ in kept.values()))
            largest = max(nbytes for nbytes, _ in kept.values()) // batch
    each = totals[1] - totals[0]
    depth = len(getattr(model, "blocks", ()))
    if activation_checkpointing and depth:  # every block's input stays, one block at a time has the rest
        tokens = model.grid**2 + model.prefix
        each = round(each / depth) + depth * tokens * model.shape.width * dtype.itemsize
    return each, largest


def memory(config: PlanConfig, options: Mapping[str, Any], parameters: int) -> dict[str, Any]:
    """Bytes per GPU for each ZeRO stage, and the largest micro-batch that fits beside the model states.

    micro_batch 0: not even one image fits. `used` is that of the largest micro-batch.
    """
    training, engine = config.training, config.training.engine
    share = training.batch_size // config.gpus
    usable = find_gpu(config.gpu).memory * USABLE_MEMORY
    each, largest = activations(
        options, training.loss, precision=engine.precision, activation_checkpointing=engine.activation_checkpointing
    )
    each = round(each * training.patch_keep_rate)
    working = 3 * largest  # the tensors of the operation under way: its output's gradient and two temporaries
    stages = {}
    for stage in range(4):
        states = model_states(
            parameters,
            stage,
            config.gpus,
            precision=engine.precision,
            optimizer=training.optimizer.name,
            offload=engine.offload and stage > 0,
            average=bool(training.ema_decay),
            largest_layer=_largest_layer(options),
        )
        buffers = BUCKET_ELEMENTS * (4 if engine.precision == "fp32" else 2) if stage else 0
        fits = max(0, int((usable - states - buffers) // (each + working)))
        micro = max((n for n in range(1, share + 1) if share % n == 0 and n <= fits), default=0)
        stages[str(stage)] = {
            "model_states": states,
            "buffers": buffers,
            "micro_batch": micro,
            "accumulation": share // micro if micro else 0,
            "used": states + buffers + micro * (each + working),
        }
    return {
        "usable": round(usable),
        "activations_per_image": each,
        "working_per_image": working,
        "images_per_gpu": share,
        "stage": engine.zero,
        "stages": stages,
    }


def _largest_layer(options: Mapping[str, Any]) -> int:
    """Elements of the largest module that ZeRO-3 gathers at once."""
    import torch

    from models import create_model

    with torch.device("meta"):
        model = create_model(**options)
    return max(sum(p.numel() for p in module.parameters(recurse=False)) for module in model.modules())


# ---------------------------------------------------------------- data, checkpoints, costs


def data_plane(config: PlanConfig, images: int, seen: int, rate: float) -> dict[str, Any]:
    """What storage and CPUs must deliver at `rate` images a second, by how the images are stored."""
    side = config.training.image_size
    channels, area = 3, (side / 224) ** 2
    forms = {
        "jpeg": (JPEG_BYTES * area, JPEG_SECONDS * area),
        "patches": (side * side * channels, PATCH_SECONDS * area),
        "originals": (ORIGINAL_BYTES, ORIGINAL_SECONDS),
    }
    return {
        name: {
            "bytes_per_image": round(size),
            "stored": round(images * size),
            "storage_cost_per_month": images * size / GB * config.storage_price,
            "read_bytes_per_second": rate * size,
            "cores": rate * seconds,
            "read": round(seen * size),
            "request_cost": seen * size / ROW_GROUP_BYTES * GET_PRICE if name != "originals" else seen * GET_PRICE,
        }
        for name, (size, seconds) in forms.items()
    }


def checkpoint_bytes(parameters: int, *, optimizer: str = "adamw", average: bool = False) -> dict[str, int]:
    """Bytes of one checkpoint, all in float32: model.safetensors, and the state that training continues from."""
    copies = {"adamw": 3, "sgd": 2, "muon": 2}[optimizer] + average
    weights = 4 * parameters * (1 + average)  # the average has a file of its own
    return {"weights": weights, "state": 4 * parameters * copies, "total": weights + 4 * parameters * copies}


def checkpoint_interval(write_seconds: float, seconds_between_failures: float) -> float:
    """Seconds between checkpoints that lose the least time to writing and to repeated work.

    Daly, "A higher order estimate of the optimum checkpoint interval" (2006), eq. 37; its first term is Young's (1974).
    """
    if write_seconds >= 2 * seconds_between_failures:
        return seconds_between_failures
    x = write_seconds / (2 * seconds_between_failures)
    young = math.sqrt(2 * write_seconds * seconds_between_failures)
    return young * (1 + math.sqrt(x) / 3 + x / 9) - write_seconds


def paper_costs(config: PlanConfig) -> list[dict[str, Any]]:
    """The paper's own pre-training runs (Table 2) on the planned GPU, beside the TPUs' time."""
    from models.cost import flops
    from pipeline.training.plan import model_options
    from pipeline.training.recipes import RECIPES

    peak = find_gpu(config.gpu).peak_flops
    rows = []
    for recipe, core_days in PAPER_CORE_DAYS.items():
        training = RECIPES[recipe]()
        images, classes = next(size for key, size in CORPORA.items() if key in recipe)
        steps = configuration.steps(training.steps, batch_size=training.batch_size, examples_per_epoch=images)
        total = (
            3
            * flops(model_options(training, classes), patch_keep_rate=training.patch_keep_rate)
            * steps
            * training.batch_size
        )
        hours = total / (peak * config.mfu) / 3600
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
    """jobs/prepare.py over so many original images (110 KB each, shrunk to a shorter side of 256)."""
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


# ---------------------------------------------------------------- before a run starts


def dry_run(training: PretrainConfig, recipe: str, changes: dict[str, tuple[Any, Any]]) -> str:
    """The whole plan of a pre-training run as text; nothing is started, and nothing but a manifest is read.

    changes: what differs from the recipe. Where the data is in place, everything is checked that a real start checks;
    where it is not, the published corpus of the recipe stands in. Raises UserError for what could not work.
    """
    from pipeline.data import open_dataset
    from pipeline.training import run
    from pipeline.training.plan import make_plan

    note = ""
    try:
        open_dataset(training.runtime.data)
    except UserError as error:
        resolved = make_plan(training, stand_in(training, recipe, error), training.runtime.workers)
        note = f"  note      no dataset at {training.runtime.data} yet: planned for {resolved.samples:,} images of the recipe's corpus\n"
    else:
        resolved = run.check_run(training)
        run.held_by(resolved, storage.normalise(training.runtime.output))
    text = run.describe_run(resolved, changes) + "\n" + note
    if training.runtime.gpus:
        about = PlanConfig(
            training=training, gpus=training.runtime.workers, images=resolved.samples, classes=len(resolved.classes)
        )
        text += table(plan(about, recipe))
    else:
        text += _cost_on_cpu(resolved)
    derived = configuration.to_yaml(resolved.derived)
    return f"{text}\n\n# every value (a file for --config)\n{configuration.to_yaml(training)}\n# derived from them and from the data\n{derived}"


def _cost_on_cpu(resolved: "TrainPlan") -> str:
    import torch

    from models.cost import flops
    from pipeline.hardware import peak_flops

    training = resolved.config
    work = (
        3
        * flops(resolved.model_options, patch_keep_rate=training.patch_keep_rate)
        * resolved.total
        * training.batch_size
    )
    peak = peak_flops(torch.device("cpu"), training.engine.precision)
    return (
        f"  cost      {work / 1e12:,.3g} teraFLOPs: about {_hours(work / (CPU_UTILISATION * peak) / 3600)} at "
        f"{CPU_UTILISATION:.0%} of the {peak / 1e9:,.0f} GFLOP/s of this machine's matrix products"
    )


def stand_in(training: PretrainConfig, recipe: str, missing: UserError) -> "Dataset":
    """A dataset of the size of the recipe's published corpus. Raises `missing` when there is none."""
    from pipeline.data.format import Dataset, Manifest

    size = next((size for key, size in CORPORA.items() if key in recipe), None)
    if size is None:
        raise missing
    images, classes = size
    manifest = Manifest(
        encoding="jpeg",
        image={"size": max(256, training.image_size)},
        multilabel=training.loss == "sigmoid",
        rows=images,
        inputs=images,
        fingerprint="none yet",
        classes=[str(number) for number in range(classes)],
    )
    return Dataset(training.runtime.data, manifest)


# ---------------------------------------------------------------- the table


def table(result: dict[str, Any]) -> str:
    """The plan for people."""
    model, hardware, run = result["model"], result["hardware"], result["run"]
    memory, checkpoint = result["memory"], result["checkpoint"]
    lines = [
        f"{result['recipe']}: {model['variant']} at {model['image_size']} px on {hardware['gpus']} x {hardware['gpu']}, "
        f"{hardware['mfu']:.0%} MFU",
        f"  model        {model['parameters'] / 1e6:,.1f}M parameters, {model['forward_gflops_per_image']:,.2f} GFLOPs per image forward",
        f"  corpus       {run['images']:,} images, {run['classes']:,} classes",
        f"  run          {run['steps']:,} steps, {run['images_seen']:,} images seen, {run['train_exaflops']:,.4g} exaFLOPs",
        f"  speed        {run['images_per_second']:,.0f} img/s, {run['step_seconds']:.3g} s a step",
        f"  time         {_hours(run['hours'])}, {run['gpu_hours']:,.0f} GPU-hours, ${run['cost']:,.0f}",
        "",
        f"  memory per GPU ({_size(memory['usable'])} usable; activations {_size(memory['activations_per_image'])} an image, "
        f"{memory['images_per_gpu']} images per GPU and step)",
        f"    {'':10s}{'model states':>14s}{'buffers':>10s}{'micro-batch':>13s}{'accumulate':>12s}{'used':>10s}",
    ]
    for stage, row in memory["stages"].items():
        chosen = "  <- recipe" if int(stage) == memory["stage"] else ""
        micro, accumulation = (row["micro_batch"], row["accumulation"]) if row["micro_batch"] else ("none fits", "")
        lines.append(
            f"    {f'ZeRO-{stage}':10s}{_size(row['model_states']):>14s}{_size(row['buffers']):>10s}{micro:>13}{accumulation:>12}"
            f"{_size(row['used']):>10s}{chosen}"
        )
    lines += [
        "",
        f"  data plane for {run['images_per_second']:,.0f} img/s",
        f"    {'':10s}{'an image':>10s}{'stored':>10s}{'$/month':>9s}{'read at':>12s}{'cores':>8s}{'read in all':>13s}{'GETs $':>8s}",
    ]
    for name, row in result["data"].items():
        lines.append(
            f"    {name:10s}{_size(row['bytes_per_image']):>10s}{_size(row['stored']):>10s}{row['storage_cost_per_month']:>9,.0f}"
            f"{_size(row['read_bytes_per_second']) + '/s':>12s}{row['cores']:>8,.1f}{_size(row['read']):>13s}{row['request_cost']:>8,.0f}"
        )
    lines += [
        "",
        f"  checkpoint   {_size(checkpoint['total'])} ({_size(checkpoint['weights'])} weights), written in "
        f"{checkpoint['write_seconds']:.1f} s; {checkpoint['expected_failures']:.2g} failures expected: best every "
        f"{checkpoint['interval_steps']:,} steps ({checkpoint['interval_seconds'] / 60:.0f} min), the recipe has "
        f"{checkpoint['recipe_interval_steps']:,}",
        "",
        "  the paper's runs (Table 2) on this GPU",
        f"    {'':24s}{'exaFLOPs':>10s}{'TPUv3 core-days':>17s}{'GPU-days':>10s}{'cost':>10s}",
    ]
    for row in result["paper"]:
        lines.append(
            f"    {row['recipe']:24s}{row['train_exaflops']:>10,.0f}{row['tpu_v3_core_days']:>17,}{row['gpu_days']:>10,.1f}"
            f"{'$' + format(row['cost'], ',.0f'):>10s}"
        )
    if prepare := result.get("prepare"):
        lines += [
            "",
            f"  prepare      {prepare['images']:,} originals, {_size(prepare['input_bytes'])}: {prepare['core_hours']:,.0f} "
            f"core-hours, {_hours(prepare['hours'])} on {prepare['cores']} cores",
        ]
        for name, row in prepare["output"].items():
            lines.append(
                f"    {name:10s}{_size(row['bytes']):>10s} in {row['shards']:,} shards, ${row['storage_cost_per_month']:,.0f} a month"
            )
    return "\n".join(lines)


def _size(count: float) -> str:
    for unit, factor in (("PB", 1e15), ("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if count >= factor:
            return f"{count / factor:.3g} {unit}"
    return f"{count:.0f} B"


def _hours(hours: float) -> str:
    if hours < 1:
        return f"{hours * 60:.1f} minutes"
    return f"{hours:.1f} hours" if hours < 96 else f"{hours / 24:.1f} days"
