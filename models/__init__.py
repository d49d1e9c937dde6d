"""Vision Transformers, hybrids and ResNets of arXiv 2010.11929, with their losses, weights and inspection.

    from models import create_model
    model = create_model("B/16", num_classes=1000, image_size=224)
    logits = model(images)          # uint8 (B,H,W,C), or float (B,C,H,W) in [-1, 1], or patches (B,N,P*P*C)

Files: `variants` (the table of names), `pixels`, `vit`, `resnet`, `heads`, `posemb`, `mpp` (masked patch prediction),
`losses`, `cost` (parameters and FLOPs), `weights` (translation of other projects' state dicts), `compatibility` (with other
libraries), `probes` (classifiers on frozen features), `inspect` (what a model learned). Only torch and NumPy are imported.
"""

from typing import Any

from models.errors import UserError, nearest


def create_model(variant: str, num_classes: int, image_size: int = 224, **options: Any):
    """A freshly initialised model; `create_model(**model.config)` builds the same architecture again.

    variant: a name of `models.variants`: "B/16", any width with any patch ("Ti/4"), "R50+B/16", "R50x1".
    num_classes: width of the linear head; with 0 there is no head, and the model returns features.
    options: keyword arguments of `VisionTransformer`, `ResNet` or, with `mpp=...`, `MaskedPatchPredictor`.
    Initial values come from torch's global generator. Raises UserError for a name or option that does not exist.
    """
    # torch is imported here, so that `--help` of a job does not import it
    from models.mpp import MaskedPatchPredictor
    from models.resnet import ResNet
    from models.variants import parse_variant
    from models.vit import VisionTransformer, option_names

    kind: type
    if parse_variant(variant).depth == 0:
        kind = ResNet
    elif options.get("mpp"):
        kind = MaskedPatchPredictor
    else:
        kind = VisionTransformer
        # `mpp=None` turns the config of a masked-patch model into that of its encoder
        options = {name: value for name, value in options.items() if name not in ("mpp", "corrupt")}
    valid = option_names(kind)
    for name in options:
        if name not in valid:
            raise UserError(f'{variant} has no option "{name}"{nearest(name, valid)}; options: {", ".join(valid)}')
    return kind(variant, num_classes, image_size, **options)


def weight_decay_groups(model, kind: str = "all") -> list[dict]:
    """Parameter groups for an optimiser; the second group has weight_decay 0. kind: "all" decays every parameter, as in
    the paper; "kernels" decays only the matrices of dense layers and convolutions, as in big_vision: no biases, norms,
    tokens or position embeddings.
    """
    if kind not in ("all", "kernels"):
        raise UserError(f'weight decay kind "{kind}" is not one of all, kernels')
    trainable = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    decayed = {name for name, p in trainable if kind == "all" or (name.endswith("weight") and p.dim() > 1)}
    groups: list[dict] = [{"params": [p for name, p in trainable if name in decayed]}]
    if len(decayed) < len(trainable):
        groups.append({"params": [p for name, p in trainable if name not in decayed], "weight_decay": 0.0})
    return groups
