"""The maths: Vision Transformers, hybrids and ResNets of arXiv 2010.11929, their losses, weights and inspection.

    from models import create_model
    model = create_model("B/16", num_classes=1000, image_size=224)
    logits = model(images)          # uint8 (B,H,W,C), or float (B,C,H,W) in [-1, 1], or patches (B,N,P*P*C)

Rooms: `variants` (the table of names), `vit`, `resnet`, `heads`, `posemb`, `mpp` (masked patch prediction), `losses`,
`convert` (weights in and out), `inspect` (what the model learned). Nothing here imports ray, mlflow or deepspeed.
"""

from typing import Any


def create_model(variant: str, num_classes: int, image_size: int = 224, **options: Any):
    """A freshly initialised model; `create_model(**model.config)` builds the same architecture again.

    variant: a name of `models.variants`: "B/16", any width with any patch ("Ti/4"), "R50+B/16", "R50x1".
    num_classes: width of the linear head; 0 leaves it out, so that the model returns features.
    options: keyword arguments of `VisionTransformer`, `ResNet` or, with `mpp=...`, `MaskedPatchPredictor`.
    Initial values come from torch's global generator. Raises UserError for a name or option that does not exist.
    """
    # torch is imported here and not above, so that `--help` of a job does not wait for it
    from models.errors import UserError, nearest
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
        options.pop("mpp", None)
    valid = option_names(kind)
    for name in options:
        if name not in valid:
            raise UserError(f'{variant} has no option "{name}"{nearest(name, valid)}; options: {", ".join(valid)}')
    return kind(variant, num_classes, image_size, **options)
