"""Checks which models other libraries can express. Does not import torch, so a job can check before it loads the
libraries.

`config` is always `model.config`, or the entry "model" of a checkpoint's config.json.
"""

from collections.abc import Mapping
from typing import Any

from models.errors import UserError
from models.variants import parse_variant

# The registered timm model whose arguments `models.weights.to_timm` overrides. The ViTs are `vit_WIDTH_patchP_224`.
TIMM_ARCHITECTURES = {
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
TIMM_WIDTHS = {"Ti": "tiny", "S": "small", "B": "base", "L": "large", "H": "huge", "g": "giant", "G": "gigantic"}
TIMM_REGISTERED = (
    *("Ti/16", "S/32", "S/16", "S/8", "B/32", "B/16", "B/8"),
    *("L/32", "L/16", "L/14", "H/14", "g/14", "G/14"),
)


def timm_architecture(variant: str) -> str:
    """The registered timm model that is closest to a variant, and the same model for a
    common variant. Raises UserError if there is none."""
    if variant in TIMM_ARCHITECTURES:
        return TIMM_ARCHITECTURES[variant]
    if "R" in variant:
        raise UserError(
            f"timm has no model like {variant}; its hybrids and ResNets here: {', '.join(TIMM_ARCHITECTURES)}; export "
            "to onnx, torch-export or safetensors instead"
        )
    if variant not in TIMM_REGISTERED:
        return "vit_base_patch16_224"
    width, patch = variant.split("/")
    return f"vit_{TIMM_WIDTHS[width]}_patch{patch}_224"


def check_timm(config: Mapping[str, Any]) -> None:
    """Raises UserError for a model that timm cannot express, and names the formats that can."""
    timm_architecture(config["variant"])
    eps = config.get("ln_eps", 1e-6)
    if eps != 1e-6:
        raise UserError(
            f"timm's ViT has LayerNorm epsilon 1e-6, this model {eps}; export to huggingface, onnx, torch-export or "
            "safetensors instead"
        )


def check_huggingface(config: Mapping[str, Any]) -> None:
    """Raises UserError for a model that Hugging Face's ViT cannot express, and names the formats that can."""
    shape = parse_variant(config["variant"])
    only = {"pool": "token", "registers": 0, "qk_norm": False, "fc_norm": False}
    other = [f"{name}={config[name]!r}" for name, value in only.items() if config.get(name, value) != value]
    if shape.stem is not None or other:
        what = ", ".join(other) or f"the convolutional stages of {config['variant']}"
        raise UserError(
            f"Hugging Face's ViT cannot express {what}; export to timm, onnx, torch-export or safetensors instead"
        )
