"""Fits translated weights to a model: resizes position embeddings, drops the head
of another task, and requires all other shapes to match."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from models import posemb
from models.errors import UserError, plural, shorten
from models.weights.foreign import hint
from models.weights.tensors import Conventions, NamedWeights, Weights
from models.weights.timm import TASK_PARTS

# The forms of GELU by their names in this project, Hugging Face's and timm's configurations.
ACTIVATIONS = {
    **dict.fromkeys(("exact", "gelu", "gelu_python"), "exact"),
    **dict.fromkeys(("tanh", "gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_python_tanh", "gelu_tanh"), "tanh"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadReport:
    """The loaded and the skipped tensors. `str(report)` is a readable summary."""

    source: str
    naming: str
    """checkpoint, google, bit, timm, huggingface, ... (`models.weights.NAMINGS`)"""
    loaded: tuple[str, ...]
    """Parameters filled from the source."""
    fresh: tuple[str, ...]
    """Parameters of the model's head that keep their initial values."""
    dropped: tuple[str, ...]
    """Unused tensors of the source: another head, a decoder, a text tower."""
    notes: tuple[str, ...]
    """Differences that change the results: resized positions, another GELU."""

    def __str__(self) -> str:
        lines = [f"{self.source} ({self.naming}): {plural(len(self.loaded), 'tensor')} loaded"]
        if self.fresh:
            lines.append(f"  keeps its initial values: {', '.join(self.fresh)}")
        if self.dropped:
            lines.append(f"  not used: {shorten(self.dropped)}")
        return "\n".join([*lines, *(f"  {note}" for note in self.notes)])


def fit_weights(
    model: nn.Module, named: NamedWeights, source: str, strict_head: bool = False
) -> tuple[Weights, LoadReport]:
    """(weights in the model's shapes and precision, report); does not change the model. source: the name of the weights
    in messages. strict_head: a head with other classes or another tanh layer is an error instead of being dropped.
    Raises UserError that lists tensors that are missing, unknown or have another shape, or names a convention that
    differs.
    """
    target = model.state_dict()
    weights = dict(named.weights)
    notes = [*named.notes, *_fold_layer_scale(weights)]
    if "pos_embed" in weights and hasattr(model, "grid"):
        notes += _fit_positions(model, weights, named.conventions, source)
    ours = {name: tensor.shape for name, tensor in target.items() if name.startswith(TASK_PARTS)}
    dropped = [] if strict_head else _drop_other_head(weights, ours)
    optional = () if strict_head else tuple(ours)
    _check_fit(model, target, weights, optional, source)
    notes += _check_conventions(model, named.conventions, source)
    fitted = {name: tensor.to(target[name].dtype) for name, tensor in weights.items()}
    return fitted, LoadReport(
        source=source,
        naming=named.naming,
        loaded=tuple(weights),
        fresh=tuple(name for name in ours if name not in weights),
        dropped=(*dropped, *named.dropped),
        notes=tuple(notes),
    )


def _drop_other_head(weights: Weights, ours: Mapping[str, torch.Size]) -> list[str]:
    """Removes the head of the source if it differs from the model's. Returns the removed names. A linear head works
    only with the representation on which it was trained (with or without the tanh layer). ours: shapes of the model's
    head.
    """
    theirs = {name: tensor.shape for name, tensor in weights.items() if name.startswith(TASK_PARTS)}
    tanh_layers = [{name for name in head if name.startswith("pre_logits.")} for head in (ours, theirs)]
    same_layers = tanh_layers[0] == tanh_layers[1]
    dropped = []
    for name in theirs:
        if ours.get(name) != theirs[name] or (name.startswith("head.") and not same_layers):
            dropped.append(name)
            del weights[name]
    return dropped


def _check_fit(
    model: nn.Module, target: Mapping[str, torch.Tensor], weights: Weights, optional: tuple[str, ...], source: str
) -> None:
    """Raises UserError unless the weights match the model. optional: parameters that may keep their initial values."""
    missing = [name for name in target if name not in weights and name not in optional]
    unknown = [name for name in weights if name not in target]
    shared = {name: tensor for name, tensor in weights.items() if name in target}
    misshapen = [
        f"{name} is {tuple(tensor.shape)}, the model has {tuple(target[name].shape)}"
        for name, tensor in shared.items()
        if tensor.shape != target[name].shape
    ]
    misshapen += [
        f"{name} has dtype {tensor.dtype}, not real numbers"
        for name, tensor in shared.items()
        if not tensor.is_floating_point()
    ]
    lists = {"missing": missing, "unknown": unknown, "wrong shape": misshapen}
    problems = [f"{what}: {shorten(names)}" for what, names in lists.items() if names]
    if problems:
        config: Any = model.config
        reason = hint([*missing, *unknown], misshapen)
        raise UserError(f"{source} does not fit {config['variant']}: {'; '.join(problems)}{reason}")


def _fold_layer_scale(weights: Weights) -> list[str]:
    """Multiplies LayerScale (timm's init_values) into the matrix before it, which gives the same function. Returns notes."""
    scales = [name for name in weights if re.fullmatch(r"blocks\.\d+\.ls[12]\.gamma", name)]
    for name in scales:
        layer = name.replace("ls1.gamma", "attn.proj").replace("ls2.gamma", "mlp.fc2")
        weight, bias, gamma = weights.get(f"{layer}.weight"), weights.get(f"{layer}.bias"), weights[name]
        if weight is None or bias is None or weight.dim() != 2 or not bias.shape == gamma.shape == weight.shape[:1]:
            return []  # it will be listed as unknown
        weights[f"{layer}.weight"], weights[f"{layer}.bias"] = weight * gamma[:, None], bias * gamma
        del weights[name]
    return ["LayerScale folded into attn.proj and mlp.fc2"] if scales else []


