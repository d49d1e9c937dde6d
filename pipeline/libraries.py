"""Imports of libraries that only some jobs need, with the install command when one is missing.

The extras of pyproject.toml say which library belongs to which use.
"""

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
    "cloud": ("boto3",),
    "descriptor": ("faiss",),
    "gcs": ("gcsfs",),
    "heic": ("pillow_heif",),
    "vtab": ("h5py",),
    "export": ("onnx", "onnxruntime", "onnxscript", "timm", "torchvision", "transformers"),
}
"""Extra of pyproject.toml -> the libraries that it installs."""


def import_library(package: str) -> ModuleType:
    """A library of one of the EXTRAS, or a module of one. Raises UserError with the install command when it is not installed."""
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
    """Imports torchvision, which timm and transformers need. Declares its operators itself when torchvision does not load.

    An index may offer torchvision only as a CUDA build. Next to a CPU build of torch, torchvision's compiled part does not
    load, and its Python part then fails on two operators that neither timm nor transformers calls for a classifier. This
    function declares the two operators in this process. Returns the torch.library.Library that holds the declarations, and
    that must stay alive, or None when torchvision loads by itself or is not installed.
    """
    try:
        importlib.import_module("torchvision")
        return None
    except ImportError:  # not installed: the library that needs it says so
        return None
    except RuntimeError:
        import torch  # here, because storage imports this module and --help must not import torch

        logger.warning(
            "torchvision %s does not load with torch %s, so `import timm` fails outside this command; install the build of "
            "torchvision that belongs to this torch (%s)",
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
