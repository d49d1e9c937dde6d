"""Features of frozen models, which are computed once on the work queue, stored, and read by every probe.

A feature set is a folder of `part-*.parquet` (key, labels, feature as D float32 values in bytes) and `features.json`,
which is written last. The unit of work is a contiguous part of a dataset. One process reads the images, computes the
features and writes the part, and returns only a receipt, so images and features do not pass through Ray's object store.
Finished parts are skipped when the job runs again.
"""

import contextlib
import copy
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from pipeline import logs, storage, workqueue
from pipeline.config import fingerprint, to_dict
from pipeline.data.loading.augment import Augment
from pipeline.errors import UserError, plural
from pipeline.training.config import EngineConfig
from pipeline.training.kernels import choose_kernels
from pipeline.transfer.backbones import build_model
from pipeline.transfer.finetune import Examples, Execution, pad_labels, read_examples
from pipeline.transfer.protocols import Head, Probe, Split

PART = re.compile(r"part-\d+-of-\d+\.parquet")
INDEX = "features.json"
RECEIPTS = "receipts"
PART_IMAGES = 4096  # images per unit of work; takes seconds on a GPU, so that all workers finish at about the same time

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureSet:
    """The features of one dataset, computed by one model at one resolution."""

    split: Split
    fingerprint: str
    """Fingerprint of the dataset and the weights."""
    rows: int
    view: Augment
    precision: str | None = None
    """fp32, bf16 or fp16 for the parameters and activations of the model. None: float32 parameters, on GPUs with matrix
    products in bfloat16."""

    @property
    def name(self) -> str:
        folder = "-".join(self.split.uri.rstrip("/").split("/")[-2:])
        about = [self.fingerprint, to_dict(self.view), self.precision, self.split.part]
        return f"{folder}-{self.view.size}-{fingerprint(about)}"

    def parts(self, workers: int) -> list["Part"]:
        """The units of work: at least two per worker, unless they would have fewer than 256 images."""
        n = max(1, -(-self.rows // PART_IMAGES), min(2 * workers, self.rows // 256))
        return [Part(self, i, n) for i in range(n)]


@dataclass(frozen=True, slots=True)
class Part:
    """The i-th of n contiguous parts of a feature set."""

    features: FeatureSet
    i: int
    n: int

    @property
    def file(self) -> str:
        return f"part-{self.i:05d}-of-{self.n:05d}.parquet"


def feature_set(split: Split, dataset: Any, checkpoint: str, probe: Probe) -> FeatureSet:
    """The feature set of a split. checkpoint: identity of the weights."""
    return FeatureSet(
        split=split,
        fingerprint=fingerprint([dataset.manifest.fingerprint, checkpoint]),
        rows=len(dataset),
        view=probe.view,
        precision=probe.precision if isinstance(probe, Head) else None,
    )


@torch.inference_mode()
def compute_features(
    model: Any, wanted: FeatureSet, execution: Execution, part: tuple[int, int] = (0, 1)
) -> tuple[list[str], np.ndarray, np.ndarray]:
    """(keys, labels (N,) or (N,M), features (N,D) float32) of one part. The model must have the image size and the
    precision of the set. Raises UserError if features are not finite."""
    autocast = execution.autocast() if wanted.precision is None else contextlib.nullcontext()
    keys: list[str] = []
    labels, features = [], []
    data = Examples(wanted.split.open(), wanted.split)
    batch_size = 4 * execution.micro_batch  # without gradients more images fit in memory
    for images, label, key in read_examples(
        data, wanted.view, batch_size=batch_size, threads=execution.threads, part=part
    ):
        with autocast:
            features.append(model.features(images.to(execution.device, non_blocking=True)).float().cpu())
        labels.append(label)
        keys += key
    found = torch.cat(features)
    if bad := int((~found.isfinite().all(1)).sum()):
        raise UserError(
            f"the features of {bad} of {plural(len(found), 'image')} are not finite: the model has diverged"
        )
    return keys, pad_labels(labels), found.numpy()


def precision_type(precision: str, device: str) -> torch.dtype:
    """The type of parameters and activations. fp16 is for GPUs; a CPU computes in float32."""
    if precision == "fp16":
        return torch.float16 if torch.device(device).type == "cuda" else torch.float32
    return torch.bfloat16 if precision == "bf16" else torch.float32


@dataclass(frozen=True, slots=True)
class ExtractionContext:
    """The inputs of every extraction process. `weights`: Ray reference to the arrays of the model."""

    model: dict[str, Any]
    weights: Any
    output: str
    micro_batch: int
    threads: int


class Extraction:
    """A worker of the queue, which keeps the model on its device and computes one part at a time."""

    def __init__(self, context: ExtractionContext) -> None:
        import ray

        torch.set_num_threads(context.threads)
        device = "cuda" if ray.get_gpu_ids() else "cpu"
        self.output = context.output
        self.execution = Execution(device=device, micro_batch=context.micro_batch, threads=context.threads)
        self.model: Any = build_model(context.model, ray.get(context.weights)).eval().to(device)
        self.lowered: tuple[str, Any] | None = None
        """(precision, a copy of the model in it) for sets with a precision."""

    def __call__(self, part: Part) -> dict[str, Any]:
        wanted = part.features
        try:
            model = self._model(wanted.precision)
            model.set_image_size(wanted.view.size)
            model.to(self.execution.device)
            found = compute_features(model, wanted, self.execution, (part.i, part.n))
            write_part(storage.join(self.output, wanted.name, part.file), *found)
        except UserError:
            raise
        except Exception as error:  # one broken dataset must not stop the others
            raise UserError(f"{type(error).__name__}: {error}") from error
        return {"rows": len(found[0])}

    def _model(self, precision: str | None) -> Any:
        if precision is None:
            return self.model
        if self.lowered is None or self.lowered[0] != precision:
            model = copy.deepcopy(self.model)
            choose_kernels(model, EngineConfig(), torch.device(self.execution.device))
            self.lowered = precision, model.to(precision_type(precision, self.execution.device))
        return self.lowered[1]


def extract_features(
    sets: Sequence[FeatureSet], context: ExtractionContext, *, workers: int, num_cpus: float, num_gpus: float
) -> dict[FeatureSet, str]:
    """Computes the missing parts of the feature sets with `workers` processes, each with `num_cpus` and `num_gpus`.
    Needs Ray.

    Returns {set: error} for the sets that could not be computed.
    """
    folders = {wanted: storage.join(context.output, wanted.name) for wanted in sets}
    missing = [wanted for wanted in folders if not storage.exists(storage.join(folders[wanted], INDEX))]
    parts = {_receipt_name(part): part for wanted in missing for part in wanted.parts(workers)}
    receipts = workqueue.Receipts(storage.join(context.output, RECEIPTS))
    errors: dict[FeatureSet, str] = {}
    left = parts.keys() - receipts.finished() if parts else set()
    if left:
        images = sum(parts[name].features.rows / parts[name].n for name in left)
        # the share of the features in the time of their suite is unknown
        with logs.part_of_job(0.0, 0.0), logs.Progress("features", total=images) as progress:
            for outcome in workqueue.run(
                parts,
                Extraction,
                receipts=receipts,
                context=context,
                workers=workers,
                num_cpus=num_cpus,
                num_gpus=num_gpus,
            ):
                part = parts[outcome.name]
                if outcome.error is not None:
                    errors[part.features] = str(outcome.error)
                progress.advance(
                    part.features.rows / part.n, f"{images:.0f} images of {plural(len(missing), 'dataset')}"
                )
    for wanted in missing:
        if wanted not in errors:
            names = [part.file for part in wanted.parts(workers)]
            about = {"dataset": wanted.split.uri, "resolution": wanted.view.size, "parts": names}
            storage.write_json(storage.join(folders[wanted], INDEX), about)
    return errors


def _receipt_name(part: Part) -> str:
    return f"{part.features.name}.{part.file}"


def write_part(uri: str, keys: list[str], labels: np.ndarray, features_ND: np.ndarray) -> None:
    labels = labels[:, None] if labels.ndim == 1 else labels
    width = 4 * features_ND.shape[1]
    values = pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(width), len(keys), [None, pa.py_buffer(np.ascontiguousarray(features_ND, np.float32))]
    )
    lists = pa.FixedSizeListArray.from_arrays(pa.array(labels.reshape(-1), pa.int64()), labels.shape[1])
    sink = pa.BufferOutputStream()
    table = pa.table({"key": pa.array(keys, pa.string()), "labels": lists, "feature": values})
    pq.write_table(table, sink, compression="none", use_dictionary=False, write_page_checksum=True)
    storage.write_bytes(uri, sink.getvalue().to_pybytes())


def load_features(folder: str) -> tuple[list[str], np.ndarray, torch.Tensor]:
    """(keys, labels (N,) or (N,M), features (N,D) float32) of a finished feature set.

    Raises UserError for a missing or damaged part, and removes its receipt so that the next run computes it again.
    """
    keys: list[str] = []
    labels, features = [], []
    for table in _read_parts(folder):
        keys += table["key"].to_pylist()
        column = table["labels"].combine_chunks()
        labels.append(torch.from_numpy(column.flatten().to_numpy().reshape(len(table), -1).copy()))
        values = table["feature"].combine_chunks()
        with contextlib.suppress(AttributeError):  # a chunked column with one chunk
            values = values.chunk(0)
        features.append(np.frombuffer(values.buffers()[1], np.float32).reshape(len(table), -1))
    merged = pad_labels(labels)
    return keys, merged[:, 0] if merged.shape[1] == 1 else merged, torch.from_numpy(np.concatenate(features).copy())


def _read_parts(folder: str) -> Iterator[pa.Table]:
    """The non-empty parts, in dataset order."""
    index = storage.join(folder, INDEX)
    root, _, name = folder.rpartition("/")
    parts = storage.read_record(index, ["parts"])["parts"]
    if not isinstance(parts, list) or not all(isinstance(file, str) and PART.fullmatch(file) for file in parts):
        raise UserError(f"{index}: not the index of a feature set; remove it, and the features are computed again")
    for file in parts:
        uri = storage.join(folder, file)
        try:
            table = pq.read_table(pa.BufferReader(storage.read_bytes(uri)), page_checksum_verification=True)
        except (OSError, pa.ArrowException) as error:
            for gone in (index, uri, workqueue.Receipts(storage.join(root, RECEIPTS)).uri(f"{name}.{file}")):
                storage.remove(gone)
            raise UserError(f"{uri}: missing or damaged ({error}); run the command again to recompute it") from error
        if len(table):
            yield table
