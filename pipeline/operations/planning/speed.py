"""Estimated time of a training step on a GPU, without communication.

    seconds = step_seconds(find_gpu("h100"), options, images=256, partition=1 / 8)

Four costs are added. Their constants come from a profile of L/16 and from steps of S/16, B/16, L/16 and H/14 on an H100
(tests/benchmarks/results/gpu_h100.json), and reproduce the measured times within 5%:

    matrix products   at MATMUL_SHARE of the GPU's peak
    attention         at ATTENTION_SHARE of the peak: 197 to 257 tokens do not fill the tiles of its kernels
    activations       LayerNorm, GELU, residual sums, biases and changes of layout, limited by the memory's bandwidth
    parameters        optimiser, gradient norm and DeepSpeed's copies, limited by the memory's bandwidth

For models with convolutions, which have not been measured, all of the work runs at CONVOLUTION_MFU."""

from typing import Any

from models.cost import attention_flops, flops, parameters, token_features
from models.variants import parse_variant
from pipeline.hardware import Gpu

MATMUL_SHARE = 0.79
ATTENTION_SHARE = 0.09
ACTIVATION_BYTES = 145
"""Memory traffic of a training step for each feature of each token in each block."""
PARAMETER_BYTES = 140
"""Memory traffic of a training step for each parameter of a worker's partition."""
CONVOLUTION_MFU = 0.4


def step_seconds(
    gpu: Gpu, options: dict[str, Any], *, images: float, partition: float, patch_keep_rate: float = 1.0,
    passes: float = 3.0, mfu: float | None = None,
) -> float:  # fmt: skip
    """Seconds per step with `images` images on one GPU. options: arguments of `create_model`. partition: fraction of
    the optimiser's work on this GPU. passes: cost of a step in forward passes, 3 without recomputation and 4 if all
    activations are recomputed. mfu: utilisation of the GPU; None: estimated.
    """
    shape = parse_variant(options["variant"])
    if mfu is None and (shape.stem is not None or not shape.depth):
        mfu = CONVOLUTION_MFU
    if mfu is not None:
        return passes * images * flops(options, patch_keep_rate=patch_keep_rate) / (gpu.peak_flops * mfu)
    attention = attention_flops(options, patch_keep_rate)
    products = flops(options, computed=True, patch_keep_rate=patch_keep_rate) - attention
    computing = (products / MATMUL_SHARE + attention / ATTENTION_SHARE) * passes / gpu.peak_flops
    moving = token_features(options, patch_keep_rate) * ACTIVATION_BYTES * passes / 3 / gpu.memory_bandwidth
    updating = parameters(options) * partition * PARAMETER_BYTES / gpu.memory_bandwidth
    return images * (computing + moving) + updating
