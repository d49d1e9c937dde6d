"""Reads batches from shards: threads decode and augment images, in an order that depends only on (seed, epoch, step).

    with Loader(open_dataset(uri), batch_size=4096, rank=rank, world_size=world_size, epoch=3, step=170) as loader:
        for batch in loader:      # one epoch, from step 170
            ...                   # batch["image"] uint8 (b, H, W, C), batch["label"] int64 (b,), batch["key"]
            loader.state()        # {"epoch": 3, "step": 171}: resume from here after this batch

The consumer drives the loader: each batch that is taken queues another one, so `prefetch` batches are in preparation
while the consumer works. Row groups are read before the batches need them (reader.py). Several tasks fill each batch,
and each task writes its rows directly into the memory of the batch."""

import logging
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import cv2
import numpy as np
import torch

from pipeline.data.codecs import BadImage, decode_stored
from pipeline.data.format import Dataset, RowGroup
from pipeline.data.loading.augment import Augment
from pipeline.data.loading.batch import Batch, label_tensor
from pipeline.data.loading.memory import BatchMemory
from pipeline.data.loading.mixed_order import MixedOrder
from pipeline.data.loading.order import AUGMENT, MIXUP, Order, Read, check_layout, default_lanes, kept_tokens, uniform
from pipeline.data.loading.reader import Reader
from pipeline.data.loading.transform import augment_image
from pipeline.data.mixture import Mixture, check_samples, smallest
from pipeline.data.patches import patchify, unpatchify
from pipeline.data.scratch import scratch
from pipeline.errors import UserError, plural

logger = logging.getLogger(__name__)

READ_AHEAD = 8  # row groups requested in addition to those of the queued batches


