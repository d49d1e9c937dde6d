"""Fine-tuning one task in one process: plain PyTorch, no engine, the same numbers for the same (task, seed, lr).

Legend: B batch, H = W image side, C channels, K classes.
"""

import copy
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from pipeline.data.loading.augment import Augment
from pipeline.data.loading.patches import unpatchify
from pipeline.training.schedule import ScheduleConfig, learning_rate
from pipeline.transfer.suites import FineTune, Split

if TYPE_CHECKING:
    from pipeline.data.format import Dataset

# A training set that fits is decoded once and stays on the device. VTAB's 1,000 images at 448 px take 0.6 GB, and each is
# used 1,280 times: decoding them again and again would cost more CPU than the GPU needs for the training.
RESIDENT_BYTES = 4 << 30
CURVE_POINTS = 50


class Diverged(Exception):
    """The loss is no longer a number: the learning rate is too high for this task."""


@dataclass(slots=True)
class Tuned:
    """A fine-tuned model, in eval mode, and how it got there: curve rows are (step, loss, lr)."""

    model: nn.Module
    curve: list[tuple[int, float, float]]
    images_per_second: float


def fine_tune(
    pretrained: nn.Module,
    train: "Dataset",
    split: Split,
    protocol: FineTune,
    *,
    num_classes: int,
    lr: float,
    seed: int,
    device: torch.device | str = "cpu",
    micro_batch: int = 64,
    threads: int = 1,
    parity: bool = False,
    progress: Callable[[int, int, float], None] = lambda step, steps, loss: None,
) -> Tuned:
    """A copy of `pretrained` with a zero-initialised head, all of it trained on `train` (section 4.1, appendix B.1.1).

    progress(step, steps, loss) is called about fifty times. Raises Diverged when the loss becomes NaN or infinite.
    """
    torch.manual_seed(seed)
    device = torch.device(device)
    model: Any = copy.deepcopy(pretrained)
    model.set_image_size(protocol.resolution)
    model.replace_head(num_classes)
    model.to(device).train()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(protocol.polyak)) if protocol.polyak else None
    optimiser = torch.optim.SGD(model.parameters(), lr=lr, momentum=protocol.momentum)
    # float32 weights; matrix products in bfloat16 where the hardware is made for it
    autocast = torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda")

    def gradients(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Adds the gradient of the mean loss over the batch, part by part, and returns that loss."""
        total = torch.zeros((), device=device)
        for x, y in zip(images.split(micro_batch), labels.split(micro_batch), strict=True):
            with autocast:
                loss = F.cross_entropy(model(x).float(), y, reduction="sum") / len(labels)
            loss.backward()
            total += loss.detach()
        return total

    every = max(1, protocol.steps // CURVE_POINTS)
    curve: list[tuple[int, float, float]] = []
    losses: list[torch.Tensor] = []
    stream = batches(train, split, protocol, seed=seed, device=device, threads=threads)
    start = time.perf_counter()
    for step, (images, labels) in enumerate(stream):
        if step == protocol.steps:
            break
        rate = rate_at(protocol, lr, step)
        for group in optimiser.param_groups:
            group["lr"] = rate
        labels = labels % 2 if parity else labels
        while True:
            optimiser.zero_grad(set_to_none=True)
            try:
                loss = gradients(images, labels)
                break
            except torch.cuda.OutOfMemoryError:
                if micro_batch == 1:
                    raise
                micro_batch //= 2
                print(f"GPU memory is short: micro-batch {micro_batch} from now on", flush=True)
        nn.utils.clip_grad_norm_(model.parameters(), protocol.clip)
        optimiser.step()
        if average is not None:
            average.update_parameters(model)
        losses.append(loss)
        if (step + 1) % every == 0 or step + 1 == protocol.steps:  # the only moments that wait for the device
            mean = torch.stack(losses).mean().item()
            losses.clear()
            curve.append((step + 1, mean, rate))
            progress(step + 1, protocol.steps, mean)
            if not math.isfinite(mean):
                raise Diverged(f"loss {mean} at step {step + 1} with learning rate {lr:g}; use a smaller one")
    speed = protocol.steps * protocol.batch_size / (time.perf_counter() - start)
    tuned = average.module if average is not None else model
    return Tuned(tuned.eval(), curve, speed)


def rate_at(protocol: FineTune, lr: float, step: int) -> float:
    """Learning rate of step `step` (0-based); linear warm-up multiplies the decayed rate."""
    if protocol.decay == "cosine":
        return learning_rate(ScheduleConfig(kind="cosine"), step, peak=lr, total=protocol.steps, warmup=protocol.warmup)
    decayed = lr * 0.1 ** sum(step >= share * protocol.steps for share in (0.3, 0.6, 0.9))
    return decayed * min(1.0, step / protocol.warmup) if protocol.warmup else decayed


# ---------------------------------------------------------------- images


def batches(
    train: "Dataset", split: Split, protocol: FineTune, *, seed: int, device: torch.device, threads: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Augmented training batches without end: uint8 (B,H,W,C) and int64 (B,), on the device.

    Every epoch is a new permutation, and a batch may span two, so each step sees exactly the batch size.
    """
    side = protocol.resolution
    if protocol.crop == "random":
        tile = (
            train.manifest.image["patch_size"] if train.encoding == "patches" else 1
        )  # the loader gives whole patches
        side = math.ceil(round(side * protocol.enlarge) / tile) * tile
    if protocol.crop != "inception" and len(train) * side * side * 3 <= RESIDENT_BYTES:
        return _resident_batches(train, split, protocol, side, seed, device, threads)
    return _streamed_batches(train, split, protocol, side, seed, device, threads)


def _resident_batches(
    train: "Dataset", split: Split, protocol: FineTune, side: int, seed: int, device: torch.device, threads: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    parts = list(examples(train, split, Augment(size=side, crop="squash"), batch_size=256, threads=threads))
    images_NHWC, labels_N = (torch.cat(column).to(device) for column in list(zip(*parts, strict=True))[:2])
    generator = torch.Generator().manual_seed(seed)  # on the CPU: the same crops on every device
    queue = torch.empty(0, dtype=torch.int64)
    while True:
        while len(queue) < protocol.batch_size:
            queue = torch.cat([queue, torch.randperm(len(labels_N), generator=generator)])
        picked, queue = queue[: protocol.batch_size].to(device), queue[protocol.batch_size :]
        yield crop_and_flip(images_NHWC, picked, protocol, generator), labels_N[picked]


def _streamed_batches(
    train: "Dataset", split: Split, protocol: FineTune, side: int, seed: int, device: torch.device, threads: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    augment = Augment(size=protocol.resolution, crop=protocol.crop, flip=protocol.flip)
    if protocol.crop == "random":
        augment = replace(augment, resize=side, squash=True)
    size, n = protocol.resolution, protocol.batch_size
    images, labels = torch.empty((0, size, size, 3), dtype=torch.uint8), torch.empty(0, dtype=torch.int64)
    stream = examples(train, split, augment, batch_size=min(n, len(train)), threads=threads, seed=seed, train=True)
    for more_images, more_labels, _ in stream:
        images, labels = torch.cat([images, more_images]), torch.cat([labels, more_labels])
        while len(labels) >= n:
            yield images[:n].to(device, non_blocking=True), labels[:n].to(device, non_blocking=True)
            images, labels = images[n:], labels[n:]


def examples(
    dataset: "Dataset",
    split: Split,
    augment: Augment,
    *,
    batch_size: int,
    threads: int,
    seed: int = 0,
    train: bool = False,
    part: tuple[int, int] = (0, 1),
) -> Iterator[tuple[torch.Tensor, torch.Tensor, list[str]]]:
    """uint8 images (B,H,W,C), labels and keys of the split's examples: once in order, or (train) shuffled without end.

    part: (i, n) gives the i-th of n contiguous parts, for evaluation by several processes.
    """
    from pipeline.data import Loader

    with Loader(
        dataset,
        batch_size=batch_size * (1 if train else part[1]),
        lanes=1,
        seed=seed,
        rank=part[0],
        world_size=part[1],
        train=train,
        augment=augment,
        threads=threads,
    ) as loader:
        while True:
            for batch in loader:
                images, labels, keys = _images(batch, dataset), batch["label"], batch["key"]
                chosen = split.chosen(keys)
                if not all(chosen):
                    images, labels = images[torch.tensor(chosen)], labels[torch.tensor(chosen)]
                    keys = [key for key, wanted in zip(keys, chosen, strict=True) if wanted]
                if keys:
                    yield images, labels, keys
            if not train:
                return


def _images(batch: dict[str, Any], dataset: "Dataset") -> torch.Tensor:
    """uint8 (B,H,W,C) of a loader's batch: patches are put together again, at whatever size the loader gave them."""
    if "image" in batch:
        return batch["image"]
    tile = dataset.manifest.image["patch_size"]
    side = math.isqrt(batch["patches"].shape[1]) * tile
    return torch.from_numpy(unpatchify(batch["patches"].numpy(), side, side, tile))


def crop_and_flip(
    images_NHWC: torch.Tensor, picked_B: torch.Tensor, protocol: FineTune, generator: torch.Generator
) -> torch.Tensor:
    """A random square of the protocol's resolution out of each picked image, mirrored half of the time: one gather."""
    batch, side, size, device = len(picked_B), images_NHWC.shape[1], protocol.resolution, images_NHWC.device
    if side == size and not protocol.flip:
        return images_NHWC[picked_B]
    corners = torch.randint(side - size + 1, (2, batch, 1), generator=generator)
    mirrored = torch.rand(batch, 1, generator=generator) < (0.5 if protocol.flip else 0.0)
    line = torch.arange(size)
    rows = (corners[0] + line).to(device)
    columns = (corners[1] + torch.where(mirrored, size - 1 - line, line)).to(device)
    return images_NHWC[picked_B[:, None, None], rows[:, :, None], columns[:, None, :]]


# ---------------------------------------------------------------- evaluation


@dataclass(slots=True)
class Predictions:
    """Of a whole dataset, in its order. `labels` is (N,) or, with several labels per image, (N,M) padded with -1."""

    keys: list[str]
    labels: np.ndarray
    classes: np.ndarray

    def correct(self) -> np.ndarray:
        """bool (N,): the predicted class is (one of) the labels."""
        labels = self.labels if self.labels.ndim == 2 else self.labels[:, None]
        return np.any(labels == self.classes[:, None], axis=1)

    def labelled(self) -> np.ndarray:
        """bool (N,): the image counts; ImageNet-ReaL leaves out those without any label."""
        labels = self.labels if self.labels.ndim == 2 else self.labels[:, None]
        return np.any(labels >= 0, axis=1)

    def accuracy(self, without: frozenset[str] = frozenset()) -> float:
        """Top-1 in percent over the labelled images whose key is not in `without`; NaN when none is left."""
        counts = self.labelled()
        if without:
            counts &= np.array([key not in without for key in self.keys])
        return 100.0 * float(self.correct()[counts].mean()) if counts.any() else math.nan

    def with_labels(self, labels: np.ndarray) -> "Predictions":
        return replace(self, labels=labels)


@torch.inference_mode()
def predict(
    model: nn.Module,
    test: "Dataset",
    split: Split,
    *,
    resolution: int,
    device: torch.device | str,
    batch_size: int,
    threads: int = 1,
    parity: bool = False,
) -> Predictions:
    """Predicts every image of the split once, squashed to the resolution."""
    device = torch.device(device)
    keys: list[str] = []
    labels, classes = [], []
    squash = Augment(size=resolution, crop="squash")
    for images, label, key in examples(test, split, squash, batch_size=batch_size, threads=threads):
        with torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda"):
            classes.append(model(images.to(device, non_blocking=True)).argmax(1).cpu())
        labels.append(torch.where(label >= 0, label % 2, label) if parity else label)
        keys += key
    return Predictions(keys, padded(labels), torch.cat(classes).numpy())


def padded(labels: list[torch.Tensor]) -> np.ndarray:
    """Batches of labels as one array; multi-label batches of different widths are filled up with -1."""
    if labels[0].ndim == 1:
        return torch.cat(labels).numpy()
    width = max(part.shape[1] for part in labels)
    return torch.cat([F.pad(part, (0, width - part.shape[1]), value=-1) for part in labels]).numpy()
