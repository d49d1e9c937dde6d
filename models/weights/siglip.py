"""SigLIP's image tower in Hugging Face's names (arXiv 2303.15343): attention pooling, no class token.

The same model in big_vision's names is read by `google`, in open_clip's (a timm model inside) by `timm`.
"""

import re
from collections.abc import Mapping
from typing import Any

from models.weights.tensors import Conventions, Weights, fuse_qkv, patch_grid, section

NAME = "siglip"
ANCHORS = ("embeddings.patch_embedding.weight",)
BASES = ("vision_model.",)
OTHER_PARTS = ("text_model.", "logit_scale", "logit_bias")
POOL = {
    "probe": "latent",
    "attention.out_proj.weight": "proj.weight",
    "attention.out_proj.bias": "proj.bias",
    "layernorm.weight": "norm.weight",
    "layernorm.bias": "norm.bias",
}
MODULES = {"self_attn.out_proj": "attn.proj", "layer_norm1": "norm1", "layer_norm2": "norm2"}
MODULES |= {f"self_attn.{part}_proj": f"attn.{part}" for part in "qkv"}


def matches(tensors: Weights, config: Mapping[str, Any]) -> bool:
    """CLIP's image tower has the same names and a class token; SigLIP has no class token."""
    names = [name for name in tensors if not name.startswith("text_model.")]
    anchored = any(name.endswith(ANCHORS) for name in names)
    return anchored and not any(name.endswith("embeddings.class_embedding") for name in names)


def translate(tensors: Weights) -> Weights:
    weights: Weights = {}
    for name, tensor in tensors.items():
        bare = name.removeprefix("vision_model.")
        if match := re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", bare):
            weights[f"blocks.{match[1]}.{MODULES.get(match[2], match[2])}.{match[3]}"] = tensor
        elif match := re.fullmatch(r"head\.attention\.in_proj_(weight|bias)", bare):
            third = tensor.shape[0] // 3 if tensor.dim() else 0
            weights[f"attn_pool.q.{match[1]}"] = tensor[:third] if tensor.dim() else tensor
            weights[f"attn_pool.kv.{match[1]}"] = tensor[third:] if tensor.dim() else tensor
        elif bare.startswith("head."):
            part = bare.removeprefix("head.")
            weights[f"attn_pool.{POOL.get(part, part)}"] = tensor
        elif bare == "embeddings.position_embedding.weight":
            weights["pos_embed"] = tensor[None]
        else:
            renames = {
                "embeddings.patch_embedding.": "patch_embed.proj.",
                "post_layernorm.": "norm.",
                "classifier.": "head.",
            }
            old = next((old for old in renames if bare.startswith(old)), "")
            weights[renames.get(old, "") + bare.removeprefix(old) if old else name] = tensor
    return fuse_qkv(weights)


def conventions(tensors: Weights, config: Mapping[str, Any]) -> Conventions:
    config = section(config, "vision_config") or config
    kernel = next(tensor for name, tensor in tensors.items() if name.endswith(ANCHORS))
    return Conventions(
        heads=config.get("num_attention_heads"),
        activation=config.get("hidden_act") or "gelu_pytorch_tanh",
        ln_eps=config.get("layer_norm_eps") or 1e-6,
        grid=patch_grid(config.get("image_size"), kernel),
    )