class Loader:
    """One rank's share of every global batch of `batch_size` samples.

    Training (train=True): every epoch is a different permutation, and every sample occurs once per epoch, except for a
    remainder of fewer than `lanes` samples. For a `Mixture` this holds for the epochs of each data set (mixed_order.py),
    and an epoch of the loader has as many images as the data sets together. The last batch is short unless drop_last.
    Samples, crops and mixup pairs depend on seed, epoch, step, batch_size, lanes and shuffle_window, never on rank,
    world_size or threads. `lanes` (default: order.default_lanes) must be a multiple of world_size; to resume with another
    number of workers, keep it the same. A row that cannot be decoded is replaced by the next row of its shuffle window,
    logged and counted.

    Evaluation (train=False): rank r gets the r-th contiguous part of the dataset, in dataset order, every sample once.
    All ranks take the same number of steps, so the last batch of some ranks may be empty. There is no flip, RandAugment
    or mixup; the crop must be center or squash (the default). A row that cannot be decoded raises UserError.

    A batch is a dict; b is the number of rows on this rank:
        image      uint8 (b, H, W, C), for encoding jpeg; or
        patches    uint8 (b, N, P*P*C), for encoding patches, or with `patch_size`
        positions  int64 (b, n), indices of the patches kept, when patch_keep_rate < 1
        label      int64 (b,), -1 unlabelled; multi-label (b, M): class indices padded with -1
        key        list of b strings
        label_b, lam   with mixup: label of the other image, and weight of `label`, float32 (b,)

    The memory of a batch is reused only after its last tensor or view has been deleted (and, for pinned memory, after
    copies from it have finished).

        augment          default: Augment() for training on jpeg, squash to 224 for evaluation on jpeg, none for patches
        shuffle_window   samples shuffled together over all lanes; each lane permutes windows of shuffle_window / lanes
        threads          decoding threads; default: the CPUs of this process, divided among the ranks of this machine
        prefetch         batches prepared in advance
        patch_keep_rate  fraction of patches kept, drawn for every sample
        pin_memory       default: True if CUDA is available
        max_replaced     number of different images that may be replaced before UserError is raised; None: no limit
        cache_dir        local folder for row groups of s3:// datasets, up to cache_bytes

    Iterating again continues with the next epoch or, after a `break`, with the next batch. `counters` has reads,
    read_bytes, cache_hits, retries and replaced. Memory use is prefetch + 1 batches and about one row group per lane."""

    def __init__(
        self,
        dataset: Dataset,
        *,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        lanes: int | None = None,
        epoch: int = 0,
        step: int = 0,
        train: bool = True,
        augment: Augment | None = None,
        shuffle_window: int = 16_384,
        threads: int | None = None,
        prefetch: int = 2,
        patch_keep_rate: float = 1.0,
        patch_size: int | None = None,
        drop_last: bool = False,
        pin_memory: bool | None = None,
        cache_dir: str | None = None,
        cache_bytes: int = 100 << 30,
        max_replaced: int | None = None,
    ) -> None:
        if augment is None and dataset.encoding == "jpeg":
            augment = Augment() if train else Augment(crop="squash")
        if lanes is None:
            lanes = default_lanes(batch_size, smallest(dataset))
        self.dataset, self.augment, self.train = dataset, augment, train
        self.batch_size, self.seed, self.rank, self.world_size = batch_size, seed, rank, world_size
        self.lanes, self.shuffle_window, self.drop_last, self.prefetch = lanes, shuffle_window, drop_last, prefetch
        self.patch_keep_rate, self.mixup = patch_keep_rate, augment.mixup if augment and train else 0.0
        self.patch_size = dataset.manifest.image["patch_size"] if dataset.encoding == "patches" else patch_size
        if patch_size not in (None, self.patch_size):
            raise UserError(f"{dataset.uri} holds patches of {self.patch_size} pixels, but patch_size is {patch_size}")
        self.shape = self._row_shape()
        self._check(epoch, step)
        self.pin_memory = torch.cuda.is_available() if pin_memory is None else pin_memory

        self._position = self._next = (epoch, step)  # of the next batch to return, and of the next batch to queue
        self._begin(epoch, step)
        if not self.steps_per_epoch or step > self.steps_per_epoch:
            raise UserError(
                f"{dataset.uri}: an epoch of {plural(len(dataset), 'sample')} has {plural(self.steps_per_epoch, 'step')} of {batch_size}; step "
                f"{step} is not one of them" + (" (drop_last drops a short batch)" if drop_last else "")
            )
        self._open: dict[int, tuple[Future[RowGroup], tuple[int, int]]] = {}  # row group -> data, last (epoch, step)
        self._queue: deque[Batch] = deque()
        self._memory = BatchMemory((self._share, *self.shape), keep=prefetch + 3)
        self.max_replaced = max_replaced
        self.replaced: dict[str, str] = {}  # key -> why the image could not be decoded

        cv2.setNumThreads(1)  # images are processed in parallel, each by one thread
        cpus = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        self.threads = threads or max(1, cpus)
        self._reader = Reader(dataset, threads=READ_AHEAD, cache_dir=cache_dir, cache_bytes=cache_bytes)
        self._pool = ThreadPoolExecutor(self.threads, thread_name_prefix="decode")
        self._closed = False

    # ------------------------------------------------------------ options

    def _row_shape(self) -> tuple[int, ...]:
        """The shape of one row of the batch."""
        if self.augment is None:
            self._tokens, size = self.dataset.schema.tokens, self.dataset.schema.token_bytes
        elif self.dataset.encoding == "patches" and self.dataset.manifest.image["channels"] != 3:
            raise UserError(f"{self.dataset.uri}: augmentations need three channels; use augment=None")
        elif self.patch_size is None:
            return (self.augment.size, self.augment.size, 3)
        elif self.augment.size % self.patch_size:
            raise UserError(f"patch_size {self.patch_size} does not divide the image size {self.augment.size}")
        else:
            self._tokens, size = (self.augment.size // self.patch_size) ** 2, self.patch_size**2 * 3
        return (max(1, round(self.patch_keep_rate * self._tokens)), size)

    def _check(self, epoch: int, step: int) -> None:
        if not 0 <= self.rank < self.world_size:
            raise UserError(f"rank {self.rank} is outside a world of {self.world_size}")
        if epoch < 0 or step < 0 or self.prefetch < 0 or self.shuffle_window < 1 or not 0 < self.patch_keep_rate <= 1:
            raise UserError("epoch, step and prefetch must be at least 0, shuffle_window 1, patch_keep_rate in (0, 1]")
        if self.patch_keep_rate < 1 and self.patch_size is None:
            raise UserError(
                "patch_keep_rate < 1 drops patches: set patch_size, so that the loader divides images into patches"
            )
        if self.patch_keep_rate < 1 and self.mixup:
            raise UserError(
                "mixup blends whole images, but patch_keep_rate < 1 keeps different patches of each image: choose one "
                "of the two"
            )
        if not self.train:
            if self.batch_size % self.world_size:
                raise UserError(f"batch_size {self.batch_size} is not divisible by world_size {self.world_size}")
            if self.augment and not self.augment.deterministic:
                raise UserError(
                    f"crop {self.augment.crop!r} is random: evaluation (train=False) needs crop center or squash"
                )
            return
        check_layout(self.batch_size, self.lanes, self.world_size)
        if self.mixup and self.batch_size == self.lanes:
            raise UserError(
                f"mixup pairs samples of one lane, but batch_size {self.batch_size} gives each of {plural(self.lanes, 'lane')} "
                f"one sample; set lanes to {self.batch_size // 2} or fewer"
            )
        check_samples(self.dataset, self.lanes)

    @property
    def _lane_range(self) -> range:
        if not self.train:
            return range(1)
        share = self.lanes // self.world_size
        return range(self.rank * share, (self.rank + 1) * share)

    def _make_order(self, epoch: int) -> Order | MixedOrder:
        common: dict[str, Any] = {"seed": self.seed, "epoch": epoch, "shuffle_window": self.shuffle_window}
        rows = self.dataset.row_groups["rows"]
        if self.train and isinstance(self.dataset, Mixture):
            common |= {"batch_size": self.batch_size, "lanes": self.lanes, "whole_steps": self.drop_last}
            return MixedOrder(self.dataset.rows, self.dataset.shares, **common)
        if self.train:
            return Order(rows, batch_size=self.batch_size, lanes=self.lanes, **common)
        start, stop = (len(self.dataset) * r // self.world_size for r in (self.rank, self.rank + 1))
        return Order(rows, batch_size=self._share, lanes=1, shuffle=False, start=start, stop=stop, **common)

    @property
    def _share(self) -> int:
        """The number of rows of a full batch on this rank."""
        return self.batch_size // self.world_size

    @property
    def steps_per_epoch(self) -> int:
        if self.train:
            return self._order.full_steps if self.drop_last else self._order.steps
        if self.drop_last:
            return len(self.dataset) // self.batch_size
        largest_part = -(-len(self.dataset) // self.world_size)
        return -(-largest_part // self._share)

    @property
    def counters(self) -> dict[str, int]:
        return {**self._reader.counters, "replaced": len(self.replaced)}

    def images_seen(self, steps: int) -> dict[str, tuple[int, float]]:
        """{data set of a mixture: (its images, its epochs) in the first `steps` steps of a run}; empty for one data set.
        Needs drop_last."""
        if not isinstance(self.dataset, Mixture) or not isinstance(self._order, MixedOrder):
            return {}
        images, sizes = self._order.images_seen(steps), map(len, self.dataset.parts)
        return {name: (n, n / size) for name, n, size in zip(self.dataset.names, images, sizes, strict=True)}

    def state(self) -> dict[str, int]:
        """The epoch and step at which a new Loader continues after the last batch that was returned."""
        epoch, step = self._position
        return {"epoch": epoch, "step": step}

    def __len__(self) -> int:
        return self.steps_per_epoch

    # ------------------------------------------------------------ iteration

    def __iter__(self) -> Iterator[dict[str, Any]]:
        epoch, step = self._position
        while step < self.steps_per_epoch:
            if self._closed:
                raise RuntimeError("the loader is closed")
            while len(self._queue) <= self.prefetch and self.enqueue():
                pass
            for task in self._queue[0].tasks:
                task.result()  # raises the errors of the threads
            batch = self._finish(self._queue.popleft())
            for group in [g for g, (_, last) in self._open.items() if last <= (epoch, step)]:
                del self._open[group]
            step += 1
            self._position = (epoch, step) if step < self.steps_per_epoch else (epoch + 1, 0)
            yield batch
            del batch  # so that its memory can be reused for the next batch
        self._position = (epoch + 1, 0)

    def _begin(self, epoch: int, step: int) -> None:
        """Plans the order of an epoch, and its reads from `step` on."""
        self._order = self._make_order(epoch)
        self._reads = self._order.reads_from(step, self._lane_range)
        self._ahead: deque[int] = deque()  # first steps of the reads begun for steps that are not queued

    @property
    def row_groups_in_memory(self) -> int:
        return len(self._open)

    def enqueue(self) -> bool:
        """Queues the next batch: starts its reads and a few more, then the tasks that fill it.
        Returns False at the end of an evaluation pass."""
        epoch, step = self._next
        if step == self.steps_per_epoch:
            if self._queue and not self.train:
                return False  # evaluation finishes one pass before it begins the next
            epoch, step = epoch + 1, 0
            self._begin(epoch, step)
        self._read_ahead(epoch, step)
        batch = self._plan(epoch, step)
        self._submit(batch)
        self._queue.append(batch)
        self._next = (epoch, step + 1)
        return True

    def _read_ahead(self, epoch: int, step: int) -> None:
        """Starts the reads of the batch of a step, and a few more."""
        while self._ahead and self._ahead[0] <= step:
            self._ahead.popleft()
        while len(self._ahead) < READ_AHEAD and (read := next(self._reads, None)) is not None:
            self._start(read, epoch)
            if read.first > step:
                self._ahead.append(read.first)

    def _submit(self, batch: Batch) -> None:
        """Starts the tasks that fill a batch."""
        unit = batch.per_lane if self.mixup else 1  # mixup needs whole lanes in one task
        size = max(unit, -(-max(8, batch.n // (4 * self.threads)) // max(unit, 1)) * unit, 1)
        batch.tasks += [
            self._pool.submit(self._fill, batch, i, min(i + size, batch.n)) for i in range(0, batch.n, size)
        ]

    def _start(self, read: Read, epoch: int) -> None:
        until = (epoch, read.last)
        if read.group in self._open:
            future, last = self._open[read.group]
            self._open[read.group] = (future, max(last, until))
        else:
            self._open[read.group] = (self._reader.start(read.group), until)

    def _plan(self, epoch: int, step: int) -> Batch:
        """Finds the rows of this rank in a step and allocates their memory."""
        picks = self._order.picks(step, self._lane_range)
        groups, rows, n = picks.groups.ravel(), picks.rows.ravel(), picks.rows.size
        if self.pin_memory:
            # PyTorch's allocator reuses pinned memory only after the copies from it have finished.
            images = torch.empty((n, *self.shape), dtype=torch.uint8, pin_memory=True)
            pixels = images.numpy()
        else:
            pixels = self._memory.take(n)
            images = torch.from_numpy(pixels)
        lam = 1.0
        if self.mixup:
            from scipy.special import betaincinv

            lam = float(betaincinv(self.mixup, self.mixup, uniform(self.seed, MIXUP, epoch, step)))
        return Batch(
            order=self._order,
            step=step,
            per_lane=picks.rows.shape[1],
            groups=groups.tolist(),
            rows=rows.tolist(),
            samples=self.dataset.starts[groups] + rows,
            epochs=picks.epochs.ravel(),
            sources={group: future for group, (future, _) in self._open.items()},
            images=images,
            pixels=pixels,
            kept=np.empty((n, self.shape[0]), np.int64) if self.patch_keep_rate < 1 else None,
            lam=max(lam, 1 - lam),
            labels=[None] * n,
            keys=[""] * n,
        )

    # ------------------------------------------------------------ in the decoding threads

    def _fill(self, batch: Batch, begin: int, end: int) -> None:
        """Fills the rows [begin, end) of a batch."""
        if batch.kept is not None:
            tokens, samples = self._tokens, batch.samples[begin:end]
            epochs = batch.epochs[begin:end]
            batch.kept[begin:end] = kept_tokens(self.seed, epochs, samples, tokens, self.patch_keep_rate)
        draws = self._draws(batch.epochs[begin:end], batch.samples[begin:end])
        for i in range(begin, end):
            source, row = batch.sources[batch.groups[i]].result(), batch.rows[i]
            try:
                self._make(source.images[row], draws[i - begin], batch, i)
            except BadImage as error:
                source, row = self._replace(batch, i, source.keys[row], error)
            except Exception as error:
                raise RuntimeError(f"{self.dataset.uri}: {source.keys[row]}: {error}") from error
            batch.keys[i], batch.labels[i] = source.keys[row], source.labels[row]
        if self.mixup:
            for start in range(begin, end, batch.per_lane):
                _blend(batch.pixels[start : start + batch.per_lane], batch.lam)

    def _draws(self, epochs: np.ndarray, samples: np.ndarray) -> list[list[float]]:
        """The random numbers for the augmentation of each sample."""
        numbers = np.arange(self.augment.draws if self.augment else 0)
        return uniform(self.seed, AUGMENT, epochs[:, None], samples[:, None], numbers).tolist()

    def _make(self, stored: Any, draws: list[float], batch: Batch, i: int) -> None:
        """Decodes and augments a stored image into row i of the batch. Raises BadImage."""
        target = batch.pixels[i]
        if self.augment is None:
            patches = stored
        else:
            if self.dataset.encoding == "jpeg":
                image = decode_stored(stored)
            else:
                kind = self.dataset.manifest.image
                image = unpatchify(stored, kind["height"], kind["width"], kind["patch_size"])
            if self.patch_size is None:
                augment_image(self.augment, image, draws, target, self.train)
                return
            pixels = scratch("pixels", (self.augment.size, self.augment.size, 3))
            augment_image(self.augment, image, draws, pixels, self.train)
            patches = patchify(pixels, self.patch_size, out=scratch("patches", (self._tokens, self.shape[1])))
        if batch.kept is None:
            target[:] = patches
        else:
            np.take(patches, batch.kept[i], axis=0, out=target, mode="clip")

    def _replace(self, batch: Batch, i: int, key: str, error: BadImage) -> tuple[RowGroup, int]:
        """Fills row i with the next sample of its shuffle window that can be decoded. Returns (row group, row in it).

        Raises UserError during evaluation, above `max_replaced`, or if no image of the window can be decoded.
        """
        if not self.train:
            raise UserError(f"{self.dataset.uri}: {key}: {error}; evaluation needs every image: prepare the data again")
        lane, offset = divmod(i, batch.per_lane)
        for groups, rows, epochs in batch.order.substitutes(self._lane_range[lane], batch.step, offset):
            source, row = batch.sources[int(groups[0])].result(), int(rows[0])
            try:
                draws = self._draws(epochs, self.dataset.starts[groups] + rows)
                self._make(source.images[row], draws[0], batch, i)
            except BadImage:
                continue
            if key not in self.replaced:
                logger.warning(
                    "%s: %s cannot be decoded (%s) and is replaced by %s",
                    self.dataset.uri,
                    key,
                    error,
                    source.keys[row],
                )
            self.replaced[key] = str(error)
            if self.max_replaced is not None and len(self.replaced) > self.max_replaced:
                raise self._too_many_replaced(key, str(error))
            return source, row
        raise UserError(
            f"{self.dataset.uri}: {key} cannot be decoded ({error}), nor can any other image of its shuffle window"
        )

    def _too_many_replaced(self, key: str, reason: str) -> UserError:
        return UserError(
            f"{self.dataset.uri}: {plural(len(self.replaced), 'image')} cannot be decoded, more than max_replaced "
            f"{self.max_replaced}; the last one is {key} ({reason}); prepare the data again"
        )

    # ------------------------------------------------------------ finished batches

    def _finish(self, batch: Batch) -> dict[str, Any]:
        labels = label_tensor(batch.labels, self.dataset.multilabel)
        result: dict[str, Any] = {
            "patches" if self.patch_size else "image": batch.images,
            "label": labels,
            "key": batch.keys,
        }
        if batch.kept is not None:
            result["positions"] = torch.from_numpy(batch.kept)
        if self.mixup:
            by_lane = labels.reshape(-1, batch.per_lane, *labels.shape[1:])
            result["label_b"] = by_lane.roll(-1, dims=1).reshape(labels.shape)
            result["lam"] = torch.full((batch.n,), batch.lam)
        return result

    def close(self) -> None:
        """Ends the threads. Batches that were returned stay valid."""
        self._closed = True
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._reader.close()  # so that no task waits for a read
        self._pool.shutdown(wait=True)
        self._queue.clear()
        self._open.clear()

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _blend(rows: np.ndarray, lam: float) -> None:
    """Mixup within one lane, in place: lam * row + (1 - lam) * next row (the last row with the first), rounded to
    uint8."""
    flat = rows.reshape(len(rows), 1, -1)
    first = flat[0].copy()
    for i in range(len(flat)):
        cv2.addWeighted(flat[i], lam, flat[i + 1] if i + 1 < len(flat) else first, 1 - lam, 0, dst=flat[i])
