"""Images for the MLflow run: the first batch after augmentation, and the model's attention on validation images."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.cost import parameters
from models.inspect import attention_rollout
from models.variants import parse_variant
from models.vit import VisionTransformer
from pipeline.data import open_dataset
from pipeline.data.format import Dataset
from pipeline.data.loading.samples import stored_pictures
from pipeline.data.loading.transform import augment_image
from pipeline.data.mixture import open_data
from pipeline.data.patches import unpatchify
from pipeline.errors import plural
from pipeline.pictures import sheet
from pipeline.tracking import Run
from pipeline.training.config import PretrainConfig
from pipeline.training.plan import TrainPlan
from pipeline.weights import open_model

logger = logging.getLogger(__name__)

BATCH, ATTENTION = "samples/first-batch.png", "samples/attention.png"
"""Artifacts of the run in MLflow."""
SHOWN, ATTENDED = 32, 12
LARGEST = 1_000_000_000  # maximum parameters of a model that the driver loads to draw attention
GREY = 128


def log_batch(run: Run, batch: Mapping[str, Any], plan: TrainPlan) -> None:
    """Logs the first images of a worker's batch, as they enter the model, with their labels. Never raises."""
    try:
        config = plan.config
        pictures = batch_pictures(batch, config)
        titles = batch_titles(batch, plan.classes, len(pictures))
        notes = ["after augmentation"]
        if "positions" in batch:
            notes.append("dropped patches are grey")
        if "lam" in batch:
            notes.append("mixup blends two images")
        if config.loss == "masked":
            share = plan.model_options.get("corrupt", 0.5)
            notes.append(f"the model corrupts {share:.0%} of the patch embeddings, which is not shown")
        what = f"{len(pictures)} of {plural(config.batch_size, 'image')} of the first batch at {config.image_size} px"
        run.log_bytes(sheet(pictures, titles, f"{what}: {', '.join(notes)}"), BATCH)
    except Exception as error:  # a failed image must not stop the run
        logger.warning("cannot draw the first batch: %s", error)


def batch_pictures(batch: Mapping[str, Any], config: PretrainConfig) -> list[np.ndarray]:
    """uint8 (H,W,3) of at most 32 images of a loader's batch. Dropped patches are grey."""
    if "image" in batch:
        return list(batch["image"][:SHOWN].numpy())
    patches, size, patch = (
        batch["patches"][:SHOWN].numpy(),
        config.image_size,
        parse_variant(config.model.variant).patch,
    )
    if "positions" in batch:
        whole = np.full((len(patches), (size // patch) ** 2, patches.shape[2]), GREY, np.uint8)
        np.put_along_axis(whole, batch["positions"][:SHOWN].numpy()[:, :, None], patches, axis=1)
        patches = whole
    return list(unpatchify(patches, size, size, patch))


def batch_titles(batch: Mapping[str, Any], classes: Sequence[str], count: int) -> list[str]:
    """Titles for the first images of a batch: the class, or with mixup the weights of two classes."""

    def name(label: Tensor) -> str:
        if label.dim():  # multi-label: one value per class
            return ", ".join(classes[i] for i in label.nonzero().flatten().tolist()) or "none"
        return classes[int(label)] if 0 <= int(label) < len(classes) else "no label"

    titles = [name(label) for label in batch["label"][:count]]
    if "lam" not in batch:
        return titles
    others, shares = [name(label) for label in batch["label_b"][:count]], batch["lam"][:count].tolist()
    return [f"{s:.0%} {a}, {1 - s:.0%} {b}" for a, b, s in zip(titles, others, shares, strict=True)]


def log_attention(run: Run, plan: TrainPlan, checkpoint: str) -> None:
    """Logs the attention rollout of the finished model on images of the validation set. Never raises."""
    config = plan.config
    if not config.runtime.validation or parameters(plan.model_options) > LARGEST:
        return
    try:
        model, _ = open_model(checkpoint)
        if isinstance(model, VisionTransformer):
            run.log_bytes(attention_sheet(model, config, open_dataset(config.runtime.validation)), ATTENTION)
    except Exception as error:
        logger.warning("cannot draw the attention: %s", error)


@torch.inference_mode()
def attention_sheet(model: VisionTransformer, config: PretrainConfig, validation: Dataset) -> bytes:
    """A PNG of validation images as the model sees them, each next to a copy with
    brightness by attention rollout, with label and prediction."""
    rows = np.unique(np.linspace(0, len(validation) - 1, ATTENDED).round().astype(int)).tolist()
    pictures: list[np.ndarray] = []
    titles: list[str] = []
    classes = config.loss != "masked" and len(validation.classes) > 0
    trained = open_data(config.runtime.data).classes if classes else []
    model.eval()
    for image, label in _validation_images(config, validation, rows):
        batch = torch.from_numpy(image[None])
        light = _light(attention_rollout(model, batch)[0], config.image_size)
        pictures += [image, (image * (0.12 + 0.88 * light[:, :, None])).astype(np.uint8)]
        guess = f"predicted {trained[int(model(batch)[0].argmax())]}" if classes else "attention"
        titles += [_label(label, validation.classes), guess]
    heading = f"Attention of the output to the patches (rollout) in {plural(len(rows), 'image')} of {config.runtime.validation}"
    return sheet(pictures, titles, heading)


def _label(label: Any, classes: Sequence[str]) -> str:
    labels = [
        i for i in (label if isinstance(label, list) else [label]) if isinstance(i, int) and 0 <= i < len(classes)
    ]
    return ", ".join(classes[i] for i in labels) or "no label"


def _validation_images(config: PretrainConfig, validation: Dataset, rows: list[int]) -> list[tuple[np.ndarray, Any]]:
    """[(image as in validation, uint8 (S,S,3), label)]"""
    view, found = config.evaluation_view, []
    labels = validation.table(["label"])["label"].take(rows).to_pylist()
    for stored, label in zip(stored_pictures(validation, rows), labels, strict=True):
        out = np.empty((view.size, view.size, 3), np.uint8)
        augment_image(view, stored, [0.5] * view.draws, out, False)
        found.append((out, label))
    return found


def _light(rollout: np.ndarray, size: int) -> np.ndarray:
    """Brightness from attention: (g,g) -> (size,size) in 0..1. The 98th percentile has full brightness, so that one
    bright patch does not darken the rest."""
    mask = torch.nn.functional.interpolate(
        torch.from_numpy(rollout)[None, None], size=(size, size), mode="bilinear", align_corners=False
    )[0, 0].numpy()
    return np.clip(mask / max(float(np.quantile(mask, 0.98)), 1e-12), 0, 1)
