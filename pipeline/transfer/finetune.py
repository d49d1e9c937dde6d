"""Fine-tunes one task in one process with plain PyTorch. The result is deterministic in (task, seed, learning rate).

    training = FineTuning(pretrained, data, protocol, lr=0.01, seed=0, execution=Execution(device="cuda"))
    tuned = training.run()                       # another thread may read training.progress meanwhile
    predictions = predict(tuned.model, test, resolution=protocol.resolution, execution=execution)

Legend: B batch, H = W image side, C channels, K classes.
"""

import copy
import logging
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from pipeline.data import Loader
from pipeline.data.loading.augment import Augment
from pipeline.data.loading.upload import Upload
from pipeline.data.patches import unpatchify
from pipeline.errors import plural
from pipeline.training.config import EngineConfig
from pipeline.training.kernels import compile_model
from pipeline.training.schedule import ScheduleConfig, learning_rate
from pipeline.transfer.predictions import Predictions
from pipeline.transfer.protocols import FineTune, Split

if TYPE_CHECKING:
    from pipeline.data.format import Dataset

# A training set that fits in memory is decoded once and kept on the device. VTAB's 1,000 images at 448 px take 0.6 GB,
# and each is used 1,280 times: decoding them every time would take longer than the training on the GPU.
RESIDENT_BYTES = 4 << 30
CURVE_POINTS = 50

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Execution:
    """The device and batch settings of a process, which affect results only by rounding."""

    device: str = "cpu"
    micro_batch: int = 64
    """Images per forward pass of a training step."""
    threads: int = 1
    """Threads that read and decode images."""
    compile: bool = False
    """Compile the blocks of this project's models for training."""

    def autocast(self) -> torch.autocast:
        """On GPUs, matrix products in bfloat16; weights stay float32."""
        return torch.autocast("cuda", torch.bfloat16, enabled=torch.device(self.device).type == "cuda")


@dataclass(frozen=True, slots=True)
class Examples:
    """The examples of a split."""

    dataset: "Dataset"
    split: Split

    @property
    def num_classes(self) -> int:
        return len(self.dataset.classes)


class Diverged(Exception):
    """The loss is NaN or infinite, because the learning rate is too high for this task."""


@dataclass(slots=True)
class FineTunedModel:
    """A fine-tuned model in eval mode, with its training curve of (step, loss, lr)."""

    model: nn.Module
    curve: list[tuple[int, float, float]]
    images_per_second: float


