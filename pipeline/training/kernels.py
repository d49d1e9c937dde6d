"""Process-wide kernel settings: compilation, cuDNN autotuning, TF32, determinism."""

import os
from typing import Any, cast

import torch
from torch import nn

from models.resnet import Stages
from pipeline.training.config import EngineConfig

# Every shape and mode of a block is compiled once: training, evaluation, the last block, each kind of unit of a stem, a
# short batch. torch's default limit is 8; beyond it, torch falls back to eager mode.
COMPILATIONS = 64


def choose_kernels(model: nn.Module, config: EngineConfig, device: torch.device) -> None:
    """Applies the config. Call it before any computation on the device.

    For models with convolutions on a GPU, cuDNN autotunes each shape unless `deterministic` is set. With it, an operation
    that has no deterministic kernel on the device raises RuntimeError.
    """
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS allocates its workspace
    # Not warn_only: with it, backward passes of attention keep their kernels that add in any order.
    torch.use_deterministic_algorithms(config.deterministic)
    if device.type != "cuda":
        return
    convolves = any(isinstance(part, Stages) for part in model.modules())
    torch.backends.cudnn.benchmark = convolves and not config.deterministic
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.tf32


def compile_model(model: nn.Module, config: EngineConfig) -> None:
    """Compiles each of `model.compiled_parts()`, or the whole model.

    Shapes are static: otherwise the second unit of a stem would be compiled for any number of channels, which takes twice
    as long.
    """
    dynamo: Any = torch._dynamo.config
    dynamo.recompile_limit = max(dynamo.recompile_limit, COMPILATIONS)
    options = {} if config.compile_mode == "default" else {"mode": config.compile_mode}
    parts = [model] if config.compile_scope == "model" else cast(Any, model).compiled_parts()
    for part in parts:
        part.compile(dynamic=False, **options)
