"""Evaluation during training: a validation dataset, and few-shot probes.

The images are divided among the workers. All workers take part in every forward pass, as ZeRO-3 requires.
"""

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch import distributed as dist

from models.probes import ridge, select_shots
from models.variants import parse_variant
from pipeline.data import Loader, open_dataset
from pipeline.data.codecs import decode_stored
from pipeline.data.format import Dataset
from pipeline.data.loading.transform import augment_image
from pipeline.data.patches import unpatchify
from pipeline.errors import UserError, plural, shorten
from pipeline.tracking import names
from pipeline.training.config import PretrainConfig
from pipeline.training.engine import Engine, Worker
from pipeline.training.plan import TrainPlan, loading_threads
from pipeline.training.preemption import ValidationStopped
from pipeline.training.scoring import ScoreSums, describe_small_classes, match_classes, relabel

logger = logging.getLogger(__name__)

DIVERGED = "the model has diverged; continue from an earlier checkpoint with a lower --optimizer.lr or weight decay"


@torch.no_grad()
def validate(
    engine: Engine, plan: TrainPlan, uri: str, worker: Worker, leaves: Callable[[], bool] = lambda: False
) -> dict[str, float]:
    """Top-1 accuracy in percent and mean loss over a dataset. Each labelled image counts once.

    Masked patch prediction has no classes and returns only the loss, over all images. leaves: called before each batch,
    on every worker; when it says that the workers have to leave, raises ValidationStopped. Raises RuntimeError if the
    loss is not finite.
    """
    config = plan.config
    scores = ScoreSums(config.loss, worker.device)
    with _evaluating(engine):
        validation = open_dataset(uri)
        places = places_of_classes(validation, plan.classes) if config.loss != "masked" else None
        for images, labels in _batches(validation, plan, worker, leaves):
            batch = engine.upload({"image": images, "label": relabel(labels, places)})
            output = engine.engine(batch["image"])
            if len(labels):
                scores.add(output, batch["label"])
    if worker.world > 1:
        dist.all_reduce(scores.sums)
    if not math.isfinite(scores.loss):  # the classes of such outputs would be counted like guesses
        raise RuntimeError(f"the loss on {uri} is {scores.loss}: {DIVERGED}")
    return {names.VAL_LOSS: scores.loss} | ({} if config.loss == "masked" else {names.VAL_TOP1: scores.top1})


