"""Bytes per GPU of the planned run under each ZeRO stage, and the largest
micro-batch that fits in the remaining memory."""

from collections.abc import Mapping
from typing import Any

from pipeline.hardware import USABLE_MEMORY, find_gpu
from pipeline.operations.planning.config import PlanConfig
from pipeline.training.memory import activations, fit_micro_batch


def memory(config: PlanConfig, options: Mapping[str, Any]) -> dict[str, Any]:
    """{"stages": {stage: its memory}, ...}. micro_batch 0: not even one image fits.
    `used` is the memory with the largest micro-batch."""
    training, engine, gpu = config.training, config.training.engine, find_gpu(config.gpu)
    share = training.batch_size // config.gpus
    kept, largest = activations(options, training.loss, engine)
    stages = {}
    for stage in range(4):
        fit = fit_micro_batch(training, options, stage=stage, gpus=config.gpus, memory=gpu.memory, images=share)
        stages[str(stage)] = {
            "model_states": fit.model_states,
            "buffers": fit.buffers,
            "micro_batch": fit.micro_batch,
            "accumulation": share // fit.micro_batch if fit.micro_batch else 0,
            "used": fit.used,
        }
    return {
        "usable": round(gpu.memory * USABLE_MEMORY),
        "activations_per_image": round(kept * training.patch_keep_rate),
        "working_per_image": 3 * largest,
        "images_per_gpu": share,
        "stage": engine.zero,
        "stages": stages,
    }
