"""Scores the checkpoint's own classifier on a task (suite `head`), from the features of its test images.

Classes are matched by name. In predictions, the classes of the task keep their indices, and the other classes of the
head follow (`class_names`)."""

import copy
import logging
import math
import platform
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from models.losses import correct
from pipeline.errors import UserError, plural, shorten
from pipeline.training.scoring import ScoreSums, match_classes, relabel
from pipeline.transfer.checkpoint import PretrainedModel
from pipeline.transfer.features import load_features, precision_type
from pipeline.transfer.jobs import Job, Result
from pipeline.transfer.predictions import Predictions, pack_predictions
from pipeline.transfer.protocols import Head, Split, TransferTask
from pipeline.transfer.suites import check_problems

if TYPE_CHECKING:
    from pipeline.data.format import Dataset

BATCH = 1024  # images whose logits are computed at once

logger = logging.getLogger(__name__)


def check_heads(
    tasks: Sequence[TransferTask], datasets: "Mapping[Split, Dataset]", checkpoint: PretrainedModel
) -> None:
    """Checks that the head of the checkpoint can classify the test images of all tasks with the protocol `Head`. Raises
    UserError. Logs which images it cannot classify."""
    heads = [task for task in tasks if isinstance(task.protocol, Head)]
    if not heads:
        return
    uri, count, names = checkpoint.uri, checkpoint.config.get("num_classes", 0), checkpoint.classes
    if "library" in checkpoint.config:
        raise UserError(f"{uri} is opened without its head; give its weights as a file with --variant")
    if not count:
        raise UserError(
            f"{uri} has no classification head (masked pre-training and encoders have none); the suites frozen and "
            "folder train one"
        )
    if names and len(names) != count:
        raise UserError(f"the head of {uri} has {plural(count, 'class')}, but {len(names)} names; see --class-names")
    if repeated := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise UserError(
            f"several classes of the head of {uri} have one name ({shorten(repeated, 3)}); see --class-names"
        )
    problems = {task.name: problem for task in heads if (problem := _problem(datasets[task.test], checkpoint))}
    if len(tasks) == 1 and problems:
        raise UserError(problems[tasks[0].name])
    check_problems(problems, tasks)
    for task in heads:
        _report_match(datasets[task.test], checkpoint)


def _problem(dataset: "Dataset", checkpoint: PretrainedModel) -> str | None:
    """Why the head cannot classify the images of a dataset; None if it can classify some."""
    uri, count, names = checkpoint.uri, checkpoint.config["num_classes"], checkpoint.classes
    known = f"{plural(len(dataset.classes), 'class')} ({shorten(dataset.classes, 3)})"
    if not dataset.classes:
        return f"{dataset.uri} has no classes"
    if not sum(dataset.manifest.class_counts):
        return f"{dataset.uri} has no labelled images"
    channels, wanted = dataset.manifest.image.get("channels", 3), checkpoint.config.get("channels", 3)
    if channels != wanted:
        return f"{dataset.uri} has images with {plural(channels, 'channel')}, but {uri} takes {wanted}"
    if not names and len(dataset.classes) != count:
        return (
            f"{dataset.uri} has {known}, but the head of {uri} has {count} without names; give the names with "
            "--class-names"
        )
    unknown = match_classes(dataset, names or dataset.classes)[1]
    if sum(unknown.values()) == sum(dataset.manifest.class_counts):
        return (
            f"none of the {known} of {dataset.uri} is a class of the head of {uri}, which has {count} "
            f"({shorten(names, 3)}); prepare the images with --label-map, or name the classes of the head with --class-names"
        )
    return None


def _report_match(dataset: "Dataset", checkpoint: PretrainedModel) -> None:
    if not checkpoint.classes:
        logger.warning(
            "the head of %s has no class names: its %s are taken to be those of %s, in the same order",
            checkpoint.uri,
            plural(len(dataset.classes), "class"),
            dataset.uri,
        )
    unknown = match_classes(dataset, checkpoint.classes or dataset.classes)[1]
    if unknown:
        logger.warning(
            "%d of %s of %s are left out: the head of %s has no %s",
            sum(unknown.values()),
            plural(sum(dataset.manifest.class_counts), "label"),
            dataset.uri,
            checkpoint.uri,
            shorten(list(unknown), 3),
        )


