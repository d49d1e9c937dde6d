"""Small models with random weights, and the same weights in the names of other projects."""

import numpy as np
import torch

from models import create_model

TINY = {"width": 32, "depth": 2, "heads": 4, "mlp": 48}


def tiny(classes=7, size=24, seed=0, **options):
    """A small model, every parameter random."""
    options = {"variant": "Ti/8", **TINY, **options}
    with torch.device("meta"):  # no time spent on initial values
        model = create_model(num_classes=classes, image_size=size, **options)
    model.to_empty(device="cpu")
    if options.get("posemb") == "sincos2d":
        model.fix_positions()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.eval()


def logits(model, seed=1):
    size = model.config["image_size"]
    x = torch.randint(0, 256, (2, size, size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return model(x)


def google_arrays(model, naming="published"):
    """The inverse of the loader, written from the published list of keys.

    naming: "published" (pre-Linen, numbered across classes), "linen" (per class), "big_vision" (positions at the top,
    stacked blocks, under params/).
    """
    state = {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}
    arrays = {"cls": state["cls_token"]} if "cls_token" in state else {}
    if "pos_embed" in state:
        position = "pos_embedding" if naming == "big_vision" else "Transformer/posembed_input/pos_embedding"
        arrays[position] = state["pos_embed"]
    arrays["embedding/kernel"] = state["patch_embed.proj.weight"].transpose(2, 3, 1, 0)
    arrays["embedding/bias"] = state["patch_embed.proj.bias"]
    for i in range(model.shape.depth):
        arrays |= _block(state, i, model.shape.heads, naming)
    arrays |= _norm(state, "norm", "Transformer/encoder_norm")
    if "attn_pool.latent" in state:
        arrays |= _pool(state, model.shape.heads)
    for ours, theirs in (("pre_logits.fc", "pre_logits"), ("head", "head")):
        if f"{ours}.weight" in state:
            arrays[f"{theirs}/kernel"], arrays[f"{theirs}/bias"] = state[f"{ours}.weight"].T, state[f"{ours}.bias"]
    arrays |= _stem(state)
    return _stacked(arrays, model.shape.depth) if naming == "big_vision" else arrays


def _norm(state, ours, theirs):
    return {f"{theirs}/scale": state[f"{ours}.weight"], f"{theirs}/bias": state[f"{ours}.bias"]}


def _mlp(state, ours, theirs):
    arrays = {}
    for i in (0, 1):
        arrays[f"{theirs}/Dense_{i}/kernel"] = state[f"{ours}.fc{i + 1}.weight"].T
        arrays[f"{theirs}/Dense_{i}/bias"] = state[f"{ours}.fc{i + 1}.bias"]
    return arrays


def _attention(theirs, heads, qkv_weight, qkv_bias, out_weight, out_bias):
    width, arrays = qkv_weight.shape[1], {}
    parts = zip(("query", "key", "value"), np.split(qkv_weight, 3), np.split(qkv_bias, 3), strict=True)
    for part, kernel, bias in parts:
        arrays[f"{theirs}/{part}/kernel"] = kernel.T.reshape(width, heads, -1)
        arrays[f"{theirs}/{part}/bias"] = bias.reshape(heads, -1)
    return arrays | {f"{theirs}/out/kernel": out_weight.T.reshape(heads, -1, width), f"{theirs}/out/bias": out_bias}


def _block(state, i, heads, naming):
    attention, second_norm, mlp = (1, 2, 3) if naming == "published" else (0, 1, 0)
    theirs, ours = f"Transformer/encoderblock_{i}", f"blocks.{i}"
    tensors = (state[f"{ours}.attn.{name}"] for name in ("qkv.weight", "qkv.bias", "proj.weight", "proj.bias"))
    return {
        **_norm(state, f"{ours}.norm1", f"{theirs}/LayerNorm_0"),
        **_attention(f"{theirs}/MultiHeadDotProductAttention_{attention}", heads, *tensors),
        **_norm(state, f"{ours}.norm2", f"{theirs}/LayerNorm_{second_norm}"),
        **_mlp(state, f"{ours}.mlp", f"{theirs}/MlpBlock_{mlp}"),
    }


def _pool(state, heads):
    pool = {name.removeprefix("attn_pool."): array for name, array in state.items() if name.startswith("attn_pool.")}
    qkv = (np.concatenate([pool[f"q.{kind}"], pool[f"kv.{kind}"]]) for kind in ("weight", "bias"))
    attention = "MAPHead_0/MultiHeadDotProductAttention_0"
    return {
        "MAPHead_0/probe": pool["latent"],
        **_attention(attention, heads, *qkv, pool["proj.weight"], pool["proj.bias"]),
        **_norm(pool, "norm", "MAPHead_0/LayerNorm_0"),
        **_mlp(pool, "mlp", "MAPHead_0/MlpBlock_0"),
    }


def _stem(state):
    """The convolutional stages of a hybrid."""
    arrays = {}
    for name, array in state.items():
        if not name.startswith("patch_embed.backbone."):
            continue
        name = name.removeprefix("patch_embed.backbone.")
        leaf = "kernel" if "conv" in name else {"weight": "scale", "bias": "bias"}[name.rsplit(".", 1)[1]]
        array = array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.reshape(1, 1, 1, -1)
        if name.startswith("stem."):
            arrays[f"{'conv_root' if 'conv' in name else 'gn_root'}/{leaf}"] = array
            continue
        _, stage, _, unit, part, *rest = name.split(".")
        part = {"conv": "conv_proj", "norm": "gn_proj"}[rest[0]] if part == "downsample" else part.replace("norm", "gn")
        arrays[f"block{int(stage) + 1}/unit{int(unit) + 1}/{part}/{leaf}"] = array
    return arrays


def _stacked(arrays, depth):
    """Blocks stacked by scan, everything under params/."""
    stacked = {}
    for name, array in arrays.items():
        if "/encoderblock_0/" in name:
            blocks = [arrays[name.replace("_0/", f"_{i}/", 1)] for i in range(depth)]
            stacked["params/" + name.replace("/encoderblock_0/", "/encoderblock/")] = np.stack(blocks)
        elif "/encoderblock_" not in name:
            stacked["params/" + name] = array
    return stacked


def save_npz(path, arrays):
    np.savez(path, **arrays)
    return str(path)
