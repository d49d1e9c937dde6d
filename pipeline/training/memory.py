"""Bytes per GPU: model states of each ZeRO stage, activations, and the micro-batch that fits.

    fit = fit_micro_batch(config, options, stage=1, gpus=8, memory=80e9, images=512)
    fit.micro_batch    # images per forward pass: the largest divisor of 512 that fits in addition to the model states

Sizes are computed on torch's meta device and with fake tensors, without allocating memory. jobs/plan.py prints them, and a
run on GPUs uses the micro-batch (`pipeline.training.plan`). tests/integration/test_memory_plan.py compares the estimates
with the memory that torch allocates.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from models.variants import parse_variant
from pipeline.hardware import USABLE_MEMORY
from pipeline.training.config import EngineConfig, PretrainConfig

# Elements of the buffer in which DeepSpeed collects gradients for reduction (default of reduce_bucket_size).
BUCKET_ELEMENTS = 500_000_000


def model_states(
    parameters: int,
    stage: int,
    gpus: int,
    *,
    precision: str = "bf16",
    optimizer: str = "adamw",
    offload: bool = False,
    ema: bool = False,
    largest_layer: int = 0,
) -> int:
    """Bytes per GPU of parameters, gradients and optimiser states under DeepSpeed (arXiv 1910.02054, section 3.1).

    Bytes per parameter in bf16: 2 for the parameter and 2 for its gradient; and in float32 4 for the master copy, 8 for
    Adam's moments and 4 for the gradient of the optimiser. Stage 1 divides the float32 part by the number of GPUs,
    stage 2 also the gradients, and stage 3 also the parameters, of which one layer (`largest_layer` elements) is
    gathered at a time with its gradient. Stage 3 counts 18 bytes per parameter, like DeepSpeed's estimator, because it
    converts gradients to float32 in parts."""
    low = 4 if precision == "fp32" else 2
    moments = {"adamw": 8, "sgd": 4, "muon": 4}[optimizer]  # Muon: one moment per matrix
    # Stage 0 in float32 is a plain optimiser without a master copy.
    high = moments if precision == "fp32" and stage == 0 else 4 + 4 + moments
    high += 4 * ema
    on_gpu = 0 if offload else high / (gpus if stage >= 1 else 1)
    gradients = 0 if stage == 3 or (offload and stage == 2) else low / (gpus if stage == 2 else 1)
    weights = low / (gpus if stage >= 3 else 1)
    return round(parameters * (on_gpu + gradients + weights)) + (2 * low * largest_layer if stage == 3 else 0)


def activations(
    options: Mapping[str, Any], loss: str = "softmax", engine: EngineConfig | None = None
) -> tuple[int, int]:
    """(bytes per image that the backward pass needs at once, bytes of its largest tensor), without parameters.

    Measures the tensors that one forward pass and loss save on fake tensors, at two batch sizes, with the shapes and
    types of the real model. Of `engine`, the precision and activation checkpointing matter: a recomputed block stores
    its input (with `checkpoint_keeps` "products" also the results of its matrix products and attention), and one block
    at a time stores everything. torch.compile stores less. A dropout mask counts 2 bytes per element, as on a CPU (1 on
    a GPU). The stem of a hybrid counts as not recomputed."""
    engine = engine or EngineConfig()
    options = {key: value for key, value in options.items() if key != "mpp"}

    def saved(**changes: int) -> tuple[int, int, _Sizes]:
        return _saved(tuple(sorted({**options, **changes}.items())), loss, engine.precision)

    shape = parse_variant(options["variant"])
    depth = options.get("depth") or shape.depth
    if depth < 3:
        each, largest, sizes = saved()
        block = saved(depth=depth + 1)[0] - each if depth else 0
    else:  # all blocks except the first and the last are equal, so models with two and three blocks determine the rest
        (each, largest, sizes), (more, _, _) = saved(depth=2), saved(depth=3)
        block = more - each
        each += (depth - 2) * block
    if not engine.activation_checkpointing or not depth:
        return each, largest
    recomputed = depth if engine.checkpointed_blocks is None else min(engine.checkpointed_blocks, depth)
    width = 4 if engine.precision == "fp32" else 2
    kept = sizes.tokens * sizes.width * width
    if (
        engine.checkpoint_keeps == "products"
    ):  # q, k and v; attention and its normaliser; its projection; both layers of the MLP
        kept += sizes.tokens * ((6 * sizes.width + sizes.mlp) * width + 4 * sizes.heads)
    # The backward pass begins with the last block. If that block is recomputed, its activations are added to all
    # others.
    again = block - kept if recomputed == depth else 0
    return min(each, each - recomputed * (block - kept) + again), largest


@dataclass(frozen=True, slots=True)
class _Sizes:
    """Sizes of the blocks of a transformer; zeros for a ResNet."""

    tokens: int = 0
    width: int = 0
    mlp: int = 0
    heads: int = 0


@functools.lru_cache(maxsize=32)
def _saved(options: tuple, loss: str, precision: str) -> tuple[int, int, _Sizes]:
    """(bytes per image that autograd saves, bytes of the largest tensor, sizes), without recomputation."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from models import create_model
    from models.losses import training_loss

    config: dict[str, Any] = dict(options)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    side, channels = config["image_size"], config.get("channels", 3)
    totals, largest = [], 0
    with torch.device("meta"):
        shapes = create_model(**config).to(dtype).train()
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = shapes.to_empty(device="cpu")
        own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        for batch in (1, 2):
            kept: dict[int, tuple[int, Any]] = {}  # the storage is kept alive, so that its address is not reused

            def keep(tensor: Any, kept: dict[int, tuple[int, Any]] = kept) -> Any:
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
    sizes = _Sizes()
    if hasattr(model, "blocks") and hasattr(model, "shape"):
        shape = model.shape
        sizes = _Sizes(model.grid**2 + model.prefix, shape.width, shape.mlp, shape.heads)
    return totals[1] - totals[0], largest, sizes


