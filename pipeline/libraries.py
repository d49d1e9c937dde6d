"""Imports of optional libraries, with the remedy when one is missing or does not load."""

import functools
import importlib
import importlib.metadata
import logging
import sys
from types import ModuleType

import torch

from pipeline.errors import UserError

logger = logging.getLogger(__name__)


def import_library(package: str) -> ModuleType:
    """A library of the `export` extra. Raises UserError when it is not installed."""
    if package in ("timm", "transformers"):
        load_torchvision()
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise UserError(f"{package} is not installed; pip install 'vit-pipeline[export]'") from error


@functools.cache
def load_torchvision() -> torch.library.Library | None:
    """Imports torchvision, which timm and transformers need; without its operators where these do not load.

    torchvision may be a CUDA build beside a CPU build of torch: its compiled part then does not load, and its Python part
    fails on two operators that neither library calls for a classifier. They are declared here, for this process alone, and
    live as long as the returned object.
    """
    try:
        importlib.import_module("torchvision")
        return None
    except ImportError:  # not installed: the library that needs it says so
        return None
    except RuntimeError:
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
