"""Tasks of transfer and their protocols: fine-tuning, classifiers on frozen features, the checkpoint's own classifier.

Defaults are from the paper (arXiv 2010.11929, table 4 and appendix B.1.1)."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pipeline.data.loading.augment import Augment

if TYPE_CHECKING:
    from pipeline.data.format import Dataset

L2_GRID = tuple(2.0**i for i in range(-10, 20))  # few-shot regularisation, of the paper's evaluator


@dataclass(frozen=True, kw_only=True, slots=True)
class FineTune:
    """Fine-tuning of all weights with a new zero-initialised head: SGD, no weight decay, softmax cross-entropy."""

    resolution: int = 384
    """Input size of the model; position embeddings are resized accordingly. Test images are squashed to this size."""
    crop: Literal["inception", "random", "squash"] = "inception"
    """For training: inception (a random box of 5-100% of the area), random (a random square from the image squashed to
    `enlarge` x resolution), or squash (squashed only)."""
    enlarge: float = 448 / 384
    flip: bool = True
    steps: int = 500
    batch_size: int = 512
    lrs: tuple[float, ...] = (0.01,)
    """Several learning rates are compared on the dev split of the task; the best is used for the final training."""
    decay: Literal["cosine", "step"] = "cosine"
    """Half-cosine decay to zero, or x0.1 at 30, 60 and 90% of the steps."""
    warmup: int = 0
    momentum: float = 0.9
    clip: float = 1.0
    ema_decay: float = 0.0
    """Decay per step of the averaged weights that are evaluated; 0 evaluates the last weights."""


ProbeKind = Literal["fewshot", "linear", "knn", "head"]
PROBES: tuple[ProbeKind, ...] = ("fewshot", "linear", "knn")
"""The probes that are trained on the features of a task."""
SEEDLESS: tuple[ProbeKind, ...] = ("knn", "head")
"""Probes without random numbers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Probe:
    """A classifier on frozen features. Images are squashed to `resize` and centre-cropped to `resolution`."""

    kind: ProbeKind = "fewshot"
    resolution: int = 224
    resize: int = 256
    shots: tuple[int, ...] = (1, 5, 10, 25)

    @property
    def view(self) -> Augment:
        """The preprocessing of images."""
        resize = max(self.resize, self.resolution)
        return Augment(size=self.resolution, crop="center", resize=resize, squash=True, flip=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class Head(Probe):
    """The checkpoint's own classifier, without training. Preprocessing, loss and precision are those of the validation
    of its training: the shorter side is resized to `resize`, and the centre is cropped."""

    kind: ProbeKind = "head"
    shots: tuple[int, ...] = ()
    loss: Literal["softmax", "sigmoid"] = "softmax"
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Number format of parameters and activations."""
    classes: str = ""
    """Fingerprint of the names of the head's classes."""

    @property
    def view(self) -> Augment:
        return Augment(size=self.resolution, crop="center", resize=self.resize, flip=False)


HEAD_METRICS = {
    "top5": "top-5 %",
    "top1_among": "top-1 % among its classes",
    "loss": "loss",
    "left_out": "left out",
}
"""Numbers of `Head` besides top-1, with their titles: top-5 in percent, top-1 when only the classes of the task are
compared, mean loss, number of labelled images whose classes the head does not have."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Split:
    """A dataset, or a part of it."""

    uri: str
    part: tuple[float, float] = (0.0, 1.0)
    """Only the examples whose hash falls in this range of [0, 1): (0.02, 1.0) and (0.0, 0.02) make a 2% dev split."""

    def open(self) -> "Dataset":
        """Opens the whole dataset; `chosen` selects the examples. Raises UserError when it is missing."""
        from pipeline.data import open_dataset

        return open_dataset(self.uri)

    def chosen(self, keys: Sequence[str]) -> list[bool]:
        """Selects the examples of the part, as a function of the key only, independent of order and shard size."""
        low, high = self.part
        if (low, high) == (0.0, 1.0):
            return [True] * len(keys)
        return [low <= int.from_bytes(hashlib.md5(key.encode()).digest()[:8]) / 2**64 < high for key in keys]


@dataclass(frozen=True, kw_only=True, slots=True)
class TransferTask:
    """A task: training data, test data and protocol."""

    name: str
    group: str = ""
    train: Split | None = None
    """None: the protocol `Head`, which trains nothing."""
    test: Split
    tune: tuple[Split, Split] | None = None
    """(train, validation) for choosing the learning rate; does not overlap `test`."""
    protocol: FineTune | Probe
    real_labels: str | None = None
    """URI of ImageNet's real.json; adds the ReaL accuracy."""

    @property
    def splits(self) -> dict[str, Split]:
        """{"train": ..., "test": ...}; without "train" if the task has no training data."""
        return {"test": self.test} if self.train is None else {"train": self.train, "test": self.test}