class FewShot:
    """Few-shot probe of the paper (section 4.1): top-1 of a regularised least-squares classifier with targets {-1, 1}
    on frozen features of a few images per class. Uses the same images every time."""

    def __init__(self, plan: TrainPlan, worker: Worker):
        """Chooses the images. Reads only labels."""
        self.plan, self.config, self.worker = plan, plan.config.runtime.fewshot, worker
        assert self.config.train is not None
        self.train, self.test = check_fewshot(plan.config)
        labels = self.train.table(["label"])["label"].to_numpy()
        labelled = np.flatnonzero(labels >= 0)
        self.chosen = labelled[select_shots(labels[labelled], self.config.shots, plan.config.seed)]
        self.labels = torch.from_numpy(labels[self.chosen].astype(np.int64))

    @torch.no_grad()
    def __call__(self, engine: Engine, leaves: Callable[[], bool] = lambda: False) -> dict[str, float]:
        """Metrics: top-1 in percent, and the time in seconds. leaves: as for `validate`. Raises RuntimeError if features
        are not finite."""
        start = time.perf_counter()
        rank, world, device = self.worker.rank, self.worker.world, self.worker.device
        share = -(-len(self.chosen) // world)
        mine = np.resize(self.chosen, share * world)[rank * share : (rank + 1) * share]  # pads by repetition
        with _evaluating(engine, features=True):
            step = self.plan.micro_batch
            parts = []
            for i in range(0, share, step):
                if leaves():
                    raise ValidationStopped
                parts.append(self._features(engine, mine[i : i + step], device))
            features = _gather(torch.cat(parts), world)[: len(self.chosen)]
            right, total = 0, 0
            tests = [
                (engine.engine(engine.upload({"image": images})["image"]).float()[: len(labels)], labels)
                for images, labels in _batches(self.test, self.plan, self.worker, leaves)
            ]
        examples = torch.cat([x for x, _ in tests])
        if not (features.isfinite().all() and examples.isfinite().all()):
            raise RuntimeError(f"the features of the few-shot probe are not finite: {DIVERGED}")
        if len(examples):
            labels = torch.cat([labels for _, labels in tests]).to(device)
            classes = len(self.train.classes)
            predicted = ridge(features, self.labels.to(device), examples, classes, [self.config.l2])[0]
            right, total = int((predicted == labels).sum()), int((labels >= 0).sum())
        counts = torch.tensor([right, total], device=device)
        if world > 1:
            dist.all_reduce(counts)
        top1 = 100.0 * float(counts[0] / counts[1])
        return {names.FEWSHOT_TOP1: top1, names.FEWSHOT_SECONDS: time.perf_counter() - start}

    def _features(self, engine: Engine, rows: np.ndarray, device: torch.device) -> Tensor:
        augment = self.plan.config.evaluation_view
        size, kind = augment.size, self.train.manifest.image
        images = np.empty((len(rows), size, size, 3), np.uint8)

        def fill(target: np.ndarray, row: dict) -> None:
            if self.train.encoding == "jpeg":
                picture = decode_stored(row["image"])
            else:
                picture = unpatchify(row["image"], kind["height"], kind["width"], kind["patch_size"])
            augment_image(augment, picture, [0.5] * augment.draws, target, False)

        with ThreadPoolExecutor(loading_threads(self.plan.config)) as pool:
            pairs = zip(images, self.train.read(rows), strict=True)
            for filled in [pool.submit(fill, target, row) for target, row in pairs]:
                filled.result()  # raises errors of the thread
        return engine.engine(engine.upload({"image": torch.from_numpy(images)})["image"]).float()


def check_validation(config: PretrainConfig, data: Dataset) -> None:
    """Checks that the validation set fits the training data. Raises UserError naming the flag."""
    validation = open_dataset(config.runtime.validation or "")
    if config.loss != "masked":
        places_of_classes(validation, data.classes)
        if validation.multilabel != data.multilabel:
            several, one = (validation.uri, data.uri) if validation.multilabel else (data.uri, validation.uri)
            raise UserError(
                f"--validation: {several} has several labels per image, {one} has one; prepare both in the same way"
            )
        if validation.manifest.class_counts and not sum(validation.manifest.class_counts):
            raise UserError(f"--validation {validation.uri} has no labelled images, so its accuracy is undefined")
    _check_images("validation", validation, config, data)


def _check_images(flag: str, measured: Dataset, config: PretrainConfig, data: Dataset) -> None:
    """Checks that the model that is trained on `data` accepts the images of another
    dataset. Raises UserError, which names the flag."""
    uri, image = measured.uri, measured.manifest.image
    if not len(measured):
        raise UserError(f"--{flag} {uri} has no images")
    measured.check_shards()
    channels, wanted = image.get("channels", 3), data.manifest.image.get("channels", 3)
    if channels != wanted:
        raise UserError(f"--{flag} {uri} has images with {channels} channels, but the training data has {wanted}")
    if measured.encoding == "patches":
        size, patch = config.image_size, parse_variant(config.model.variant).patch
        if (image["height"], image["width"], image["patch_size"]) != (size, size, patch):
            raise UserError(
                f"--{flag} {uri} holds {image['height']}x{image['width']} images cut into patches of "
                f"{image['patch_size']}, but the run has image_size {size} and {config.model.variant}; prepare it to match"
            )


def places_of_classes(validation: Dataset, classes: Sequence[str]) -> Tensor | None:
    """(K,) int64: the index in `classes` of each class of the validation set; None when both have the same class list.
    Raises UserError when the validation set has images of a class that is not in `classes`."""
    places, unknown = match_classes(validation, classes)
    if places is not None and (unknown or not validation.classes):
        missing = (
            f": {shorten(list(unknown), 3)} {'is' if len(unknown) == 1 else 'are'} not among the run's {plural(len(classes), 'class')}"
            if unknown
            else ""
        )
        raise UserError(
            f"--validation {validation.uri} has other classes than the training data{missing}; prepare both with one command "
            "(--splits from-source), or the validation set with --label-map and the training set's classes; --no-validation "
            "trains without"
        )
    return places


def check_fewshot(config: PretrainConfig, data: Dataset | None = None) -> tuple[Dataset, Dataset]:
    """The two datasets of the probe. Raises UserError if their classes differ or if
    their images do not fit the training data `data`."""
    test = config.runtime.fewshot.test or config.runtime.validation
    if test is None:
        raise UserError("fewshot.train needs a test set: give --fewshot.test or --validation")
    train, scored = open_dataset(config.runtime.fewshot.train or ""), open_dataset(test)
    if train.multilabel or not train.classes or list(train.classes) != list(scored.classes):
        raise UserError(f"{config.runtime.fewshot.train} and {test} must have the same classes and one class per image")
    if config.runtime.fewshot.shots < 1:
        raise UserError(f"fewshot.shots {config.runtime.fewshot.shots} must be at least 1")
    for flag, dataset in (("fewshot.train", train), ("fewshot.test", scored)):
        if data is not None:
            _check_images(flag, dataset, config, data)
        if dataset.manifest.class_counts and not sum(dataset.manifest.class_counts):
            raise UserError(f"--{flag} {dataset.uri} has no labelled images")
    if data is not None and (small := describe_small_classes(train, config.runtime.fewshot.shots)):
        logger.warning("--fewshot.shots %d: %s", config.runtime.fewshot.shots, small)
    return train, scored


@contextmanager
def _evaluating(engine: Engine, features: bool = False) -> Iterator[None]:
    """Evaluation mode. With `features`, the model returns its representation instead of logits.

    The engine still calls the whole module, because ZeRO-3 gathers parameters in its hooks.
    """
    module: Any = engine.module
    module.eval()
    if features:
        module.forward = module.features
    try:
        yield
    finally:
        if features:
            del module.forward
        module.train()


def _batches(
    dataset: Dataset, plan: TrainPlan, worker: Worker, leaves: Callable[[], bool]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Images (or patches) and labels of this worker's part of a dataset: the same number of batches on every worker. A
    batch has at least one image but may have no label. Raises ValidationStopped when the workers have to leave."""
    rank, world = worker.rank, worker.world
    batch_size = max(world, plan.micro_batch * world)
    with Loader(
        dataset,
        batch_size=batch_size,
        rank=rank,
        world_size=world,
        lanes=world,
        train=False,
        augment=plan.config.evaluation_view,
        threads=loading_threads(plan.config),
    ) as loader:
        for batch in loader:
            if leaves():
                raise ValidationStopped
            images = batch["image"] if "image" in batch else batch["patches"]
            if len(images) == 0:
                images = images.new_zeros(1, *images.shape[1:])
            yield images, batch["label"]


def _gather(part: Tensor, world: int) -> Tensor:
    """All-gathers equally sized parts and concatenates them by rank."""
    if world == 1:
        return part
    parts = [torch.empty_like(part) for _ in range(world)]
    dist.all_gather(parts, part.contiguous())
    return torch.cat(parts)