class FineTuning:
    """Trains all weights of a copy of `pretrained` with a zero-initialised head (section 4.1, appendix B.1.1)."""

    def __init__(
        self, pretrained: nn.Module, data: Examples, protocol: FineTune, *, lr: float, seed: int, execution: Execution
    ) -> None:
        torch.manual_seed(seed)
        self.data, self.protocol, self.lr, self.seed, self.execution = data, protocol, lr, seed, execution
        self.micro_batch = execution.micro_batch
        model: Any = copy.deepcopy(pretrained)
        model.set_image_size(protocol.resolution)
        model.replace_head(data.num_classes)
        self.model: nn.Module = model.to(execution.device).train()
        decay = protocol.ema_decay
        self.ema = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(decay)) if decay else None
        # Compile after the copy for the average. Models of other libraries have no compiled_parts and are not compiled.
        if execution.compile and hasattr(self.model, "compiled_parts"):
            compile_model(self.model, EngineConfig())
        self.optimiser = torch.optim.SGD(self.model.parameters(), lr=lr, momentum=protocol.momentum)
        self.progress: tuple[int, int, float] = (0, protocol.steps, math.nan)
        """(steps done, total steps, loss), updated about fifty times."""

    def run(self) -> FineTunedModel:
        """Trains to the last step. Raises Diverged if the loss becomes NaN or infinite."""
        protocol = self.protocol
        every = max(1, protocol.steps // CURVE_POINTS)
        curve: list[tuple[int, float, float]] = []
        losses: list[torch.Tensor] = []
        stream = batches(self.data, protocol, seed=self.seed, execution=self.execution)
        start = time.perf_counter()
        for step, (images, classes) in enumerate(stream):
            if step == protocol.steps:
                break
            rate = learning_rate_at(protocol, self.lr, step)
            losses.append(self._step(images, classes, rate))
            if (step + 1) % every == 0 or step + 1 == protocol.steps:  # only these steps wait for the device
                mean = torch.stack(losses).mean().item()
                losses.clear()
                curve.append((step + 1, mean, rate))
                self.progress = (step + 1, protocol.steps, mean)
                if not math.isfinite(mean):
                    raise Diverged(f"loss {mean} at step {step + 1} with learning rate {self.lr:g}; use a smaller one")
        speed = protocol.steps * protocol.batch_size / (time.perf_counter() - start)
        tuned = self.ema.module if self.ema is not None else self.model
        return FineTunedModel(tuned.eval(), curve, speed)

    def _step(self, images: torch.Tensor, labels: torch.Tensor, rate: float) -> torch.Tensor:
        """One optimiser step on a batch. Returns its loss. Halves the micro-batch if GPU memory runs out."""
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        while True:
            self.optimiser.zero_grad(set_to_none=True)
            try:
                loss = self._accumulate(images, labels)
                break
            except torch.cuda.OutOfMemoryError:
                if self.micro_batch == 1:
                    raise
                self.micro_batch //= 2
                logger.warning("out of GPU memory: reducing the micro-batch to %s", plural(self.micro_batch, "image"))
        nn.utils.clip_grad_norm_(self.model.parameters(), self.protocol.clip)
        self.optimiser.step()
        if self.ema is not None:
            self.ema.update_parameters(self.model)
        return loss

    def _accumulate(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Accumulates the gradient of the mean loss of a batch over its micro-batches. Returns the loss."""
        total = torch.zeros((), device=labels.device)
        for x, y in zip(images.split(self.micro_batch), labels.split(self.micro_batch), strict=True):
            with self.execution.autocast():
                loss = F.cross_entropy(self.model(x).float(), y, reduction="sum") / len(labels)
            loss.backward()
            total += loss.detach()
        return total


def learning_rate_at(protocol: FineTune, lr: float, step: int) -> float:
    """The learning rate at `step` (0-based): the decayed rate times the linear warm-up."""
    if protocol.decay == "cosine":
        return learning_rate(ScheduleConfig(kind="cosine"), step, peak=lr, total=protocol.steps, warmup=protocol.warmup)
    decayed = lr * 0.1 ** sum(step >= share * protocol.steps for share in (0.3, 0.6, 0.9))
    return decayed * min(1.0, step / protocol.warmup) if protocol.warmup else decayed


# ---------------------------------------------------------------- images


def batches(
    data: Examples, protocol: FineTune, *, seed: int, execution: Execution
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless augmented training batches on the device: uint8 (B,H,W,C) and class indices int64 (B,).

    Every epoch is a new permutation. A batch may span two epochs, so every batch has exactly the batch size.
    """
    dataset, side = data.dataset, protocol.resolution
    if protocol.crop == "random":
        # the loader returns whole patches
        tile = dataset.manifest.image["patch_size"] if dataset.encoding == "patches" else 1
        side = math.ceil(round(side * protocol.enlarge) / tile) * tile
    if protocol.crop != "inception" and len(dataset) * side * side * 3 <= RESIDENT_BYTES:
        return _resident_batches(data, protocol, side, seed, execution)
    return _streamed_batches(data, protocol, side, seed, execution)


def _resident_batches(
    data: Examples, protocol: FineTune, side: int, seed: int, execution: Execution
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    parts = list(read_examples(data, Augment(size=side, crop="squash"), batch_size=256, threads=execution.threads))
    images_NHWC, labels_N = (torch.cat(column).to(execution.device) for column in list(zip(*parts, strict=True))[:2])
    generator = torch.Generator().manual_seed(seed)  # on the CPU, so that crops are the same on every device
    queue = torch.empty(0, dtype=torch.int64)
    while True:
        while len(queue) < protocol.batch_size:
            queue = torch.cat([queue, torch.randperm(len(labels_N), generator=generator)])
        picked, queue = queue[: protocol.batch_size].to(execution.device), queue[protocol.batch_size :]
        yield crop_and_flip(images_NHWC, picked, protocol, generator), labels_N[picked]


def _streamed_batches(
    data: Examples, protocol: FineTune, side: int, seed: int, execution: Execution
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    augment = Augment(size=protocol.resolution, crop=protocol.crop, flip=protocol.flip)
    if protocol.crop == "random":
        augment = replace(augment, resize=side, squash=True)
    size, n, device = protocol.resolution, protocol.batch_size, execution.device
    upload = Upload(device)
    images = torch.empty((0, size, size, 3), dtype=torch.uint8, device=device)
    labels = torch.empty(0, dtype=torch.int64, device=device)
    batch_size = min(n, len(data.dataset))
    stream = read_examples(data, augment, batch_size=batch_size, threads=execution.threads, shuffle_seed=seed)
    for more_images, more_labels, _ in stream:
        # Concatenate on the device: on the host the result would be pageable, and the upload would wait for the
        # previous step.
        more = upload({"image": more_images, "label": more_labels})
        images, labels = torch.cat([images, more["image"]]), torch.cat([labels, more["label"]])
        while len(labels) >= n:
            yield images[:n], labels[:n]
            images, labels = images[n:], labels[n:]


def read_examples(
    data: Examples,
    augment: Augment,
    *,
    batch_size: int,
    threads: int,
    shuffle_seed: int | None = None,
    part: tuple[int, int] = (0, 1),
) -> Iterator[tuple[torch.Tensor, torch.Tensor, list[str]]]:
    """uint8 images (B,H,W,C), class indices and keys of the examples: once in order, or endlessly in shuffled order.

    shuffle_seed: shuffle, for training. part: (i, n) is the i-th of n contiguous parts, for evaluation by several
    processes.
    """
    train = shuffle_seed is not None
    with Loader(
        data.dataset,
        batch_size=batch_size * (1 if train else part[1]),
        lanes=1,
        seed=shuffle_seed or 0,
        rank=part[0],
        world_size=part[1],
        train=train,
        augment=augment,
        threads=threads,
    ) as loader:
        while True:
            for batch in loader:
                images, labels, keys = _images(batch, data.dataset), batch["label"], batch["key"]
                chosen = data.split.chosen(keys)
                if not all(chosen):
                    images, labels = images[torch.tensor(chosen)], labels[torch.tensor(chosen)]
                    keys = [key for key, wanted in zip(keys, chosen, strict=True) if wanted]
                if keys:
                    yield images, labels, keys
            if not train:
                return


def _images(batch: dict[str, Any], dataset: "Dataset") -> torch.Tensor:
    """The images of a loader's batch as uint8 (B,H,W,C). Patches are reassembled to images."""
    if "image" in batch:
        return batch["image"]
    tile = dataset.manifest.image["patch_size"]
    side = math.isqrt(batch["patches"].shape[1]) * tile
    return torch.from_numpy(unpatchify(batch["patches"].numpy(), side, side, tile))


def crop_and_flip(
    images_NHWC: torch.Tensor, picked_B: torch.Tensor, protocol: FineTune, generator: torch.Generator
) -> torch.Tensor:
    """A random square of the protocol's resolution from each picked image, flipped
    with probability 1/2, as one gather."""
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


@torch.inference_mode()
def predict(model: nn.Module, test: Examples, *, resolution: int, execution: Execution) -> Predictions:
    """Predicts every example once, with images squashed to the resolution. Without gradients a batch is four
    micro-batches. Raises Diverged if outputs are not finite."""
    keys: list[str] = []
    labels, classes, finite = [], [], []
    squash = Augment(size=resolution, crop="squash")
    for images, label, key in read_examples(
        test, squash, batch_size=4 * execution.micro_batch, threads=execution.threads
    ):
        with execution.autocast():
            logits = model(images.to(execution.device, non_blocking=True))
        finite.append(logits.isfinite().all(1).cpu())
        classes.append(logits.argmax(1).cpu())
        labels.append(label)
        keys += key
    if bad := int((~torch.cat(finite)).sum()):
        raise Diverged(f"the outputs for {bad} of {plural(len(keys), 'image')} are not finite")
    return Predictions(keys, pad_labels(labels), torch.cat(classes).numpy())


def pad_labels(labels: list[torch.Tensor]) -> np.ndarray:
    """Batches of labels as one array; multi-label batches of different widths are padded with -1."""
    if labels[0].ndim == 1:
        return torch.cat(labels).numpy()
    width = max(part.shape[1] for part in labels)
    return torch.cat([F.pad(part, (0, width - part.shape[1]), value=-1) for part in labels]).numpy()
