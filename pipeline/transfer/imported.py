"""Models from weights of other programs: an architecture (--variant) and a file or folder without a configuration of
this project (timm, torchvision, Hugging Face, Google, ...)."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

from models import create_model
from models.pixels import fold_normalisation
from models.vit import PatchEmbed
from models.weights import NamedWeights, load_tensors
from models.weights.fit import ACTIVATIONS
from models.weights.tensors import section
from pipeline import storage
from pipeline.weights import read_weights
from pipeline.weights.description import folder_of, read_description

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Mean and standard deviation of ImageNet's pixels in [0, 1], with which all weights of torchvision were trained."""

logger = logging.getLogger(__name__)


def imported_model(variant: str, place: str) -> tuple[Any, list[str]]:
    """(model with its head, if the weights have one; names of its classes, if known). The model takes pixels in [-1, 1]
    like all models of this project: a known other normalisation becomes part of the patch embedding."""
    named = read_weights(place)
    state, description = named.weights, read_description(folder_of(place))
    head = state.get("head.weight")
    classes = len(head) if head is not None and head.dim() == 2 else 0
    options: dict[str, Any] = _conventions(named) if "/" in variant else {}
    if "pre_logits.fc.weight" in state:  # the features are the output of this layer
        options["pre_logits"] = True
    model: Any = create_model(variant, classes, _native_size(variant, state), **options)
    logger.info("%s", load_tensors(model, named, place))
    if found := _normalisation(named, place, description):
        if isinstance(getattr(model, "patch_embed", None), PatchEmbed):
            fold_normalisation(model.patch_embed.proj, *found)
        else:
            logger.warning("%s was trained on images with another normalisation: %s", place, found)
    return model, labels_of(description)


def _conventions(named: NamedWeights) -> dict[str, Any]:
    """Options of the model for what the tensors do not show."""
    found = named.conventions
    options: dict[str, Any] = {}
    if found.activation is not None and found.activation in ACTIVATIONS:
        options["gelu"] = ACTIVATIONS[found.activation]
    if isinstance(found.ln_eps, int | float):
        options["ln_eps"] = found.ln_eps
    return options


def _normalisation(
    named: NamedWeights, place: str, description: Mapping[str, Any]
) -> tuple[Sequence[float], Sequence[float]] | None:
    """Mean and standard deviation of the images of the training, if known."""
    if named.naming == "torchvision":
        return IMAGENET
    place = folder_of(place)
    processor = storage.join(place, "preprocessor_config.json")  # of Hugging Face
    if config := section(description, "pretrained_cfg"):  # of timm
        mean, std = (config.get(name) for name in ("mean", "std"))
    elif storage.exists(processor):
        config = section({"values": storage.read_json(processor)}, "values")
        mean, std = (config.get(name) for name in ("image_mean", "image_std"))
    else:
        return None
    if not _are_colours(mean) or not _are_colours(std) or not all(std):
        return None
    return mean, std


def _are_colours(values: Any) -> TypeGuard[list[float]]:
    return isinstance(values, list) and len(values) == 3 and all(isinstance(x, int | float) for x in values)


def labels_of(description: Mapping[str, Any]) -> list[str]:
    """The class names in a config.json of Hugging Face; empty if there are none, or only LABEL_0, LABEL_1, ..."""
    labels = description.get("id2label")
    if not isinstance(labels, dict) or set(labels) != set(map(str, range(len(labels)))):
        return []
    names = [str(labels[str(i)]) for i in range(len(labels))]
    return [] if all(name == f"LABEL_{i}" for i, name in enumerate(names)) else names


def _native_size(variant: str, state: Mapping[str, Any]) -> int:
    """The training resolution of weights, from the number of their position embeddings; 224 if it is unknown."""
    if "pos_embed" not in state or "/" not in variant:
        return 224
    positions = state["pos_embed"].shape[1]
    grid = round((positions - 1) ** 0.5)
    return int(variant.rpartition("/")[2]) * (grid if grid**2 == positions - 1 else round(positions**0.5))
