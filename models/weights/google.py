"""Google's ViT and hybrid .npz: the published pre-Linen files, Linen, and big_vision (also with blocks stacked by scan).

Google's kernels are (in, out) or (height, width, in, out), and attention kernels have an axis of heads.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from models.errors import UserError, shorten
from models.weights.tensors import Conventions, Weights, fuse, fuse_qkv

NAME = "google"
ANCHORS: tuple[str, ...] = ()  # these names have no prefixes from PyTorch scripts
PREFIXES = ("params/img/", "opt/target/", "params/", "img/", "")

Put = Callable[[str, np.ndarray], None]


def matches(tensors: Weights, config: Mapping[str, Any]) -> bool:
    return any("/" in name for name in tensors)


def translate(tensors: Weights) -> Weights:
    """Raises UserError for arrays that are not a Vision Transformer, or that have the wrong number of axes."""
    weights: Weights = {}
    misshapen = []

    def put(name: str, array: np.ndarray) -> None:
        weights[name] = torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))

    for name, array in _image_tower(to_arrays(tensors)).items():
        try:
            _put_array(put, name, array)
        except (ValueError, IndexError):
            misshapen.append(f"{name} is {array.shape}")
    if misshapen:
        raise UserError(f"wrong shape: {shorten(misshapen)}")
    for kind in ("weight", "bias"):  # attention pooling stores its query separately
        fuse(weights, [f"attn_pool.{part}.{kind}" for part in "kv"], f"attn_pool.kv.{kind}")
    return fuse_qkv(weights)


def conventions(tensors: Weights, config: Mapping[str, Any]) -> Conventions:
    """The number of heads comes from the shape of a query's bias. All Google models
    use `jax.nn.gelu`, the tanh form."""
    heads = [
        bias.shape[-2]
        for name, bias in tensors.items()
        if name.endswith("/query/bias") and bias.dim() > 1 and "/txt/" not in name
    ]
    return Conventions(heads=heads[0] if heads else None, activation="tanh")


def to_arrays(tensors: Weights) -> dict[str, np.ndarray]:
    """NumPy arrays; bfloat16, which NumPy does not have, becomes float32."""
    return {name: (t.float() if t.dtype == torch.bfloat16 else t).numpy() for name, t in tensors.items()}


def leaf_name(leaf: str) -> str:
    """ "weight" or "bias" for the names of flax and TensorFlow."""
    return {"kernel": "weight", "scale": "weight", "gamma": "weight", "beta": "bias"}.get(leaf, leaf)


def convolution(array: np.ndarray) -> np.ndarray:
    """HWIO kernel -> OIHW; GroupNorm vectors, sometimes stored as (1,1,1,C), -> (C,)."""
    return array.reshape(-1) if array.size == array.shape[-1] else array.transpose(3, 2, 0, 1)


def _image_tower(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The parameters of the image encoder without their prefix. Blocks that scan stacked are separated."""
    for prefix in PREFIXES:
        if f"{prefix}embedding/kernel" in arrays:
            break
    else:
        raise UserError(
            f"no embedding/kernel among the arrays ({shorten(arrays)}): not weights of a Vision Transformer"
        )
    # otherwise the optimiser state in the file would be listed as unknown tensors
    tree = {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
    for name in [name for name in tree if name.startswith("Transformer/encoderblock/")]:
        stacked = tree.pop(name)
        for i, array in enumerate(np.atleast_1d(stacked)):
            tree[name.replace("/encoderblock/", f"/encoderblock_{i}/")] = array
    return tree


def _put_array(put: Put, name: str, array: np.ndarray) -> None:
    """Stores an array under this project's name. Raises ValueError or IndexError for a wrong number of axes."""
    *path, leaf = name.split("/")
    where = ".".join(path)
    if name == "cls":
        put("cls_token", array)
    elif leaf == "pos_embedding":
        put("pos_embed", array.reshape(1, -1, array.shape[-1]))
    elif where == "embedding":
        put(f"patch_embed.proj.{leaf_name(leaf)}", array.transpose(3, 2, 0, 1) if leaf == "kernel" else array)
    elif where in ("pre_logits", "head"):
        put(f"{'pre_logits.fc' if where == 'pre_logits' else 'head'}.{leaf_name(leaf)}", array.T)
    elif where == "Transformer.encoder_norm":
        put(f"norm.{leaf_name(leaf)}", array)
    elif match := re.fullmatch(r"Transformer\.encoderblock_(\d+)\.(.+)", where):
        _put_block(put, f"blocks.{match[1]}", match[2], leaf, array)
    elif match := re.fullmatch(r"MAPHead_0(?:\.(.+))?", where):
        if leaf == "probe":
            put("attn_pool.latent", array)
        else:
            _put_block(put, "attn_pool", match[1], leaf, array)
    elif match := re.fullmatch(r"(conv_root|gn_root|block(\d+)\.unit(\d+)\.(\w+))", where):
        put(f"patch_embed.backbone.{_stem_name(match)}.{leaf_name(leaf)}", convolution(array))
    else:
        put(name, array)  # will be listed as unknown


def _put_block(put: Put, target: str, module: str, leaf: str, array: np.ndarray) -> None:
    """Stores an array of an encoder block or of the attention-pooling head. Linen numbers modules per class
    (LayerNorm_0, LayerNorm_1, MlpBlock_0), the earlier API across classes (LayerNorm_0, MultiHeadDotProductAttention_1,
    LayerNorm_2, MlpBlock_3).
    """
    kind, _, rest = module.partition(".")
    leaf = leaf_name(leaf)
    if kind.startswith("LayerNorm_"):
        norm = "norm" if target == "attn_pool" else ("norm1" if kind == "LayerNorm_0" else "norm2")
        put(f"{target}.{norm}.{leaf}", array)
    elif kind.startswith("MlpBlock_"):
        put(f"{target}.mlp.{'fc1' if rest == 'Dense_0' else 'fc2'}.{leaf}", array.T)
    elif kind.startswith("MultiHeadDotProductAttention_"):
        attention = target if target == "attn_pool" else f"{target}.attn"
        if rest == "out":
            put(f"{attention}.proj.{leaf}", array.reshape(-1, array.shape[-1]).T if leaf == "weight" else array)
        elif rest in ("query", "key", "value"):
            flat = array.reshape(array.shape[0], -1).T if leaf == "weight" else array.reshape(-1)
            put(f"{attention}.{rest[0]}.{leaf}", flat)
        else:  # the LayerNorms on queries and keys
            norms = {"query_norm": "q_norm", "key_norm": "k_norm", "query_ln": "q_norm", "key_ln": "k_norm"}
            put(f"{attention}.{norms.get(rest, rest)}.{leaf}", array)
    else:
        put(f"{target}.{module}.{leaf}", array)


def _stem_name(match: re.Match) -> str:
    """The timm name of a module in a hybrid's convolutional stem."""
    if match[2] is None:
        return "stem.conv" if match[1] == "conv_root" else "stem.norm"
    part = {"conv_proj": "downsample.conv", "gn_proj": "downsample.norm"}.get(match[4], match[4].replace("gn", "norm"))
    return f"stages.{int(match[2]) - 1}.blocks.{int(match[3]) - 1}.{part}"
