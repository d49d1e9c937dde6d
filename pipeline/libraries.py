"""Imports optional libraries. The error for a missing library contains the install command."""

import functools
import importlib
import importlib.metadata
import logging
import sys
from types import ModuleType
from typing import Any

from pipeline.errors import UserError

logger = logging.getLogger(__name__)

EXTRAS = {
    "azure": ("adlfs",),
    "descriptor": ("faiss",),
    "gcs": ("gcsfs",),
    "heic": ("pillow_heif",),
    "http": ("aiohttp",),
    "huggingface": ("aiohttp", "huggingface_hub"),
    "s3": ("boto3",),
    "vtab": ("h5py",),
    "export": ("onnx", "onnxruntime", "onnxscript", "timm", "torchvision", "transformers"),
}
"""Extra of pyproject.toml -> the libraries that it installs."""


def import_library(package: str) -> ModuleType:
    """Imports a library of one of the EXTRAS, or a module of one. Raises UserError with the install command if it is missing."""
    if package in ("timm", "transformers"):
        load_torchvision()
    try:
        return importlib.import_module(package)
    except ImportError as error:
        library = package.partition(".")[0]
        extra = next(name for name, packages in EXTRAS.items() if library in packages)
        raise UserError(
            f"{library} is not installed or does not load ({error}): pip install -c constraints.txt -e '.[{extra}]'"
        ) from error


@functools.cache
def load_torchvision() -> Any:
    """Imports torchvision, which timm and transformers need. Declares two missing operators if torchvision does not
    load.

    Some package indexes provide torchvision only as a CUDA build. With a CPU build of torch, its compiled part does not
    load, and its Python part fails on two operators that classifiers of timm and transformers do not call. This
    function declares them in this process. Returns the torch.library.Library with the declarations, which must be kept
    alive, or None if torchvision loads or is not installed."""
    try:
        importlib.import_module("torchvision")
        return None
    except ImportError:  # not installed: the library that needs torchvision reports it
        return None
    except RuntimeError:
        import torch  # imported here, because storage imports this module and --help must not import torch

        logger.warning(
            "torchvision %s does not load with torch %s, so `import timm` fails outside this command; install the "
            "build of torchvision that matches this torch (%s)",
            importlib.metadata.version("torchvision"),
            torch.__version__,
            torch.__version__.partition("+")[2] or "cpu",
        )
    operators = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    return operators