# ---------------------------------------------------------------- positions


def _fit_positions(model: nn.Module, weights: Weights, source_says: Conventions, source: str) -> list[str]:
    """Resizes pos_embed in `weights` to the model's tokens and grid. Returns notes for the report. Raises UserError for
    a non-square grid that the source's configuration does not describe. A table of another width is unchanged and will
    be listed in the error.
    """
    config: Any = model.config
    width: int = model.shape.width  # type: ignore[assignment, union-attr]
    grid: int = model.grid  # type: ignore[assignment]
    table, registers = weights["pos_embed"], weights.get("reg_token")
    if any(t is not None and (t.dim() != 3 or t.shape[2] != width) for t in (table, registers)):
        return []
    # Rows before the patches: class token and registers, or neither (big_vision and timm's no_embed_class).
    cls = int("cls_token" in weights)
    tokens = cls + (registers.shape[1] if registers is not None else 0)
    prefixes = {tokens, cls} if source_says.cls_position else {tokens, cls, 0}
    found = _find_grid(table.shape[1], prefixes, grid, source_says.grid)
    if isinstance(found, str):
        raise UserError(f"{source} does not fit {config['variant']}: {found}")
    if found is None:
        return []
    prefix, old = found
    cls_row = table[:, :1] if prefix and "cls_token" in weights else torch.zeros_like(table[:, :1])
    if config["posemb"] != "learn":
        _drop_positions(weights, cls_row, prefix, old, config["posemb"])
        return []
    if registers is not None and prefix == tokens:  # the position of a register is a constant in it
        weights["reg_token"] = registers + table[:, prefix - registers.shape[1] : prefix]
    has_cls = config["pool"] == "token"
    rows = torch.cat([cls_row, table[:, prefix:]], dim=1) if has_cls else table[:, prefix:]
    weights["pos_embed"] = posemb.resize(rows, grid, prefix=int(has_cls), old_grid=old)
    notes = [f"position embeddings resized from {old[0]}x{old[1]} to {grid}x{grid}"] if old != (grid, grid) else []
    if cls and not prefix and source_says.grid is None:  # 14x16 patches with a class token have as many rows as 15x15
        notes.append(
            f"{table.shape[1]} position embeddings are interpreted as {old[0]}x{old[1]} patches without a class token"
        )
    return notes


def _find_grid(
    rows: int, prefixes: set[int], grid: int, known: tuple[int, int] | None
) -> tuple[int, tuple[int, int]] | str | None:
    """(rows before the patches, grid of the patches) of a table of `rows` position embeddings, or the reason why there
    is no grid. prefixes: possible numbers of rows before the patches. grid: of the model. None for a damaged table of
    one row.
    """
    counts = sorted(prefixes, reverse=True)
    if known is not None:
        for count in counts:
            if rows - count == known[0] * known[1] > 0:
                return count, known
    counts = [n for n in counts if rows - n > 1 or (rows - n == 1 and grid == 1)]
    square = [n for n in counts if math.isqrt(rows - n) ** 2 == rows - n]
    if square:
        prefix = next((n for n in square if rows - n == grid**2), square[0])
        side = math.isqrt(rows - prefix)
        return prefix, (side, side)
    if counts and rows > 2:
        return (
            f"its {rows - counts[0]} position embeddings of patches do not form a square grid. If the images are not "
            'square, add a config.json with {"image_size": [height, width]}'
        )
    return None


def _drop_positions(
    weights: Weights, cls_row: torch.Tensor, prefix: int, old: tuple[int, int], posemb_kind: str
) -> None:
    """Removes position embeddings for a model with fixed ones or none. Learned ones
    are kept, so that the error lists them."""
    table = weights.pop("pos_embed")
    if posemb_kind == "none":
        weights["pos_embed (learned position embeddings; the model has none)"] = table
        return
    fixed = posemb.sincos2d(old[0], table.shape[2]) if old[0] == old[1] else None
    if fixed is None or not torch.allclose(table[:, prefix:].float(), fixed, atol=0.01) or cls_row.any():
        weights['pos_embed (learned position embeddings; the model\'s are fixed: posemb="sincos2d")'] = table


# ---------------------------------------------------------------- conventions


def _check_conventions(model: nn.Module, source_says: Conventions, source: str) -> list[str]:
    """Returns notes on conventions that differ between source and model. Raises UserError if the results would be
    wrong: another number of heads, another activation.
    """
    config: Any = model.config
    if "gelu" not in config:  # a ResNet
        return []
    ours = model.shape.heads  # type: ignore[union-attr]
    heads, activation, eps = source_says.heads, source_says.activation, source_says.ln_eps
    if heads and heads != ours:
        raise UserError(f"{source} has {heads} attention heads, the model {ours} (option heads={heads})")
    if activation is not None and (not isinstance(activation, str) or activation not in ACTIVATIONS):
        raise UserError(f"{source} uses {activation}, but the model uses GELU, so the results would be wrong")
    notes: list[str] = []
    form = ACTIVATIONS[activation] if activation is not None else config["gelu"]
    if form != config["gelu"]:
        notes.append(
            f'GELU: the source computes the {form} form, this model the {config["gelu"]} one (option gelu="{form}")'
        )
    if isinstance(eps, (int, float)) and eps != config["ln_eps"]:
        notes.append(f"LayerNorm: the source adds {eps:g}, this model {config['ln_eps']:g} (option ln_eps={eps:g})")
    return notes
