"""Bytes per GPU: model states of each ZeRO stage, activations, and the micro-batch that fits."""

from collections.abc import Mapping
from typing import Any

from pipeline.hardware import find_gpu
from pipeline.operations.planning.config import PlanConfig

# Left to the CUDA context, NCCL, kernels and the allocator's fragments.
USABLE_MEMORY = 0.92
# DeepSpeed gathers gradients for reduction in a buffer of so many elements (reduce_bucket_size's default).
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

    In bf16: 2 for the parameter and 2 for its gradient; in float32 4 for the master copy, 8 for Adam's moments and 4 for the
    gradient that the optimiser steps with. Stage 1 divides the float32 part by the number of GPUs, 2 also the gradients,
    3 also the parameters, of which one layer (`largest_layer` elements) is gathered at a time, with its gradient. Stage 3
    counts 18 bytes a parameter as DeepSpeed's estimator does: its low-precision gradients turn into float32 in pieces.
    """
    low = 4 if precision == "fp32" else 2
    moments = {"adamw": 8, "sgd": 4, "muon": 4}[optimizer]  # Muon: one for matrices, which are nearly everything
    # Stage 0 in float32 is a plain optimiser: no master copy beside the parameters.
    high = moments if precision == "fp32" and stage == 0 else 4 + 4 + moments
    high += 4 * ema
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
            ema=bool(training.ema_decay),
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
