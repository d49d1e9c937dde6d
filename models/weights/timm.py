"""Reads and writes timm's names, which equal this project's except for a few modules."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from models.compatibility import check_timm, timm_architecture
from models.weights.tensors import Conventions, Weights, patch_grid, rename, section

NAME = "timm"
ANCHORS = ("patch_embed.proj.weight", "stem.conv.weight")
TASK_PARTS = ("head.", "pre_logits.", "mpp_head.", "mask_token")
"""Parameters that belong to a task rather than to the encoder, by this project's names."""
RENAMES = {
    # its ResNets classify with a 1x1 convolution; its root-only hybrid has no stem module
    "head.fc.": "head.",
    "patch_embed.backbone.conv.": "patch_embed.backbone.stem.conv.",
    "patch_embed.backbone.norm.": "patch_embed.backbone.stem.norm.",
}


def matches(tensors: Weights, config: Mapping[str, Any]) -> bool:
    return any(name.endswith(ANCHORS) or name.startswith("blocks.") for name in tensors)


def translate(tensors: Weights) -> Weights:
    weights = {rename(name, RENAMES): tensor for name, tensor in tensors.items()}
    head = weights.get("head.weight")
    if head is not None and head.dim() == 4:
        weights["head.weight"] = head.flatten(1)
    return weights


def conventions(tensors: Weights, config: Mapping[str, Any]) -> Conventions:
    """config: of a folder in the form of timm's hub, or with Hugging Face's names."""
    arguments, pretrained = section(config, "model_args"), section(config, "pretrained_cfg")
    kernel = tensors.get("patch_embed.proj.weight")
    size = arguments.get("img_size") or pretrained.get("input_size") or config.get("image_size")
    hybrid = any(name.startswith("patch_embed.backbone.") for name in tensors)  # its patches are not made of pixels
    return Conventions(
        heads=config.get("num_attention_heads") or arguments.get("num_heads"),
        activation=config.get("hidden_act") or arguments.get("act_layer") or "gelu",
        ln_eps=config.get("layer_norm_eps"),
        grid=None if kernel is None or hybrid else patch_grid(size, kernel),
    )


# ---------------------------------------------------------------- to timm


def to_timm(model: nn.Module) -> tuple[Weights, dict[str, Any]]:
    """(state dict, config.json in timm's hub form) of a model without tanh layer, or of its encoder.

    `timm.create_model("local-dir:FOLDER", pretrained=True)` loads the pair. Raises UserError for what timm cannot express.
    """
    config: dict[str, Any] = dict(model.config)  # type: ignore[arg-type]
    check_timm(config)
    weights = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    if "pre_logits.fc.weight" in weights:
        weights = {name: tensor for name, tensor in weights.items() if not name.startswith(TASK_PARTS)}
        config["num_classes"] = 0
    about = {
        "architecture": timm_architecture(config["variant"]),
        "num_classes": config["num_classes"],
        "pretrained_cfg": _pretrained_cfg(config),
        "model_args": {"in_chans": config["channels"]},
    }
    if "pool" not in config:
        about["pretrained_cfg"] |= {"classifier": "head.fc", "first_conv": "stem.conv"}
        return _resnet_state(weights), about
    about["model_args"] |= _vit_arguments(config, model.shape)
    if model.pos_embed is not None:
        weights["pos_embed"] = model.pos_embed.detach().clone()  # type: ignore[operator, union-attr]
    if config["registers"] and "cls_token" in weights and "pos_embed" in weights:
        # In timm, registers have positions too, or no token has one, so the position is added to the class token.
        weights["cls_token"] = weights["cls_token"] + weights["pos_embed"][:, :1]
        weights["pos_embed"] = weights["pos_embed"][:, 1:].contiguous()
    if model.shape.stem == ():  # type: ignore[union-attr]
        weights = {name.replace("backbone.stem.", "backbone."): tensor for name, tensor in weights.items()}
    return weights, about


def _pretrained_cfg(config: Mapping[str, Any]) -> dict[str, Any]:
    """timm's description of the data: size and normalisation of the images, number of classes."""
    return {
        "input_size": [config["channels"], config["image_size"], config["image_size"]],
        "mean": [0.5] * config["channels"],
        "std": [0.5] * config["channels"],
        "interpolation": "bilinear",
        "crop_pct": 1.0,
        "num_classes": config["num_classes"],
        "classifier": "head",
    }


def _resnet_state(weights: Weights) -> Weights:
    state = {}
    for name, tensor in weights.items():
        name = rename(name, {"head.": "head.fc."})
        state[name] = tensor[:, :, None, None] if name == "head.fc.weight" else tensor
    return state


def _vit_arguments(config: Mapping[str, Any], shape: Any) -> dict[str, Any]:
    """Arguments of timm's VisionTransformer. shape: the model's `Variant`."""
    arguments = {
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
    if config["registers"]:
        arguments |= {"reg_tokens": config["registers"], "no_embed_class": True}
    return arguments