@dataclass(frozen=True, kw_only=True, slots=True)
class Fit:
    """Memory use of one GPU, in bytes."""

    model_states: int
    buffers: int
    per_image: int
    """Stored activations, and the tensors of the current operation."""
    micro_batch: int
    """The largest number of images that fits; 0 if none does."""

    @property
    def used(self) -> int:
        return self.model_states + self.buffers + self.micro_batch * self.per_image


def fit_micro_batch(
    config: PretrainConfig, options: Mapping[str, Any], *, stage: int, gpus: int, memory: float, images: int
) -> Fit:
    """The largest divisor of `images` that fits into `memory` bytes per GPU, with the model states of ZeRO `stage` on
    `gpus` GPUs.

    options: arguments of `create_model`.
    """
    engine = config.engine
    kept, largest = activations(options, config.loss, engine)
    # the current operation: the gradient of its output and two temporary tensors
    per_image = round(kept * config.patch_keep_rate) + 3 * largest
    count, layer = _parameters(tuple(sorted(options.items())))
    states = model_states(
        count,
        stage,
        gpus,
        precision=engine.precision,
        optimizer=config.optimizer.name,
        offload=engine.offload and stage > 0,
        ema=bool(config.ema_decay),
        largest_layer=layer,
    )
    buffers = BUCKET_ELEMENTS * (4 if engine.precision == "fp32" else 2) if stage else 0
    room = int((USABLE_MEMORY * memory - states - buffers) // per_image)
    micro = max((n for n in range(1, images + 1) if images % n == 0 and n <= room), default=0)
    return Fit(model_states=states, buffers=buffers, per_image=per_image, micro_batch=micro)


@functools.lru_cache(maxsize=32)
def _parameters(options: tuple) -> tuple[int, int]:
    """(parameters of the model, elements of the largest module that ZeRO-3 gathers at once)."""
    import torch

    from models import create_model

    with torch.device("meta"):
        model = create_model(**dict(options))
    largest = max(sum(p.numel() for p in module.parameters(recurse=False)) for module in model.modules())
    return sum(p.numel() for p in model.parameters()), largest