def class_names(task: Sequence[str], head: Sequence[str]) -> list[str]:
    """Names of the classes in predictions: those of the task, then the other classes of the head."""
    known = set(task)
    return [*task, *(name for name in head if name not in known)]


@torch.inference_mode()
def run_head(
    job: Job, folder: str, model: nn.Module, classes: Sequence[str], device: str
) -> tuple[Result, bytes | None]:
    """The scores of the head of `model` and its predictions. folder: features of the test images. classes: names of the
    head's classes; empty: those of the task."""
    start, protocol = time.perf_counter(), job.task.protocol
    assert isinstance(protocol, Head)
    keys, labels, features = load_features(folder)
    dataset = job.task.test.open()
    classes = list(classes) or list(dataset.classes)
    places, _ = match_classes(dataset, classes)
    indices = {name: i for i, name in enumerate(class_names(dataset.classes, classes))}
    to_task = np.array([indices[name] for name in classes])  # index in predictions of each class of the head
    wanted = relabel(torch.from_numpy(labels), places)
    among = None if places is None else places[places >= 0].to(device)
    sums, ranks, guesses = ScoreSums(protocol.loss, device), _Ranks(), []
    kind = precision_type(protocol.precision, device)
    head: Any = copy.deepcopy(model.head).to(device, kind)  # type: ignore[operator]
    for features_BD, labels_B in zip(features.split(BATCH), wanted.split(BATCH), strict=True):
        logits, targets = head(features_BD.to(device, kind)), labels_B.to(device)
        sums.add(logits, targets)
        ranks.add(logits, targets, among)
        guesses.append(logits.argmax(1).cpu())
    if not math.isfinite(sums.loss):  # the classes of such outputs would be counted like guesses
        raise UserError(f"the loss of the head on {dataset.uri} is {sums.loss}: the model has diverged")
    ours = places.numpy()[np.maximum(labels, 0)] if places is not None else labels
    found = Predictions(keys, np.where(ours < 0, -1, labels), to_task[torch.cat(guesses).numpy()])
    left_out = int(Predictions(keys, labels, found.classes).labelled().sum()) - sums.images
    details: dict[str, Any] = {"loss": sums.loss, **ranks.percent(sums.images, len(classes))}
    if left_out:
        details["left_out"] = left_out
    result = Result(
        task=job.task.name,
        phase=job.phase,
        lr=0.0,
        seed=job.seed,
        host=platform.node(),
        accuracy={"": sums.top1},
        images=sums.images,
        seconds=time.perf_counter() - start,
        confusion=found.small_confusion(len(dataset.classes)),
        details=details,
    )
    return result, pack_predictions(found)


class _Ranks:
    """Numbers of images whose label is among the five largest logits, and largest among the classes of the task."""

    def __init__(self) -> None:
        self.top5 = self.among = 0
        self.has_others = False
        """Whether the head has classes that the task does not have."""

    def add(self, logits: Tensor, labels: Tensor, among: Tensor | None) -> None:
        """among: indices of the task's classes in the head; None: all."""
        labels_BM = labels if labels.dim() == 2 else labels[:, None]
        top = logits.topk(min(5, logits.shape[1]), dim=1).indices
        listed = (top[:, :, None] == labels_BM[:, None, :]).flatten(1).any(dim=1)
        self.top5 += int((listed | correct(logits, labels)).sum())  # in bfloat16, more than five may be equal
        if among is not None and len(among) < logits.shape[1]:
            self.has_others = True
            best = among[logits[:, among].argmax(1)]
            self.among += int((best[:, None] == labels_BM).any(dim=1).sum())

    def percent(self, images: int, classes: int) -> dict[str, float]:
        """classes: of the head; top-5 of at most five classes is always 100."""
        numbers = {"top5": self.top5} if classes > 5 else {}
        numbers |= {"top1_among": self.among} if self.has_others else {}
        return {name: 100.0 * count / images for name, count in numbers.items()}
