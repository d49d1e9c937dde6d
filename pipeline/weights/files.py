"""Reads the tensors of one weights file under their original names: .safetensors, .npz, PyTorch's .pt, .pth, .bin,
.ckpt, .tar.

Nothing is unpickled: PyTorch files are read with `weights_only=True`, .npz without `allow_pickle`.
"""

import argparse
import hashlib
import io
import pickle
import re
import zipfile
from typing import Any

import numpy as np
import safetensors.torch
import torch

from models.weights import Weights
from pipeline import storage
from pipeline.commit import check_content
from pipeline.errors import UserError, shorten
from pipeline.weights import checkpoints
from pipeline.weights.description import SUFFIXES

MAX_UNFOLDED_BYTES = 1 << 30
STATE_KEYS = (
    *("state_dict_ema", "model_ema", "ema_model", "ema_state_dict", "params_ema", "ema", "teacher", "target_encoder"),
    *("state_dict", "model_state_dict", "model_state", "model", "module", "net", "network", "student", "encoder"),
)
"""Keys under which training scripts save a state dict, in order of preference: averaged weights before trained ones."""


OTHER_FILES = [  # (first bytes, what the file is) of files with the name of weights
    (rb"$", "an empty file; fetch it again"),
    (rb"(?i)\s*<(!doctype|html|head|\?xml)", "a web page or an error message in place of the file; fetch it again"),
    (rb"\x1f\x8b|BZh|\xfd7zXZ|7z\xbc|Rar!|\x28\xb5\x2f\xfd", "a compressed file; unpack it"),
]


class _AttributeDict(dict):
    """Replaces the class of Lightning's hyperparameters, which is a dict."""


def _path(*parts: str) -> str:
    """Replaces a pathlib.Path in the settings of a training script."""
    return "/".join(parts)


