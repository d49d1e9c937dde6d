"""Reads the tensors of a folder: checkpoints of this project, folders of
Hugging Face and timm, and weights in several files."""

import math
from collections.abc import Mapping
from typing import Any

import torch

from models import create_model
from models.weights import Weights
from pipeline import storage
from pipeline.errors import UserError, plural, shorten
from pipeline.weights import checkpoints
from pipeline.weights.description import model_options, read_description, recorded_checksums
from pipeline.weights.files import SUFFIXES, first_line, read_file

MAX_DEPTH = 1000


def read_folder(uri: str) -> tuple[Weights, list[str]]:
    """(tensors of a folder, notes on choices among several state dicts). Files are verified against COMMIT.json if
    there is one. Raises UserError if weights are missing, ambiguous or damaged.
    """
    names = {file.path for file in storage.list_files(uri, recursive=False)}
    has_state = storage.exists(storage.join(uri, "state"))
    if has_state and checkpoints.COMMIT not in names:
        raise UserError(f"{uri}: an unfinished checkpoint (no {checkpoints.COMMIT}); use an earlier one")
    recorded = recorded_checksums(uri)
    for name in ("model.safetensors", "pytorch_model.bin"):
        if name in names:
            return read_file(storage.join(uri, name), recorded.get(name))
        if f"{name}.index.json" in names:
            return _read_parts(uri, f"{name}.index.json", names), []
    if has_state:
        return read_training_state(uri, recorded), []
    if what := _other_layout(names or {uri.rpartition("/")[2]}):
        raise UserError(f"{uri}: {what}")
    other = [name for name in sorted(names) if name.endswith(SUFFIXES)]
    if len(other) == 1:
        return read_file(storage.join(uri, other[0]))
    what = f"several weights files ({shorten(other)}); name one" if other else "no weights file in this folder"
    raise UserError(f"{uri}: no model.safetensors, pytorch_model.bin or state/, and {what}")


def build_model(options: Mapping[str, Any], uri: str) -> torch.nn.Module:
    """The model that a config.json describes. Raises UserError for invalid options."""
    try:
        if (options.get("depth") or 0) > MAX_DEPTH:
            raise ValueError(f"a depth of {options['depth']}")
        return create_model(**options)
    except (TypeError, ValueError, KeyError, AttributeError, OverflowError, RuntimeError) as error:
        raise UserError(f"{uri}: config.json describes no model ({first_line(error)})") from error


def _read_parts(uri: str, index: str, names: set[str]) -> Weights:
    """Reads a large model that Hugging Face split into several files; the index maps each tensor to its file."""
    try:
        places = dict(storage.read_json(storage.join(uri, index))["weight_map"])
        files = sorted(set(places.values()))
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{uri}: {index} is not an index of weights ({error})") from error
    if absent := [file for file in files if file not in names]:
        raise UserError(f"{uri}: {len(absent)} of {len(files)} parts are missing: {shorten(absent)}")
    tensors = {name: tensor for file in files for name, tensor in read_file(storage.join(uri, file))[0].items()}
    if lost := [name for name in places if name not in tensors]:
        raise UserError(f"{uri}: tensors of {index} are missing from its {plural(len(files), 'part')}: {shorten(lost)}")
    return tensors


OTHER_FRAMEWORKS = {  # by the end of a file name
    (".gguf", ".ggml"): "a file of llama.cpp",
    (".onnx",): "an ONNX graph",
    (".h5", ".hdf5", ".keras"): "a file of Keras",
    (".msgpack",): "a file of Flax: convert it with from_pretrained(FOLDER, from_flax=True) of transformers 4",
    (".pdparams",): "a file of PaddlePaddle",
    (".ckpt.index", ".ckpt.meta", "saved_model.pb", ".pb"): "a checkpoint or graph of TensorFlow",
    (".mlmodel", ".mlpackage", ".tflite", ".engine", ".plan"): "a compiled model",
    ("_METADATA", "_CHECKPOINT_METADATA", "_sharding"): "a checkpoint of Orbax",
    (".pkl", ".pickle", ".joblib"): "a pickle, which may contain code and is not opened",
}


def _other_layout(names: set[str]) -> str | None:
    """The framework that wrote a folder or a file, and how to convert it with the framework's tool."""
    if "zero_to_fp32.py" in names or any("zero_pp_rank_" in name for name in names):
        return "a DeepSpeed checkpoint: run zero_to_fp32.py in the folder of the run, and pass the resulting file"
    if ".metadata" in names or any(name.endswith(".distcp") for name in names):
        return (
            "a distributed PyTorch checkpoint: convert it to one file with "
            "python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER FILE.pt"
        )
    if not any(name.endswith(SUFFIXES) for name in names):
        for name in sorted(names):
            what = next((what for ends, what in OTHER_FRAMEWORKS.items() if name.endswith(ends)), None)
            if what is not None:
                return f"{what}; save its tensors as .safetensors, .npz or a PyTorch state dict"
    return None


def read_training_state(uri: str, recorded: Mapping[str, str]) -> Weights:
    """Reads the parameters from a checkpoint's training state, for every ZeRO stage, without an engine, GPU or process
    group. The file of each worker has flat float32 slices named "param:<parameter>:<start>"; shapes are in config.json
    next to `state/`. recorded: checksums by path. Raises UserError if slices are missing.
    """
    with torch.device("meta"):
        model = build_model(model_options(uri, read_description(uri)), uri)
    weights = {name: torch.full((p.numel(),), math.nan) for name, p in model.named_parameters()}
    missing = {name: flat.numel() for name, flat in weights.items()}
    for file in storage.list_files(storage.join(uri, "state")):
        if not file.path.endswith(".safetensors"):
            continue
        for key, values in read_file(file.uri, recorded.get(f"state/{file.path}"))[0].items():
            kind, _, place = key.partition(":")
            name, _, start = place.rpartition(":")
            if kind == "param" and name in weights:
                try:
                    weights[name][int(start) : int(start) + values.numel()] = values
                except (ValueError, RuntimeError) as error:
                    raise UserError(f"{uri}: {key} does not fit its parameter ({error})") from error
                missing[name] -= values.numel()
    short = [f"{name} ({count} of {weights[name].numel()} values)" for name, count in missing.items() if count]
    if short:
        raise UserError(f"{uri}: the training state is incomplete: {shorten(short)}")
    return {name: weights[name].reshape(p.shape) for name, p in model.named_parameters()}
