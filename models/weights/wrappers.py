"""Removes the prefixes that training frameworks put before tensor names, and chooses among several models in one file."""

from collections.abc import Sequence

from models.errors import UserError, shorten
from models.weights.tensors import Weights

# Anywhere in a name: torch.compile, FSDP, activation checkpointing.
WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
COUNTERS = ("n_averaged", "initted", "step", "num_updates", "decay")
"""Tensors that classes of averaged models (torch.optim.swa_utils, ema-pytorch, fairseq) save with the weights."""
CHOICE = ("teacher", "ema", "target", "online", "base_encoder", "encoder_q")
"""If a file contains several copies of the encoder, the first of these words selects one: the averaged copy, which
self-distillation evaluates; for MoCo the trained copy."""
OTHER_HALVES = (
    *("text.", "text_model.", "transformer.", "token_embedding.", "positional_embedding", "ln_final."),
    *("text_projection", "logit_scale", "logit_bias"),
    *("dino_head.", "ibot_head.", "head.mlp.", "head.last_layer"),
)
"""Other networks in the file: the text tower under open_clip's names, the projection heads of self-distillation."""


def unwrap(tensors: Weights, anchors: Sequence[str], bases: Sequence[str]) -> tuple[Weights, list[str], list[str]]:
    """(the tensors of one encoder without prefixes, names of dropped tensors, notes). anchors: names of the patch
    embedding's weight in all naming schemes; the text before an anchor is the prefix. bases: prefixes that are part of
    a naming scheme and are kept. Raises UserError if the file contains several models and none is preferred.
    """
    flat = [name for name in tensors if name.endswith("_flat_param")]
    if flat:
        raise UserError(
            f"flat parameters of FSDP ({shorten(flat, 3)}): save the full state dict "
            "(torch.distributed.checkpoint.state_dict.get_model_state_dict with full_state_dict=True)"
        )
    bare = {}
    for name, tensor in tensors.items():
        for wrapper in WRAPPERS:
            name = name.replace(wrapper, "")
        if name not in COUNTERS:
            bare[name] = tensor
    while bare and all(name.startswith("module.") for name in bare):  # DistributedDataParallel, AveragedModel
        bare = {name.removeprefix("module."): tensor for name, tensor in bare.items()}
    prefixes = _prefixes(bare, anchors, bases)
    if len(prefixes) <= 1:
        kept, left_out = {}, []
        for name, tensor in bare.items():
            new = _without(name, prefixes[0]) if prefixes else name
            if prefixes and prefixes[0] and not name.startswith(prefixes[0]) and new.startswith(OTHER_HALVES):
                left_out.append(name)
            else:
                kept[new] = tensor
        return kept, left_out, []
    chosen = _choose(prefixes)
    kept = {name.removeprefix(chosen): tensor for name, tensor in bare.items() if name.startswith(chosen)}
    others = [prefix for prefix in prefixes if prefix != chosen]
    note = f"the source has several encoders: {chosen} is used, {shorten(others)} ignored"
    return kept, [name for name in bare if not name.startswith(chosen)], [note]


def _prefixes(tensors: Weights, anchors: Sequence[str], bases: Sequence[str]) -> list[str]:
    """The text before the first anchor in the file, without bases of a naming scheme."""
    for anchor in anchors:
        prefixes = [name.removesuffix(anchor) for name in tensors if name == anchor or name.endswith("." + anchor)]
        if prefixes:
            for base in bases:
                prefixes = [p.removesuffix(base) if p == base or p.endswith("." + base) else p for p in prefixes]
            return prefixes
    return []


def _without(name: str, prefix: str) -> str:
    """A name without the prefix, or, for a tensor outside the encoder, without the modules that contain both.

    With prefix "model.backbone.": "model.backbone.norm.bias" -> "norm.bias", "model.head.bias" -> "head.bias".
    """
    while prefix and not name.startswith(prefix):
        prefix = prefix.rstrip(".").rpartition(".")[0]
        prefix += "." if prefix else ""
    return name.removeprefix(prefix)


def _choose(prefixes: list[str]) -> str:
    for word in CHOICE:
        found = [
            prefix for prefix in prefixes if word in prefix.replace("_", ".").split(".") or word in prefix.split(".")
        ]
        if len(found) == 1:
            return found[0]
    raise UserError(f"contains several models ({shorten(prefixes)}): save the state dict of one of them")
