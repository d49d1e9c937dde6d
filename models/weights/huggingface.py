"""Hugging Face's ViT family: reads ViT, ViT-MAE, ViT-MSN and DINOv2 (with or without registers), and writes ViT.

Each module has two names: the one in the files, unchanged since 2021, and the one in transformers 5.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from models.compatibility import check_huggingface
from models.weights.tensors import Conventions, Weights, fuse_qkv, patch_grid

NAME = "huggingface"
ANCHORS = ("embeddings.patch_embeddings.projection.weight",)
BASES = ("vit.", "dinov2_with_registers.", "dinov2.", "deit.")
"""The prefix of encoder parameters in a model with a head."""
OTHER_PARTS = ("decoder.", "mask_token")
"""Parameters that only pre-training needs, by this project's names."""

# Names of the files of ViT; {i} is the layer.
VIT = {
    "embeddings.cls_token": "cls_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "layernorm": "norm",
    "pooler.dense": "pre_logits.fc",
    "classifier": "head",
    "encoder.layer.{i}.layernorm_before": "blocks.{i}.norm1",
    "encoder.layer.{i}.layernorm_after": "blocks.{i}.norm2",
    "encoder.layer.{i}.attention.attention.query": "blocks.{i}.attn.q",
    "encoder.layer.{i}.attention.attention.key": "blocks.{i}.attn.k",
    "encoder.layer.{i}.attention.attention.value": "blocks.{i}.attn.v",
    "encoder.layer.{i}.attention.output.dense": "blocks.{i}.attn.proj",
    "encoder.layer.{i}.intermediate.dense": "blocks.{i}.mlp.fc1",
    "encoder.layer.{i}.output.dense": "blocks.{i}.mlp.fc2",
}
_ATTENTION = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "proj"}
ALIASES = {
    "embeddings.mask_token": "mask_token",
    "embeddings.register_tokens": "reg_token",
    "layers.{i}.layernorm_before": "blocks.{i}.norm1",
    "layers.{i}.layernorm_after": "blocks.{i}.norm2",
    "encoder.layer.{i}.norm1": "blocks.{i}.norm1",
    "encoder.layer.{i}.norm2": "blocks.{i}.norm2",
    "encoder.layer.{i}.layer_scale1.lambda1": "blocks.{i}.ls1.gamma",
    "encoder.layer.{i}.layer_scale2.lambda1": "blocks.{i}.ls2.gamma",
    **{
        f"{layers}.{{i}}.attention.{theirs}": f"blocks.{{i}}.attn.{ours}"
        for layers in ("layers", "encoder.layer")
        for theirs, ours in _ATTENTION.items()
    },
    **{
        f"{layers}.{{i}}.mlp.{dense}": f"blocks.{{i}}.mlp.{dense}"
        for layers in ("layers", "encoder.layer")
        for dense in ("fc1", "fc2")
    },
}
_OURS = {**VIT, **ALIASES}
_THEIRS = {ours: theirs for theirs, ours in VIT.items()}


def matches(tensors: Weights, config: Mapping[str, Any]) -> bool:
    return any(name.endswith(ANCHORS) for name in tensors)


def translate(tensors: Weights) -> Weights:
    weights: Weights = {}
    for name, tensor in tensors.items():
        bare = name
        for base in BASES:
            bare = bare.removeprefix(base)
        module, dot, kind = bare.rpartition(".")
        if not dot or kind not in ("weight", "bias"):
            module, kind = bare, ""
        layer = re.search(r"\.(\d+)\.", module)
        pattern = module.replace(layer[0], ".{i}.", 1) if layer else module
        if pattern in _OURS:
            name = _OURS[pattern].format(i=layer[1] if layer else "") + (f".{kind}" if kind else "")
        weights[name] = tensor  # an unknown name is kept and will be listed
    return fuse_qkv(weights)


def conventions(tensors: Weights, config: Mapping[str, Any]) -> Conventions:
    kernel = next(tensor for name, tensor in tensors.items() if name.endswith(ANCHORS))
    return Conventions(
        heads=config.get("num_attention_heads"),
        activation=config.get("hidden_act") or "gelu",
        ln_eps=config.get("layer_norm_eps"),
        grid=patch_grid(config.get("image_size"), kernel),
        cls_position=True,
    )


# ---------------------------------------------------------------- to Hugging Face


def to_huggingface(model: nn.Module, classes: list[str] | None = None) -> tuple[Weights, dict, dict]:
    """(state dict, config.json, preprocessor_config.json) of ViTForImageClassification, or of ViTModel.

    A model with the tanh layer becomes a ViTModel, whose pooler is that layer; its linear head is dropped. Raises
    UserError for what Hugging Face's ViT cannot express.
    """
    config: dict[str, Any] = dict(model.config)  # type: ignore[arg-type]
    check_huggingface(config)
    shape: Any = model.shape
    weights = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    table = model.pos_embed
    if table is None:
        table = torch.zeros(1, 1 + int(model.grid) ** 2, shape.width)  # type: ignore[arg-type]
    weights["pos_embed"] = table.detach().clone()  # type: ignore[operator, union-attr]
    pooled = "pre_logits.fc.weight" in weights
    state = _state(weights, base="" if pooled else "vit.", pooled=pooled)
    labels = classes or [f"LABEL_{i}" for i in range(config["num_classes"])]
    return state, _config(config, shape, labels, pooled), _processor(config)


def _state(weights: Weights, base: str, pooled: bool) -> Weights:
    """The tensors under Hugging Face's names. pooled: drop the head."""
    state: Weights = {}
    for name, tensor in weights.items():
        module, _, kind = name.rpartition(".")
        layer = re.search(r"blocks\.(\d+)\.", name)
        number = layer[1] if layer else ""
        if ".attn.qkv." in name:
            for part, rows in zip("qkv", tensor.chunk(3), strict=True):
                theirs = _THEIRS[f"blocks.{{i}}.attn.{part}"].format(i=number)
                state[f"{base}{theirs}.{kind}"] = rows.contiguous()
        elif name in _THEIRS:  # a parameter of the encoder itself
            state[base + _THEIRS[name]] = tensor
        elif module == "head":
            if not pooled:
                state[f"classifier.{kind}"] = tensor
        else:
            theirs = _THEIRS[module.replace(layer[0], "blocks.{i}.") if layer else module].format(i=number)
            state[f"{base}{theirs}.{kind}"] = tensor
    return state


def _config(config: Mapping[str, Any], shape: Any, labels: list[str], pooled: bool) -> dict[str, Any]:
    """config.json. shape: the model's `Variant`."""
    return {
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


def _processor(config: Mapping[str, Any]) -> dict[str, Any]:
    """preprocessor_config.json: bilinear resize to the model's size, then [-1, 1]."""
    return {
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
