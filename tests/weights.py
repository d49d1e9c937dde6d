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
        model._fix_positions()
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
    heads = model.shape.heads
    arrays = {"cls": state["cls_token"]} if "cls_token" in state else {}
    position = "pos_embedding" if naming == "big_vision" else "Transformer/posembed_input/pos_embedding"
    if "pos_embed" in state:
        arrays[position] = state["pos_embed"]
    arrays["embedding/kernel"] = state["patch_embed.proj.weight"].transpose(2, 3, 1, 0)
    arrays["embedding/bias"] = state["patch_embed.proj.bias"]

    def attention(prefix, qkv_weight, qkv_bias, out_weight, out_bias):
        width = qkv_weight.shape[1]
        for part, kernel, bias in zip(
            ("query", "key", "value"), np.split(qkv_weight, 3), np.split(qkv_bias, 3), strict=True
        ):
            arrays[f"{prefix}/{part}/kernel"] = kernel.T.reshape(width, heads, -1)
            arrays[f"{prefix}/{part}/bias"] = bias.reshape(heads, -1)
        arrays[f"{prefix}/out/kernel"] = out_weight.T.reshape(heads, -1, width)
        arrays[f"{prefix}/out/bias"] = out_bias

    def mlp(prefix, ours):
        for i in (0, 1):
            arrays[f"{prefix}/Dense_{i}/kernel"] = state[f"{ours}.fc{i + 1}.weight"].T
            arrays[f"{prefix}/Dense_{i}/bias"] = state[f"{ours}.fc{i + 1}.bias"]

    def norm(prefix, ours):
        arrays[f"{prefix}/scale"], arrays[f"{prefix}/bias"] = state[f"{ours}.weight"], state[f"{ours}.bias"]

    mha, second, dense = (1, 2, 3) if naming == "published" else (0, 1, 0)
    for i in range(model.shape.depth):
        block, ours = f"Transformer/encoderblock_{i}", f"blocks.{i}"
        norm(f"{block}/LayerNorm_0", f"{ours}.norm1")
        attention(
            f"{block}/MultiHeadDotProductAttention_{mha}",
            *(state[f"{ours}.attn.{name}"] for name in ("qkv.weight", "qkv.bias", "proj.weight", "proj.bias")),
        )
        norm(f"{block}/LayerNorm_{second}", f"{ours}.norm2")
        mlp(f"{block}/MlpBlock_{dense}", f"{ours}.mlp")
    norm("Transformer/encoder_norm", "norm")
    if "attn_pool.latent" in state:
        pool = "attn_pool"
        arrays["MAPHead_0/probe"] = state[f"{pool}.latent"]
        attention(
            "MAPHead_0/MultiHeadDotProductAttention_0",
            np.concatenate([state[f"{pool}.q.weight"], state[f"{pool}.kv.weight"]]),
            np.concatenate([state[f"{pool}.q.bias"], state[f"{pool}.kv.bias"]]),
            state[f"{pool}.proj.weight"],
            state[f"{pool}.proj.bias"],
        )
        norm("MAPHead_0/LayerNorm_0", f"{pool}.norm")
        mlp("MAPHead_0/MlpBlock_0", f"{pool}.mlp")
    for ours, theirs in (("pre_logits.fc", "pre_logits"), ("head", "head")):
        if f"{ours}.weight" in state:
            arrays[f"{theirs}/kernel"], arrays[f"{theirs}/bias"] = state[f"{ours}.weight"].T, state[f"{ours}.bias"]
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
    if naming != "big_vision":
        return arrays
    stacked = {}
    for name, array in arrays.items():
        if "/encoderblock_0/" in name:
            blocks = [arrays[name.replace("_0/", f"_{i}/", 1)] for i in range(model.shape.depth)]
            stacked["params/" + name.replace("/encoderblock_0/", "/encoderblock/")] = np.stack(blocks)
        elif "/encoderblock_" not in name:
            stacked["params/" + name] = array
    return stacked


def save_npz(path, arrays):
    np.savez(path, **arrays)
    return str(path)
