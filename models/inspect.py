"""Computes the values of the paper's Figure 7 for a trained Vision Transformer, and attention rollout (Figures 6 and
14).

Images are uint8 (B,H,W,C) at the model's resolution. `pipeline.operations.visualization` draws the figures.
Shape suffixes: B batch, T tokens, P patch side, C channels, g patches per side.
"""

import numpy as np
import torch

from models.errors import UserError
from models.vit import HybridEmbed, VisionTransformer


def embedding_filters(model: VisionTransformer, count: int = 28) -> tuple[np.ndarray, np.ndarray]:
    """Principal components of the patch embedding: (n,P,P,C), largest first, and their fractions of the variance. The D
    filters of the linear embedding are the samples, their P*P*C weights the variables (section 4.5, Figure 7 left).
    Raises UserError for a hybrid, which does not embed pixels.
    """
    if isinstance(model.patch_embed, HybridEmbed):
        raise UserError(f"{model.config['variant']} embeds a feature map, so it has no filters over pixels")
    kernel = model.patch_embed.proj.weight.detach().double().cpu().permute(0, 2, 3, 1)  # D,P,P,C
    samples = kernel.flatten(1)
    samples = samples - samples.mean(dim=0)
    _, scale, components = torch.linalg.svd(samples, full_matrices=False)
    share = scale**2 / (scale**2).sum().clamp(min=1e-30)
    # The sign of a component is arbitrary; a positive sum makes the figures of different runs comparable.
    components = components * torch.where(components.sum(dim=1, keepdim=True) < 0, -1.0, 1.0)
    return components[:count].reshape(-1, *kernel.shape[1:]).numpy(), share[:count].numpy()


def position_similarity(model: VisionTransformer) -> np.ndarray:
    """(g,g,g,g): cosine similarity of the position embedding of patch (row, column) to all others (Figure 7 centre).

    Excludes the position of the class token. Raises UserError for a model without position embeddings.
    """
    if model.pos_embed is None:
        raise UserError(f'{model.config["variant"]} has no position embeddings (posemb="none")')
    patches = model.pos_embed[0, -(model.grid**2) :].detach().double().cpu()
    unit = patches / patches.norm(dim=1, keepdim=True).clamp(min=1e-30)
    return (unit @ unit.T).reshape((model.grid,) * 4).numpy()


@torch.no_grad()
def attention_maps(model: VisionTransformer, images: torch.Tensor) -> list[torch.Tensor]:
    """Attention weights of every block, each (B,heads,T,T)."""
    inputs: list[torch.Tensor] = []
    hooks = [
        block.attn.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))  # type: ignore[union-attr]
        for block in model.blocks
    ]
    try:
        model.encode(images)
    finally:
        for hook in hooks:
            hook.remove()
    return [block.attn.probabilities(x) for block, x in zip(model.blocks, inputs, strict=True)]  # type: ignore[union-attr, operator]


def attention_distance(model: VisionTransformer, images: torch.Tensor, batch: int = 16) -> np.ndarray:
    """Mean attention distance in pixels, (depth, heads) (section 4.5, appendix D.7).

    For every patch, the attention-weighted distance to all patches; mean over patches and images. Class token and
    registers are excluded from queries and keys, and the remaining attention is normalised again, so that a head that
    mostly attends to the class token does not count as local.
    """
    axis = torch.arange(model.grid, dtype=torch.float64) * (model.config["image_size"] / model.grid)
    centres = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), dim=-1).reshape(-1, 2)
    distance = torch.cdist(centres, centres)
    total = torch.zeros(len(model.blocks), model.shape.heads, dtype=torch.float64)
    for part in images.split(batch):
        for layer, weights in enumerate(attention_maps(model, part)):
            between = weights[:, :, model.prefix :, model.prefix :].double()
            between = between / between.sum(dim=-1, keepdim=True).clamp(min=1e-30)
            total[layer] += (between * distance).sum(dim=-1).mean(dim=-1).sum(dim=0)
    return (total / len(images)).numpy()


def attention_rollout(model: VisionTransformer, images: torch.Tensor) -> np.ndarray:
    """(B,g,g): the contribution of each patch to the output (appendix D.8, after arXiv 2005.00928), scaled so that the
    largest is 1.

    Attention is averaged over heads, averaged with the identity for the residual connections, and multiplied over the
    layers. The output is the class token, or the mean of the patches for a model without one.
    """
    rollout = None
    for weights in attention_maps(model, images):
        mean = weights.double().mean(dim=1)
        mixed = 0.5 * mean + 0.5 * torch.eye(mean.shape[-1], dtype=mean.dtype)
        mixed = mixed / mixed.sum(dim=-1, keepdim=True)
        rollout = mixed if rollout is None else mixed @ rollout
    assert rollout is not None
    rows = rollout[:, 0] if model.cls_token is not None else rollout[:, model.prefix :].mean(dim=1)
    patches = rows[:, model.prefix :]
    patches = patches / patches.amax(dim=1, keepdim=True).clamp(min=1e-30)
    return patches.reshape(-1, model.grid, model.grid).numpy()
