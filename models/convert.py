"""Weights in and out: our checkpoints, Google's .npz, timm, Hugging Face.

    report = load_weights(model, "ViT-B_16.npz")       # or .safetensors, .pth, a folder, s3://...
    model = load_model("runs/x/checkpoints/step-00001000")
    save_checkpoint_weights(model, {"classes": [...]}, "out")

Everything is first brought to this project's names (timm's) by `read_weights`, then fitted to the model by `fit_weights`:
position embeddings resized as Google's code does, heads of another task left out, anything else that does not match is
an error that lists the tensors. Nothing here unpickles: .pth files are read with `weights_only=True`, .npz without
`allow_pickle`.
"""

import argparse
import io
import json
import math
import os
import pickle
import re
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import fsspec
import numpy as np
import safetensors.torch
import torch
from torch import nn

from models import create_model, posemb
from models.errors import UserError
from models.variants import parse_variant

Weights = dict[str, torch.Tensor]

MAX_UNFOLDED_BYTES = 1 << 30
MAX_DEPTH = 1000
WEIGHT_FILES = (".safetensors", ".npz", ".pt", ".pth", ".bin", ".ckpt", ".tar")
# What training scripts, timm's among them, keep beside the weights: their command line and NumPy's numbers.
_SCALAR = np.float64(0).__reduce__()[0]
HARMLESS: list[Any] = [
    argparse.Namespace,
    *((_SCALAR, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    *(np.dtype, np.dtypes.Float64DType, np.dtypes.Float32DType, np.dtypes.Int64DType),
]
# The forms of GELU by the names they have here, in Hugging Face's configurations and in timm's.
ACTIVATIONS = {
    **dict.fromkeys(("exact", "gelu", "gelu_python"), "exact"),
    **dict.fromkeys(("tanh", "gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_python_tanh", "gelu_tanh"), "tanh"),
}
# Parameters that belong to a task rather than to the encoder.
HEAD = ("head.", "pre_logits.", "mpp_head.", "mask_token")


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadReport:
    """What `load_weights` did. `str(report)` is a paragraph for people."""

    source: str
    format: str
    """checkpoint, google, bit, timm or huggingface"""
    loaded: tuple[str, ...]
    """Parameters filled from the source."""
    fresh: tuple[str, ...]
    """Parameters of the model's head that keep their initial values."""
    dropped: tuple[str, ...]
    """Tensors of the source's head that the model has no use for."""
    notes: tuple[str, ...]
    """Anything that changes the numbers: resized positions, another GELU."""

    def __str__(self) -> str:
        lines = [f"{self.source} ({self.format}): {len(self.loaded)} tensors loaded"]
        if self.fresh:
            lines.append(f"  keeps its initial values: {', '.join(self.fresh)}")
        if self.dropped:
            lines.append(f"  not used: {', '.join(self.dropped)}")
        return "\n".join([*lines, *(f"  {note}" for note in self.notes)])


# ---------------------------------------------------------------- public doors


def load_weights(model: nn.Module, source: str | os.PathLike, strict_head: bool = False) -> LoadReport:
    """Fills a model from weights of any supported kind; the model keeps its own image size and options.

    source: .npz (Google's ViT, hybrid or BiT), .safetensors, .pt/.pth/.bin state dict, or a folder (our checkpoint, a
    Hugging Face or timm model), local or s3://.
    A head for other classes, or with or without the tanh layer, is left out and the model's own kept; with `strict_head`
    that is an error too. Raises UserError that lists missing, unknown and misshapen tensors; the model is then untouched.
    """
    weights, kind, about = read_weights(source)
    fitted, report = fit_weights(model, weights, kind, os.fspath(source), strict_head)
    notes = [*report.notes, *_conventions(model, kind, about, os.fspath(source))]
    model.load_state_dict(fitted, strict=False)
    return LoadReport(**{**{f: getattr(report, f) for f in report.__slots__}, "notes": tuple(notes)})


def load_model(source: str | os.PathLike, **options: Any) -> nn.Module:
    """The model that a folder's config.json describes, with its weights, in eval mode. `options` override the config."""
    config = read_config(source)
    model = _create({**config["model"], **options}, os.fspath(source))
    load_weights(model, source, strict_head=not options)
    return model.eval()


def _create(options: Mapping[str, Any], source: str) -> nn.Module:
    """The model that a config.json asks for, which may ask for nonsense."""
    try:
        if (options.get("depth") or 0) > MAX_DEPTH:
            raise ValueError(f"a depth of {options['depth']}")
        return create_model(**options)
    except (TypeError, ValueError, KeyError, AttributeError, OverflowError, RuntimeError) as error:
        raise UserError(f"{source}: config.json describes no model ({_brief(error)})") from error


def save_checkpoint_weights(model_or_state: nn.Module | Weights, config: Mapping[str, Any], folder: str) -> None:
    """Writes model.safetensors and config.json, which `load_model` reads, to a local or s3:// folder.

    config: anything JSON-able; its "model" entry is filled from the model when absent, and required beside a state dict.
    """
    if isinstance(model_or_state, nn.Module):
        config = {"model": model_or_state.config, **config}
        model_or_state = model_or_state.state_dict()
    if "model" not in config:
        raise ValueError('a state dict alone does not say what it is; give config={"model": model.config}')
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model_or_state.items()}
    fs, path = fsspec.url_to_fs(folder)
    fs.makedirs(path, exist_ok=True)
    fs.pipe_file(f"{path}/model.safetensors", safetensors.torch.save(state, {"format": "pt"}))
    fs.pipe_file(f"{path}/config.json", (json.dumps(config, indent=1) + "\n").encode())


# ---------------------------------------------------------------- reading files


def read_config(source: str | os.PathLike) -> dict[str, Any]:
    """config.json of a checkpoint folder, or of the folder of a weights file. Raises UserError when it is not ours."""
    fs, path = _open(source)
    folder = path if fs.isdir(path) else os.path.dirname(path)
    config = _read_json(fs, f"{folder}/config.json") if fs.exists(f"{folder}/config.json") else {}
    if not isinstance(config.get("model"), dict):
        raise UserError(
            f"{os.fspath(source)}: no config.json with a model in it, so the architecture is not known; "
            "name the variant and load the file with load_weights"
        )
    return config


def read_weights(source: str | os.PathLike) -> tuple[Weights, str, dict[str, Any]]:
    """(tensors by this project's names, kind of source, config.json of a folder or what else is known about it).

    Raises UserError for a file that is missing, damaged, incomplete or of an unknown kind.
    """
    source = os.fspath(source)
    fs, path = _open(source)
    about: dict[str, Any] = {}
    if fs.isdir(path):
        names = {os.path.basename(name) for name in fs.ls(path, detail=False)}
        if "state" in names and "COMMIT.json" not in names:
            raise UserError(f"{source}: an unfinished checkpoint (no COMMIT.json); use the one before")
        if "config.json" in names:
            about = _read_json(fs, f"{path}/config.json")
        tensors = _read_folder(fs, path, names, source)
    else:
        tensors = _read_file(fs, path, source)
    if any("/" in name for name in tensors):
        kind = "bit" if any(name.startswith("resnet/") for name in tensors) else "google"
        try:
            weights = (from_bit if kind == "bit" else from_google)({k: v.numpy() for k, v in tensors.items()})
        except UserError as error:
            raise UserError(f"{source}: {error}") from error
        heads = [
            v.shape[-2] for k, v in tensors.items() if k.endswith("/query/bias") and v.dim() > 1 and "/txt/" not in k
        ]
        about = {"num_attention_heads": heads[0]} if heads else {}
    else:
        tensors = _strip_wrappers(tensors)
        if any(name.endswith("embeddings.patch_embeddings.projection.weight") for name in tensors):
            kind, weights = "huggingface", from_huggingface(tensors)
        else:
            kind = "checkpoint" if isinstance(about.get("model"), dict) else "timm"
            weights = from_timm(tensors)
    damaged = [name for name, tensor in weights.items() if not torch.isfinite(tensor).all()]
    if damaged:
        raise UserError(f"{source}: not finite: {_some(damaged)}")
    return weights, kind, about


def _read_json(fs: fsspec.AbstractFileSystem, path: str) -> dict[str, Any]:
    try:
        return dict(json.loads(fs.cat_file(path)))
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from error


def _open(source: str | os.PathLike) -> tuple[fsspec.AbstractFileSystem, str]:
    source = os.fspath(source)
    if re.match(r"(models|runs|mlflow-artifacts):", source):
        raise UserError(f"{source}: download the artifacts of an MLflow run or model first, then give their folder")
    fs, path = fsspec.url_to_fs(source)
    path = path.rstrip("/")
    if not fs.exists(path):
        raise UserError(f"{source}: no such file or folder")
    if fs.isdir(path) and fs.exists(f"{path}/MLmodel"):  # a logged model: the checkpoint is among its artifacts
        below = [name for name in fs.find(path) if name.endswith("/model.safetensors")]
        if len(below) == 1:
            return fs, os.path.dirname(below[0])
    return fs, path


def _read_folder(fs: fsspec.AbstractFileSystem, path: str, names: set[str], source: str) -> Weights:
    for name in ("model.safetensors", "pytorch_model.bin"):
        if name in names:
            return _read_file(fs, f"{path}/{name}", source)
        if f"{name}.index.json" in names:
            return _read_parts(fs, path, f"{name}.index.json", names, source)
    if "state" in names:
        return read_sharded_state(fs, f"{path}/state", source)
    other = [name for name in sorted(names) if name.endswith(WEIGHT_FILES)]
    if len(other) == 1:
        return _read_file(fs, f"{path}/{other[0]}", source)
    what = f"several files of weights ({_some(other)}); name one" if other else "no file of weights in this folder"
    raise UserError(f"{source}: no model.safetensors, pytorch_model.bin or state/, and {what}")


def _read_parts(fs: fsspec.AbstractFileSystem, path: str, index: str, names: set[str], source: str) -> Weights:
    """A large model in several files, as Hugging Face splits them: the index says which tensor is in which."""
    try:
        places = dict(_read_json(fs, f"{path}/{index}")["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{source}: {index} is no index of weights ({error})") from error
    files = sorted(set(places.values()))
    if absent := [file for file in files if file not in names]:
        raise UserError(f"{source}: {len(absent)} of {len(files)} parts are missing: {_some(absent)}")
    tensors = {name: tensor for file in files for name, tensor in _read_file(fs, f"{path}/{file}", source).items()}
    if lost := [name for name in places if name not in tensors]:
        raise UserError(f"{source}: tensors of {index} are in none of its {len(files)} parts: {_some(lost)}")
    return tensors


def _read_file(fs: fsspec.AbstractFileSystem, path: str, source: str) -> Weights:
    """A file's tensors under their own names."""
    data: Any = path if fs.protocol == "file" or "file" in fs.protocol else io.BytesIO(fs.cat_file(path))
    kind = path.lower()
    try:
        _check_unfolding(data, source)
        if kind.endswith(".safetensors"):
            return safetensors.torch.load_file(data) if data is path else safetensors.torch.load(data.getvalue())
        if kind.endswith(".npz"):
            with np.load(data, allow_pickle=False) as arrays:
                return {name: torch.from_numpy(_plain(arrays[name])) for name in arrays.files}
        if kind.endswith(WEIGHT_FILES):
            with torch.serialization.safe_globals(HARMLESS):
                return _state_dict(torch.load(data, map_location="cpu", weights_only=True), source)
    except UserError:
        raise
    except pickle.UnpicklingError as error:
        what = re.search(r"GLOBAL ([\w.]+)", str(error))
        raise UserError(
            f"{source}: cannot be read: {f'holds a {what[1]}' if what else 'not a file of tensors'}; a file that holds "
            "more than tensors is refused, save its state_dict alone"
        ) from error
    except Exception as error:  # the errors of zipfile, safetensors, NumPy and torch have no common class
        raise UserError(f"{source}: cannot be read: {_brief(error)}") from error
    raise UserError(f"{source}: unknown kind of file; expected .npz, .safetensors, .pt, .pth or .bin")


def _brief(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__


def _check_unfolding(data: Any, source: str) -> None:
    """.npz and .pt are zip files: a small one can claim terabytes. Raises UserError; weights compress by a few percent."""
    if not zipfile.is_zipfile(data):
        return
    with zipfile.ZipFile(data) as archive:
        packed, unfolded = (sum(getattr(i, f) for i in archive.infolist()) for f in ("compress_size", "file_size"))
    if hasattr(data, "seek"):
        data.seek(0)
    if unfolded > MAX_UNFOLDED_BYTES and unfolded > 100 * packed:
        raise UserError(f"{source}: {packed:,} bytes that unfold to {unfolded:,} are no weights")


def _plain(array: np.ndarray) -> np.ndarray:
    """float32 for the bfloat16 that JAX stores as a two-byte void type."""
    if array.dtype.kind == "V" and array.dtype.itemsize == 2:
        return (array.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return array


def _state_dict(loaded: Any, source: str) -> Weights:
    """The tensors of a torch file, wherever common training scripts put them."""
    for key in ("state_dict_ema", "model_ema", "state_dict", "model_state_dict", "model", "module"):
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
            break
    if not isinstance(loaded, dict) or not loaded:
        raise UserError(f"{source}: holds a {type(loaded).__name__}, not a state dict")
    others = [str(name) for name, value in loaded.items() if not isinstance(value, torch.Tensor)]
    if others:
        raise UserError(f"{source}: not a state dict: {_some(others)} hold no tensors")
    if odd := [str(n) for n, t in loaded.items() if not isinstance(n, str) or t.layout != torch.strided or t.is_meta]:
        raise UserError(f"{source}: not a state dict of dense tensors by name: {_some(odd)}")
    return loaded


def _strip_wrappers(tensors: Weights) -> Weights:
    """Without what DistributedDataParallel, torch.compile and a training script's own modules put before the names."""
    tensors = {name.replace("_orig_mod.", ""): tensor for name, tensor in tensors.items()}
    for first in ("embeddings.patch_embeddings.projection.weight", "patch_embed.proj.weight", "stem.conv.weight"):
        prefixes = [name.removesuffix(first).removesuffix("vit.") for name in tensors if name.endswith(first)]
        if len(prefixes) == 1:
            return {name.removeprefix(prefixes[0]): tensor for name, tensor in tensors.items()}
    return tensors


def read_sharded_state(fs: fsspec.AbstractFileSystem, folder: str, source: str) -> Weights:
    """Parameters of a training state alone, whatever ZeRO stage wrote it: no engine, no GPU, no process group.

    Every worker's file holds flat float32 slices named "param:<parameter>:<start>"; config.json beside `state/` gives
    the shapes. Raises UserError when slices are missing.
    """
    with torch.device("meta"):
        model = _create(read_config(source)["model"], source)
    weights = {name: torch.full((p.numel(),), math.nan) for name, p in model.named_parameters()}
    missing = {name: flat.numel() for name, flat in weights.items()}
    for path in sorted(fs.glob(f"{folder}/*.safetensors")):
        for key, piece in _read_file(fs, path, source).items():
            what, _, place = key.partition(":")
            name, _, start = place.rpartition(":")
            if what == "param" and name in weights:
                try:
                    weights[name][int(start) : int(start) + piece.numel()] = piece
                except (ValueError, RuntimeError) as error:
                    raise UserError(f"{source}: {key} does not fit its parameter ({error})") from error
                missing[name] -= piece.numel()
    short = [f"{name} ({count} of {weights[name].numel()} values)" for name, count in missing.items() if count]
    if short:
        raise UserError(f"{source}: parts of the training state are missing: {_some(short)}")
    return {name: weights[name].reshape(p.shape) for name, p in model.named_parameters()}


# ---------------------------------------------------------------- other people's names


def from_timm(tensors: Weights) -> Weights:
    """timm's names, which are ours but for a few modules."""
    renames = {
        # its ResNets classify with a 1x1 convolution; its root-only hybrid has no stem module
        "head.fc.": "head.",
        "patch_embed.backbone.conv.": "patch_embed.backbone.stem.conv.",
        "patch_embed.backbone.norm.": "patch_embed.backbone.stem.norm.",
    }
    weights = {}
    for name, tensor in tensors.items():
        for old, new in renames.items():
            if name.startswith(old):
                name = new + name.removeprefix(old)
        weights[name] = tensor.flatten(1) if name == "head.weight" and tensor.dim() == 4 else tensor
    return weights


# Hugging Face, as its files have it since 2021 and as transformers 5 names its modules; {i} is the layer.
_HUGGINGFACE = {
    "embeddings.cls_token": "cls_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "embeddings.mask_token": None,
    "layernorm": "norm",
    "pooler.dense": "pre_logits.fc",
    "classifier": "head",
    "decoder.0": None,  # of ViTForMaskedImageModeling
    "encoder.layer.{i}.layernorm_before": "blocks.{i}.norm1",
    "encoder.layer.{i}.layernorm_after": "blocks.{i}.norm2",
    "encoder.layer.{i}.attention.attention.query": "blocks.{i}.attn.q",
    "encoder.layer.{i}.attention.attention.key": "blocks.{i}.attn.k",
    "encoder.layer.{i}.attention.attention.value": "blocks.{i}.attn.v",
    "encoder.layer.{i}.attention.output.dense": "blocks.{i}.attn.proj",
    "encoder.layer.{i}.intermediate.dense": "blocks.{i}.mlp.fc1",
    "encoder.layer.{i}.output.dense": "blocks.{i}.mlp.fc2",
    "layers.{i}.layernorm_before": "blocks.{i}.norm1",
    "layers.{i}.layernorm_after": "blocks.{i}.norm2",
    "layers.{i}.attention.q_proj": "blocks.{i}.attn.q",
    "layers.{i}.attention.k_proj": "blocks.{i}.attn.k",
    "layers.{i}.attention.v_proj": "blocks.{i}.attn.v",
    "layers.{i}.attention.o_proj": "blocks.{i}.attn.proj",
    "layers.{i}.mlp.fc1": "blocks.{i}.mlp.fc1",
    "layers.{i}.mlp.fc2": "blocks.{i}.mlp.fc2",
}


def from_huggingface(tensors: Weights) -> Weights:
    """ViTForImageClassification, ViTModel or ViTForMaskedImageModeling."""
    weights: Weights = {}
    for name, tensor in tensors.items():
        stem, dot, kind = name.removeprefix("vit.").rpartition(".")
        if not dot or kind not in ("weight", "bias"):
            stem, kind = name.removeprefix("vit."), ""
        layer = re.search(r"\.(\d+)\.", stem)
        pattern = stem.replace(layer[0], ".{i}.", 1) if layer else stem
        new = _HUGGINGFACE.get(pattern, name)  # an unknown name goes on as it is, to be listed as unknown
        if new is not None:
            weights[new.format(i=layer[1] if layer else "") + (f".{kind}" if kind and new != name else "")] = tensor
    return _fuse_qkv(weights)


def _fuse_qkv(weights: Weights) -> Weights:
    """blocks.N.attn.{q,k,v} as one blocks.N.attn.qkv, rows in that order."""
    for name in [name for name in weights if ".attn.q." in name]:
        parts = [name.replace(".attn.q.", f".attn.{part}.") for part in "qkv"]
        _fuse(weights, parts, name.replace(".attn.q.", ".attn.qkv."))
    return weights


def _fuse(weights: Weights, parts: list[str], whole: str) -> None:
    """Puts the parts one below the other; those that do not fit together stay, to be listed as unknown."""
    if all(part in weights for part in parts) and len({weights[part].shape[1:] for part in parts}) == 1:
        weights[whole] = torch.cat([weights.pop(part) for part in parts])


def from_google(arrays: Mapping[str, np.ndarray]) -> Weights:
    """Google's ViT and hybrid .npz: the published pre-Linen files, Linen, and big_vision (also stacked by scan).

    Kernels are (in, out) or HWIO there; attention kernels carry a heads axis. Raises UserError for another tree.
    """
    weights: Weights = {}
    misshapen = []

    def put(name: str, array: np.ndarray) -> None:
        weights[name] = torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))

    for name, array in _google_tree(arrays).items():
        try:
            _put_google(put, name, array)
        except (ValueError, IndexError):
            misshapen.append(f"{name} is {array.shape}")
    if misshapen:
        raise UserError(f"wrong shape: {_some(misshapen)}")
    for kind in ("weight", "bias"):  # attention pooling has its query apart
        _fuse(weights, [f"attn_pool.{part}.{kind}" for part in "kv"], f"attn_pool.kv.{kind}")
    return _fuse_qkv(weights)


def _put_google(put: Callable[[str, np.ndarray], None], name: str, array: np.ndarray) -> None:
    """One array under this project's name. Raises ValueError or IndexError when it has the wrong number of axes."""
    *path, leaf = name.split("/")
    where = ".".join(path)
    if name == "cls":
        put("cls_token", array)
    elif leaf == "pos_embedding":
        put("pos_embed", array.reshape(1, -1, array.shape[-1]))
    elif where == "embedding":
        put(f"patch_embed.proj.{_leaf(leaf)}", array.transpose(3, 2, 0, 1) if leaf == "kernel" else array)
    elif where in ("pre_logits", "head"):
        put(f"{'pre_logits.fc' if where == 'pre_logits' else 'head'}.{_leaf(leaf)}", array.T)
    elif where == "Transformer.encoder_norm":
        put(f"norm.{_leaf(leaf)}", array)
    elif match := re.fullmatch(r"Transformer\.encoderblock_(\d+)\.(.+)", where):
        _put_block(put, f"blocks.{match[1]}", match[2], leaf, array)
    elif match := re.fullmatch(r"MAPHead_0(?:\.(.+))?", where):
        if leaf == "probe":
            put("attn_pool.latent", array)
        else:
            _put_block(put, "attn_pool", match[1], leaf, array)
    elif match := re.fullmatch(r"(conv_root|gn_root|block(\d+)\.unit(\d+)\.(\w+))", where):
        put(f"patch_embed.backbone.{_stem_name(match)}.{_leaf(leaf)}", _convolution(array))
    else:
        put(name, array)  # to be listed as unknown


def _google_tree(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The image tower's parameters without their prefix, LayerNorms numbered alike, scanned blocks taken apart."""
    for prefix in ("params/img/", "opt/target/", "params/", "img/", ""):
        if f"{prefix}embedding/kernel" in arrays:
            break
    else:
        raise UserError(f"no embedding/kernel among the arrays ({_some(arrays)}): not weights of a Vision Transformer")
    # an optimiser state beside the parameters would otherwise read as unknown tensors
    tree = {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
    for name in [name for name in tree if name.startswith("Transformer/encoderblock/")]:
        stacked = tree.pop(name)
        for i, array in enumerate(np.atleast_1d(stacked)):
            tree[name.replace("/encoderblock/", f"/encoderblock_{i}/")] = array
    return tree


def _put_block(put: Callable[[str, np.ndarray], None], target: str, module: str, leaf: str, array: np.ndarray) -> None:
    """One array of an encoder block or of the attention-pooling head.

    Modules are numbered per class in Linen (LayerNorm_0, LayerNorm_1, MlpBlock_0) and across classes before
    (LayerNorm_0, MultiHeadDotProductAttention_1, LayerNorm_2, MlpBlock_3).
    """
    kind, _, rest = module.partition(".")
    if kind.startswith("LayerNorm_"):
        norm = "norm" if target == "attn_pool" else ("norm1" if kind == "LayerNorm_0" else "norm2")
        put(f"{target}.{norm}.{_leaf(leaf)}", array)
    elif kind.startswith("MlpBlock_"):
        put(f"{target}.mlp.{'fc1' if rest == 'Dense_0' else 'fc2'}.{_leaf(leaf)}", array.T)
    elif kind.startswith("MultiHeadDotProductAttention_"):
        attention = target if target == "attn_pool" else f"{target}.attn"
        if rest == "out":
            flat = array.reshape(-1, array.shape[-1]).T if leaf == "kernel" else array
            put(f"{attention}.proj.{_leaf(leaf)}", flat)
        elif rest in ("query", "key", "value"):
            flat = array.reshape(array.shape[0], -1).T if leaf == "kernel" else array.reshape(-1)
            put(f"{attention}.{rest[0]}.{_leaf(leaf)}", flat)
        else:  # normalised queries and keys
            norm = {"query_norm": "q_norm", "key_norm": "k_norm", "query_ln": "q_norm", "key_ln": "k_norm"}.get(
                rest, rest
            )
            put(f"{attention}.{norm}.{_leaf(leaf)}", array)
    else:
        put(f"{target}.{module}.{leaf}", array)


def _leaf(leaf: str) -> str:
    return {"kernel": "weight", "scale": "weight", "gamma": "weight", "beta": "bias"}.get(leaf, leaf)


def _convolution(array: np.ndarray) -> np.ndarray:
    """HWIO kernel -> OIHW; GroupNorm vectors, sometimes stored as (1,1,1,C), -> (C,)."""
    return array.reshape(-1) if array.size == array.shape[-1] else array.transpose(3, 2, 0, 1)


def _stem_name(match: re.Match) -> str:
    if match[2] is None:
        return "stem.conv" if match[1] == "conv_root" else "stem.norm"
    part = {"conv_proj": "downsample.conv", "gn_proj": "downsample.norm"}.get(match[4], match[4].replace("gn", "norm"))
    return f"stages.{int(match[2]) - 1}.blocks.{int(match[3]) - 1}.{part}"


def from_bit(arrays: Mapping[str, np.ndarray]) -> Weights:
    """Google's BiT ResNet .npz ("resnet/block1/unit01/a/standardized_conv2d/kernel")."""
    weights: Weights = {}
    misshapen = []
    for name, array in arrays.items():
        try:
            *path, module, leaf = name.removeprefix("resnet/").split("/")
            norm, where = module == "group_norm", "/".join(path)
            if match := re.fullmatch(r"block(\d+)/unit(\d+)/([abc])(/proj)?", where):
                index = "abc".index(match[3]) + 1
                part = "downsample.conv" if match[4] else f"{'norm' if norm else 'conv'}{index}"
                new = f"stages.{int(match[1]) - 1}.blocks.{int(match[2]) - 1}.{part}"
            else:
                new = {"root_block": "stem.conv", "": "norm", "head": "head"}.get(where, name)
            array = array.reshape(-1, array.shape[-1]).T if new == "head" and leaf == "kernel" else _convolution(array)
            weights[f"{new}.{_leaf(leaf)}"] = torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))
        except (ValueError, IndexError):
            misshapen.append(f"{name} is {array.shape}")
    if misshapen:
        raise UserError(f"wrong shape: {_some(misshapen)}")
    return weights


# ---------------------------------------------------------------- fitting to a model


def fit_weights(
    model: nn.Module, weights: Weights, kind: str, source: str, strict_head: bool = False
) -> tuple[Weights, LoadReport]:
    """Weights in the model's shapes, and the report. Raises UserError that lists what does not fit."""
    config: Any = model.config
    target = model.state_dict()
    weights = dict(weights)
    notes = _fold_layer_scale(weights)
    if "pos_embed" in weights and hasattr(model, "grid"):
        notes += _fit_positions(model, weights)

    ours = {name: tensor.shape for name, tensor in target.items() if name.startswith(HEAD)}
    theirs = {name: tensor.shape for name, tensor in weights.items() if name.startswith(HEAD)}
    dropped: list[str] = []
    if not strict_head:
        # a linear head is only worth keeping on the representation it was trained on: with or without the tanh layer
        same_layers = {n for n in ours if n.startswith("pre_logits.")} == {
            n for n in theirs if n.startswith("pre_logits.")
        }
        for name in theirs:
            if ours.get(name) != theirs[name] or (name.startswith("head.") and not same_layers):
                dropped.append(name)
                del weights[name]
    fresh = [name for name in ours if name not in weights]
    missing = [name for name in target if name not in weights and (strict_head or name not in ours)]
    unknown = [name for name in weights if name not in target]
    misshapen = [
        f"{name} is {tuple(tensor.shape)}, the model has {tuple(target[name].shape)}"
        for name, tensor in weights.items()
        if name in target and tensor.shape != target[name].shape
    ]
    misshapen += [
        f"{name} holds {tensor.dtype}, not real numbers"
        for name, tensor in weights.items()
        if name in target and not tensor.is_floating_point()
    ]
    problems = [f"missing: {_some(missing)}"] * bool(missing)
    problems += [f"unknown: {_some(unknown)}"] * bool(unknown)
    problems += [f"wrong shape: {_some(misshapen)}"] * bool(misshapen)
    if problems:
        hint = _hint({*missing, *unknown}, misshapen)
        raise UserError(f"{source} does not fit {config['variant']}: {'; '.join(problems)}{hint}")
    fitted = {name: tensor.to(target[name].dtype) for name, tensor in weights.items()}
    return fitted, LoadReport(
        source=source,
        format=kind,
        loaded=tuple(weights),
        fresh=tuple(fresh),
        dropped=tuple(dropped),
        notes=tuple(notes),
    )


def _fold_layer_scale(weights: Weights) -> list[str]:
    """LayerScale (timm's init_values) becomes part of the matrix before it, which gives the same function."""
    scales = [name for name in weights if re.fullmatch(r"blocks\.\d+\.ls[12]\.gamma", name)]
    for name in scales:
        layer = name.replace("ls1.gamma", "attn.proj").replace("ls2.gamma", "mlp.fc2")
        weight, bias, gamma = weights.get(f"{layer}.weight"), weights.get(f"{layer}.bias"), weights[name]
        if weight is None or bias is None or weight.dim() != 2 or not bias.shape == gamma.shape == weight.shape[:1]:
            return []  # listed as unknown
        weights[f"{layer}.weight"], weights[f"{layer}.bias"] = weight * gamma[:, None], bias * gamma
        del weights[name]
    return ["LayerScale folded into attn.proj and mlp.fc2"] if scales else []


def _fit_positions(model: nn.Module, weights: Weights) -> list[str]:
    """Brings pos_embed in `weights` to the model's tokens and grid; returns notes for the report.

    A table of another width, or of no square grid, stays as it is, to be listed among what does not fit.
    """
    config: Any = model.config
    width: int = model.shape.width  # type: ignore[assignment, union-attr]
    grid: int = model.grid  # type: ignore[assignment]
    table, registers = weights["pos_embed"], weights.get("reg_token")
    if any(t is not None and (t.dim() != 3 or t.shape[2] != width) for t in (table, registers)):
        return []
    # Rows before the patches: class token and registers, or neither (big_vision and timm's no_embed_class).
    tokens = ("cls_token" in weights) + (registers.shape[1] if registers is not None else 0)
    counts = [n for n in sorted({tokens, int("cls_token" in weights), 0}, reverse=True) if _square(table.shape[1] - n)]
    counts = [n for n in counts if table.shape[1] - n > 1 or grid == 1]  # one row is a damaged table, not a picture
    if not counts:
        return []
    prefix = next((n for n in counts if table.shape[1] - n == grid**2), counts[0])
    cls_row = table[:, :1] if prefix and "cls_token" in weights else torch.zeros_like(table[:, :1])
    old = math.isqrt(table.shape[1] - prefix)
    if config["posemb"] == "sincos2d":
        fixed = posemb.sincos2d(old, width)
        if not torch.allclose(table[:, prefix:].float(), fixed, atol=0.01) or cls_row.any():
            name = 'pos_embed (learned position embeddings; the model\'s are fixed: posemb="sincos2d")'
            weights[name] = weights.pop("pos_embed")
        else:
            del weights["pos_embed"]
        return []
    if config["posemb"] == "none":
        weights["pos_embed (learned position embeddings; the model has none)"] = weights.pop("pos_embed")
        return []
    if registers is not None and prefix == tokens:  # a register's position is one more constant added to it
        weights["reg_token"] = registers + table[:, prefix - registers.shape[1] : prefix]
    has_cls = config["pool"] == "token"
    rows = torch.cat([cls_row, table[:, prefix:]], dim=1) if has_cls else table[:, prefix:]
    weights["pos_embed"] = posemb.resize(rows, grid, prefix=int(has_cls))
    return [f"position embeddings resized from {old}x{old} to {grid}x{grid}"] if old != grid else []


def _square(count: int) -> bool:
    return count > 0 and math.isqrt(count) ** 2 == count


def _hint(names: set[str], misshapen: Iterable[str]) -> str:
    if "dist_token" in names:
        return "; a distilled DeiT has a second token and a second head, which this model has not"
    if "cls_token" in names or any(name.startswith("attn_pool.") for name in names):
        return '; is the pooling the same? (options: pool="token", "gap" or "map")'
    if any(name.startswith(("fc_norm.", "norm.")) for name in names):
        return "; is the final LayerNorm after the mean? (option: fc_norm)"
    if any(line.startswith(("patch_embed.proj.weight", "blocks.0.")) for line in misshapen):
        return "; is it the same variant?"
    return ""


def _some(names: Iterable[str], limit: int = 12) -> str:
    names = list(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _conventions(model: nn.Module, kind: str, about: Mapping[str, Any], source: str) -> list[str]:
    """Notes where the source computes with other conventions than the model.

    Raises UserError where its numbers would mean something else: another number of heads, another activation.
    """
    config: Any = model.config
    if "gelu" not in config:
        return []
    arguments = about.get("model_args") or {}  # of a timm folder
    if kind == "checkpoint":
        shape, options = parse_variant(about["model"].get("variant", config["variant"])), about["model"]
        heads, activation = options.get("heads") or shape.heads, options.get("gelu", config["gelu"])
    else:
        heads = about.get("num_attention_heads") or arguments.get("num_heads")
        activation = about.get("hidden_act") or arguments.get("act_layer") or ("tanh" if kind == "google" else "gelu")
    ours = model.shape.heads  # type: ignore[union-attr]
    if heads and heads != ours:
        raise UserError(f"{source} has {heads} attention heads, the model {ours} (option heads={heads})")
    if activation not in ACTIVATIONS:
        raise UserError(f"{source} computes with {activation}, the model with GELU: its weights would mean nothing")
    notes: list[str] = []
    if (theirs := ACTIVATIONS[activation]) != config["gelu"]:
        notes.append(
            f'GELU: the source computes the {theirs} form, this model the {config["gelu"]} one (option gelu="{theirs}")'
        )
    eps = about.get("layer_norm_eps", config["ln_eps"])
    if eps != config["ln_eps"]:
        notes.append(f"LayerNorm: the source adds {eps:g}, this model {config['ln_eps']:g} (option ln_eps={eps:g})")
    return notes


# ---------------------------------------------------------------- names for other libraries


def to_timm(model: nn.Module) -> tuple[Weights, dict[str, Any]]:
    """(state dict, config.json in timm's hub form) of a model without tanh layer, or of its encoder.

    `timm.create_model("local-dir:FOLDER", pretrained=True)` loads the pair. Raises UserError for what timm cannot express.
    """
    config: dict[str, Any] = dict(model.config)  # type: ignore[arg-type]
    weights = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    if "pre_logits.fc.weight" in weights:
        weights = {name: tensor for name, tensor in weights.items() if not name.startswith(HEAD)}
        config["num_classes"] = 0
    pretrained = {
        "architecture": _timm_architecture(config["variant"]),
        "num_classes": config["num_classes"],
        "pretrained_cfg": {
            "input_size": [config["channels"], config["image_size"], config["image_size"]],
            "mean": [0.5] * config["channels"],
            "std": [0.5] * config["channels"],
            "interpolation": "bilinear",
            "crop_pct": 1.0,
            "num_classes": config["num_classes"],
            "classifier": "head",
        },
    }
    arguments: dict[str, Any] = {"in_chans": config["channels"]}
    if "pool" not in config:  # a ResNet
        pretrained["pretrained_cfg"] |= {"classifier": "head.fc", "first_conv": "stem.conv"}
        weights = {
            f"head.fc.{name[5:]}" if name.startswith("head.") else name: t[:, :, None, None]
            if name == "head.weight"
            else t
            for name, t in weights.items()
        }
        return weights, {**pretrained, "model_args": arguments}
    if config["ln_eps"] != 1e-6:
        raise UserError(f"timm's ViT has LayerNorm epsilon 1e-6, this model {config['ln_eps']:g}")
    shape: Any = model.shape
    arguments |= {
        "img_size": config["image_size"],
        "embed_dim": shape.width,
        "depth": shape.depth,
        "num_heads": shape.heads,
        "mlp_ratio": shape.mlp / shape.width,
        "class_token": config["pool"] == "token",
        "global_pool": {"token": "token", "gap": "avg", "map": "map"}[config["pool"]],
        "fc_norm": config["fc_norm"],
        "qk_norm": config["qk_norm"],
        "pos_embed": "none" if config["posemb"] == "none" else "learn",
        "act_layer": "gelu_tanh" if config["gelu"] == "tanh" else "gelu",
    }
    if shape.stem is None:
        arguments["patch_size"] = shape.patch
    if int(shape.width * arguments["mlp_ratio"]) != shape.mlp:  # timm truncates the product
        arguments["mlp_ratio"] = (shape.mlp + 0.5) / shape.width
    if model.pos_embed is not None:
        weights["pos_embed"] = model.pos_embed.detach().clone()  # type: ignore[operator, union-attr]
    if config["registers"]:
        # timm gives positions to registers too, or to no token at all: the class token absorbs its own
        arguments |= {"reg_tokens": config["registers"], "no_embed_class": True}
        if "cls_token" in weights and "pos_embed" in weights:
            weights["cls_token"] = weights["cls_token"] + weights["pos_embed"][:, :1]
            weights["pos_embed"] = weights["pos_embed"][:, 1:].contiguous()
    if shape.stem == ():
        weights = {name.replace("backbone.stem.", "backbone."): tensor for name, tensor in weights.items()}
    return weights, {**pretrained, "model_args": arguments}


def _timm_architecture(variant: str) -> str:
    """The registered timm model whose arguments `to_timm` overrides; for a common variant, its own name."""
    hybrids = {
        "R+Ti/16": "vit_tiny_r_s16_p8_224",
        "R26+S/32": "vit_small_r26_s32_224",
        "R26+B/32": "vit_base_r26_s32_224",
        "R50+B/16": "vit_base_r50_s16_224",
        "R50+L/16": "vit_base_r50_s16_224",
        "R50+B/32": "vit_large_r50_s32_224",
        "R50+L/32": "vit_large_r50_s32_224",
        "R50x1": "resnetv2_50x1_bit",
        "R101x1": "resnetv2_101x1_bit",
        "R152x2": "resnetv2_152x2_bit",
    }
    if variant in hybrids:
        return hybrids[variant]
    if "R" in variant:
        raise UserError(f"timm has no model like {variant}; its hybrids and ResNets here: {', '.join(hybrids)}")
    width, patch = variant.split("/")
    names = {"Ti": "tiny", "S": "small", "B": "base", "L": "large", "H": "huge", "g": "giant", "G": "gigantic"}
    registered = ("Ti/16", "S/32", "S/16", "S/8", "B/32", "B/16", "B/8", "L/32", "L/16", "L/14", "H/14", "g/14", "G/14")
    return f"vit_{names[width]}_patch{patch}_224" if variant in registered else "vit_base_patch16_224"


def to_huggingface(model: nn.Module, classes: list[str] | None = None) -> tuple[Weights, dict, dict]:
    """(state dict, config.json, preprocessor_config.json) of ViTForImageClassification, or of ViTModel.

    A model with the tanh layer becomes a ViTModel, whose pooler is that layer; its linear head stays behind. Raises
    UserError for what Hugging Face's ViT cannot express.
    """
    config: dict[str, Any] = dict(model.config)  # type: ignore[arg-type]
    shape: Any = getattr(model, "shape", None)
    beyond = {"pool": "token", "registers": 0, "qk_norm": False, "fc_norm": False}
    other = [f"{name}={config[name]!r}" for name, value in beyond.items() if config.get(name, value) != value]
    if shape is None or shape.stem is not None or other:
        what = ", ".join(other) or f"the convolutional stages of {config['variant']}"
        raise UserError(f"Hugging Face's ViT cannot express {what}; export to timm, onnx or torch-export instead")
    weights = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    table = model.pos_embed
    if table is None:
        table = torch.zeros(1, 1 + int(model.grid) ** 2, shape.width)  # type: ignore[arg-type]
    weights["pos_embed"] = table.detach().clone()  # type: ignore[operator, union-attr]
    pooled = "pre_logits.fc.weight" in weights
    prefix = "" if pooled else "vit."
    names = {new: old for old, new in _HUGGINGFACE.items() if new and not old.startswith("layers.")}
    out: Weights = {}
    for name, tensor in weights.items():
        layer = re.search(r"blocks\.(\d+)\.", name)
        stem, _, kind = name.rpartition(".")
        if ".attn.qkv." in name:
            for part, rows in zip("qkv", tensor.chunk(3), strict=True):
                old = names[f"blocks.{{i}}.attn.{part}"].format(i=layer[1])  # type: ignore[index]
                out[f"{prefix}{old}.{kind}"] = rows.contiguous()
        elif name in names:
            out[prefix + names[name]] = tensor
        elif not (pooled and stem == "head"):
            old = names[stem.replace(layer[0], "blocks.{i}.") if layer else stem].format(i=layer[1] if layer else "")
            out[f"{'' if old == 'classifier' else prefix}{old}.{kind}"] = tensor
    labels = classes or [f"LABEL_{i}" for i in range(config["num_classes"])]
    about = {
        "architectures": ["ViTModel" if pooled else "ViTForImageClassification"],
        "model_type": "vit",
        "hidden_size": shape.width,
        "num_hidden_layers": shape.depth,
        "num_attention_heads": shape.heads,
        "intermediate_size": shape.mlp,
        "hidden_act": "gelu_pytorch_tanh" if config["gelu"] == "tanh" else "gelu",
        "layer_norm_eps": config["ln_eps"],
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "image_size": config["image_size"],
        "patch_size": shape.patch,
        "num_channels": config["channels"],
        "qkv_bias": True,
        "pooler_act": "tanh",
        "pooler_output_size": shape.width,
        "id2label": {str(i): label for i, label in enumerate(labels)},
        "label2id": {label: i for i, label in enumerate(labels)},
        "dtype": "float32",
    }
    processor = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": config["image_size"], "width": config["image_size"]},
        "resample": 2,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5] * config["channels"],
        "image_std": [0.5] * config["channels"],
    }
    return out, about, processor