# Types that training scripts (also of timm and Lightning) save with the weights: command line, settings, numbers.
_SCALAR = np.float64(0).__reduce__()[0]
HARMLESS: list[Any] = [
    argparse.Namespace,
    *((_SCALAR, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    *(np.dtype, np.dtypes.Float64DType, np.dtypes.Float32DType, np.dtypes.Int64DType),
    (_AttributeDict, "lightning_fabric.utilities.data.AttributeDict"),
    (_AttributeDict, "lightning.fabric.utilities.data.AttributeDict"),
    (_AttributeDict, "pytorch_lightning.utilities.parsing.AttributeDict"),
    *((_path, f"pathlib.{local}{kind}Path") for local in ("", "_local.") for kind in ("Posix", "Windows")),
]


def read_file(uri: str, sha256: str | None = None) -> tuple[Weights, list[str]]:
    """(tensors of a file, notes on choices among several state dicts). sha256: the expected checksum in hexadecimal.
    Raises UserError if the file is damaged, malicious or of an unknown type.
    """
    kind = uri.lower()
    if not kind.endswith(SUFFIXES):
        raise UserError(f"{uri}: unknown file type; expected one of {', '.join(SUFFIXES)}")
    local = not storage.is_remote(uri)
    if local:
        storage.refuse_special(uri)
    data: Any = uri if local else io.BytesIO(storage.read_bytes(uri))
    if sha256 is not None:
        found = checkpoints.sha256(uri) if local else hashlib.sha256(data.getbuffer()).hexdigest()
        check_content(uri, found, sha256)
    try:
        _check_kind(data, uri)
        if kind.endswith(".safetensors"):
            return (safetensors.torch.load_file(data) if local else safetensors.torch.load(data.getvalue())), []
        if kind.endswith(".npz"):
            with np.load(data, allow_pickle=False) as arrays:
                return {name: torch.from_numpy(_float_of_bfloat16(arrays[name])) for name in arrays.files}, []
        with torch.serialization.safe_globals(HARMLESS):
            return _state_dict(torch.load(data, map_location="cpu", weights_only=True), uri)
    except UserError:
        raise
    except pickle.UnpicklingError as error:
        what = re.search(r"GLOBAL ([\w.]+)", str(error))
        raise UserError(
            f"{uri}: cannot be read: {f'holds a {what[1]}' if what else 'not a file of tensors'}; a file with other "
            "objects than tensors is rejected; save its state_dict alone"
        ) from error
    except Exception as error:  # zipfile, safetensors, NumPy and torch have no common error class
        raise UserError(f"{uri}: cannot be read: {first_line(error)}") from error


def first_line(error: Exception) -> str:
    """The first line of an error message, or the class of the error if the message is empty."""
    return str(error).partition("\n")[0] or type(error).__name__


def _check_kind(data: Any, uri: str) -> None:
    """Raises UserError for a Git LFS pointer, a TorchScript archive, and a decompression bomb. .npz and .pt are zip
    files: a small file can unpack to terabytes, but weights compress by a few percent only.
    """
    if _first_bytes(data).startswith(b"version https://git-lfs"):
        raise UserError(f"{uri}: a Git LFS pointer, not the file itself: run git lfs pull in the clone")
    # a .safetensors file begins with a length, which may look like any of these
    known = [] if uri.lower().endswith(".safetensors") else OTHER_FILES
    if what := next((what for start, what in known if re.match(start, _first_bytes(data), re.DOTALL)), None):
        raise UserError(f"{uri}: {what}")
    if not zipfile.is_zipfile(data):
        return
    with zipfile.ZipFile(data) as archive:
        members = archive.infolist()
    if hasattr(data, "seek"):
        data.seek(0)
    if any("/code/" in member.filename for member in members):
        raise UserError(
            f"{uri}: a TorchScript archive (such as OpenAI's CLIP), which contains code: if you trust it, load it with "
            "torch.jit.load and save its state_dict()"
        )
    packed, unfolded = (sum(getattr(member, f) for member in members) for f in ("compress_size", "file_size"))
    if unfolded > MAX_UNFOLDED_BYTES and unfolded > 100 * packed:
        raise UserError(f"{uri}: {packed:,} bytes that unpack to {unfolded:,} are no weights")


def _first_bytes(data: Any, count: int = 64) -> bytes:
    """The first bytes of a file, given as a local path or as its content in memory."""
    if isinstance(data, io.BytesIO):
        return bytes(data.getbuffer()[:count])
    with open(data, "rb") as file:
        return file.read(count)


def _float_of_bfloat16(array: np.ndarray) -> np.ndarray:
    """Converts bfloat16, which JAX stores as a two-byte void type, to float32; other arrays are unchanged."""
    if array.dtype.kind == "V" and array.dtype.itemsize == 2:
        return (array.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return array


def _state_dict(loaded: Any, uri: str) -> tuple[Weights, list[str]]:
    """(tensors of a PyTorch file, under the key that a training script used; notes on a choice among several)."""
    notes = []
    while isinstance(loaded, dict):
        keys = [key for key in STATE_KEYS if _holds_tensors(loaded.get(key))] or _other_keys(loaded, uri)
        if not keys:
            break
        if len(keys) > 1:
            notes.append(f"the file has {' and '.join(keys)}: {keys[0]} is used")
        loaded = loaded[keys[0]]
    if not isinstance(loaded, dict) or not loaded:
        raise UserError(f"{uri}: holds a {type(loaded).__name__}, not a state dict")
    others = [str(name) for name, value in loaded.items() if not isinstance(value, torch.Tensor)]
    if others:
        raise UserError(f"{uri}: not a state dict: {shorten(others)} hold no tensors")
    if odd := [str(n) for n, t in loaded.items() if not isinstance(n, str) or t.layout != torch.strided or t.is_meta]:
        raise UserError(f"{uri}: not a state dict of dense tensors by name: {shorten(odd)}")
    return loaded, notes


def _other_keys(loaded: dict[Any, Any], uri: str) -> list[Any]:
    """The key of the only state dict in a file that has no tensors next to it; empty if there is none. Raises UserError if there are
    several."""
    if any(isinstance(value, torch.Tensor) for value in loaded.values()):
        return []
    keys = [key for key, value in loaded.items() if _holds_tensors(value) and key != "state"]  # of an optimizer
    if len(keys) > 1:
        raise UserError(f"{uri}: contains several state dicts ({shorten(list(map(str, keys)))}): save one of them")
    return keys


def _holds_tensors(value: Any) -> bool:
    """Whether a value is a state dict or contains one."""
    if not isinstance(value, dict):
        return False
    return any(isinstance(v, torch.Tensor) for v in value.values()) or any(
        isinstance(value.get(key), dict) for key in STATE_KEYS
    )
