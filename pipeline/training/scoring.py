"""How a classifier is scored on a labelled data set: classes matched by name, mean loss and top-1.

Validation during training and the transfer suite `head` use the same functions, so that their numbers are equal."""

from collections.abc import Sequence

import torch
from torch import Tensor

from models.losses import correct, training_loss
from pipeline.data.format import Dataset
from pipeline.errors import plural


def match_classes(dataset: Dataset, classes: Sequence[str]) -> tuple[Tensor | None, dict[str, int]]:
    """Matches the K classes of a dataset with the `classes` of a model by name.

    Returns (int64 (K,): the index in `classes` of each class, or -1; {class that is not in `classes`: number of its
    images}, without classes that have no images). The first is None when both lists are the same.
    """
    if list(dataset.classes) == list(classes):
        return None, {}
    index = {name: i for i, name in enumerate(classes)}
    counts = zip(dataset.classes, dataset.manifest.class_counts, strict=True)
    unknown = {name: count for name, count in counts if count and name not in index}
    return torch.tensor([index.get(name, -1) for name in dataset.classes], dtype=torch.int64), unknown


def describe_small_classes(dataset: Dataset, shots: int) -> str:
    """What a few-shot probe of `shots` images per class lacks in a dataset; "" if every class that has images has enough."""
    counts = {name: n for name, n in zip(dataset.classes, dataset.manifest.class_counts, strict=False) if n}
    few = {name: count for name, count in counts.items() if count < shots}
    if not few:
        return ""
    least = min(few, key=lambda name: few[name])
    return (
        f"{plural(len(few), 'class')} of {dataset.uri} ({len(few)} of {len(counts)}) with fewer than {shots} images, such as {least} with {few[least]}: "
        "all of its images are used"
    )


def relabel(labels: Tensor, places: Tensor | None) -> Tensor:
    """Class indices (B,) or (B,M) of a dataset as those of the model. -1 (no label) stays -1.

    places: of `match_classes`; a class with place -1 gives no label."""
    if places is None or not len(places):
        return labels
    return torch.where(labels >= 0, places[labels.clamp(min=0)], -1)


class ScoreSums:
    """Sums over the labelled images of a dataset. `add` does not synchronise with the device."""

    def __init__(self, loss: str, device: torch.device | str) -> None:
        """loss: softmax, sigmoid or masked (`models.losses.training_loss`)."""
        self.kind = loss
        self.sums = torch.zeros(3, dtype=torch.float64, device=device)
        """Sum of the losses, number of correct images, number of images."""

    def add(self, output: object, labels: Tensor) -> None:
        """output: logits (B,K), or a masked prediction, for which all images count. labels: (B,), or (B,M) padded
        with -1."""
        loss = training_loss(output, {"label": labels}, self.kind).double()
        if not isinstance(output, Tensor):
            self.sums[0] += loss * len(labels)
            self.sums[2] += len(labels)
            return
        labelled = (labels if labels.dim() == 2 else labels[:, None]).ge(0).any(dim=1)
        count = labelled.sum()
        self.sums[0] += loss * count  # the mean over the labelled images
        self.sums[1] += correct(output, labels).sum()
        self.sums[2] += count

    @property
    def loss(self) -> float:
        """Mean loss; NaN without images."""
        return float(self.sums[0] / self.sums[2])

    @property
    def top1(self) -> float:
        """Top-1 in percent; NaN without images."""
        return 100.0 * float(self.sums[1] / self.sums[2])

    @property
    def images(self) -> int:
        return int(self.sums[2])
