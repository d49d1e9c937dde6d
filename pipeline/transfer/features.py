"""Features of frozen models: computed once, by Ray Data batch inference, kept as shards, read by every probe.

A feature set is a folder of `part-*.parquet` (key, labels, feature as D float32 bytes) and `features.json`, written last.
The unit of work is a contiguous part of a dataset: the process that gets it reads, computes and writes it, and only a
receipt goes back, so that neither images nor features pass through Ray's object store. A finished part is not done again.
"""

import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from pipeline import storage
from pipeline.config import fingerprint
from pipeline.data.loading.augment import Augment
from pipeline.errors import UserError
from pipeline.transfer.finetune import examples, padded
from pipeline.transfer.suites import Probe, Split

INDEX = "features.json"
PART_IMAGES = 4096  # images per unit of work: seconds on a GPU, so that the last units end together


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureSet:
    """One dataset seen by one model at one size."""

    split: Split
    fingerprint: str  # of dataset and weights
    rows: int
    resolution: int
    resize: int

    @property
    def name(self) -> str:
        folder = "-".join(self.split.uri.rstrip("/").split("/")[-2:])
        return f"{folder}-{self.resolution}-{fingerprint([self.fingerprint, self.resize, self.split.part])}"

    def parts(self, workers: int) -> int:
        """A function of the size and the number of workers; at least two units each, unless that makes them tiny."""
        return max(1, -(-self.rows // PART_IMAGES), min(2 * workers, self.rows // 256))


def feature_set(split: Split, dataset: Any, checkpoint: str, probe: Probe) -> FeatureSet:
    return FeatureSet(
        split=split,
        fingerprint=fingerprint([dataset.manifest.fingerprint, checkpoint]),
        rows=len(dataset),
        resolution=probe.resolution,
        resize=probe.resize,
    )


@torch.inference_mode()
def compute(
    model: Any,
    wanted: FeatureSet,
    *,
    device: torch.device | str,
    batch_size: int,
    threads: int = 1,
    part: tuple[int, int] = (0, 1),
) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Keys, labels (N,) or (N,M), and features (N,D) float32 of one part; the model must be set to the resolution."""
    crop = Augment(size=wanted.resolution, crop="center", resize=max(wanted.resize, wanted.resolution), squash=True)
    device = torch.device(device)
    keys: list[str] = []
    labels, features = [], []
    dataset = wanted.split.open()
    for images, label, key in examples(dataset, wanted.split, crop, batch_size=batch_size, threads=threads, part=part):
        with torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda"):
            features.append(model.features(images.to(device, non_blocking=True)).float().cpu())
        labels.append(label)
        keys += key
    return keys, padded(labels), torch.cat(features).numpy()


class Extractor:
    """A Ray Data actor: keeps the model on its device, turns units into part files."""

    def __init__(
        self,
        config: dict[str, Any],
        weights: list[Any],
        sets: list[FeatureSet],
        output: str,
        batch_size: int,
        threads: int,
    ) -> None:
        import ray

        from pipeline.transfer.fanout import build_model

        torch.set_num_threads(threads)
        self.device = "cuda" if ray.get_gpu_ids() else "cpu"
        self.model: Any = build_model(config, ray.get(weights[0])).eval().to(self.device)
        self.sets, self.output, self.batch_size, self.threads = sets, output, batch_size, threads

    def __call__(self, unit: dict[str, Any]) -> dict[str, Any]:
        wanted = self.sets[unit["set"]]
        try:
            self.model.set_image_size(wanted.resolution)
            self.model.to(self.device)
            keys, labels, features = compute(
                self.model,
                wanted,
                device=self.device,
                batch_size=self.batch_size,
                threads=self.threads,
                part=(int(unit["part"]), int(unit["parts"])),
            )
            write_part(storage.join(self.output, wanted.name, unit["file"]), keys, labels, features)
        except Exception as error:  # one broken dataset must not end the others
            return {"set": unit["set"], "rows": 0, "error": f"{type(error).__name__}: {error}"}
        return {"set": unit["set"], "rows": len(keys), "error": ""}


def extract(
    sets: Sequence[FeatureSet],
    model_config: dict[str, Any],
    weights: Any,
    output: str,
    *,
    workers: int,
    resources: dict[str, float],
    batch_size: int,
    say: Callable[[str], None],
) -> dict[FeatureSet, str]:
    """Computes the feature sets that are not there yet. Needs Ray.

    weights: Ray reference to the state dict, as NumPy arrays. resources: num_cpus and num_gpus of one worker.
    Returns {set: error} of those that could not be computed.
    """
    units, files = [], {}
    for i, wanted in enumerate(sets):
        folder = storage.join(output, wanted.name)
        if storage.exists(storage.join(folder, INDEX)):
            continue
        n = wanted.parts(workers)
        files[wanted] = [f"part-{part:05d}-of-{n:05d}.parquet" for part in range(n)]
        present = {file.path for file in storage.list_files(folder)}
        missing = [(part, name) for part, name in enumerate(files[wanted]) if name not in present]
        units += [{"set": i, "part": part, "parts": n, "file": name} for part, name in missing]
    start, errors, rows = time.perf_counter(), {}, 0
    spoken = start
    if units:
        # A list, because Ray would replace a bare reference among the arguments by one copy of the value per actor.
        arguments: dict[str, Any] = {"config": model_config, "weights": [weights], "sets": list(sets), "output": output}
        arguments |= {"batch_size": batch_size, "threads": int(resources["num_cpus"])}
        for done, receipt in enumerate(_run(units, arguments, min(workers, len(units)), resources), 1):
            rows += receipt["rows"]
            if time.perf_counter() - spoken > 30:
                spoken = time.perf_counter()
                say(f"features: {rows} images, {done} of {len(units)} parts in {spoken - start:.0f} s")
            if receipt["error"]:
                errors[sets[receipt["set"]]] = receipt["error"]
    for wanted, names in files.items():
        if wanted not in errors:
            about = {"dataset": wanted.split.uri, "resolution": wanted.resolution, "parts": names}
            storage.write_json(storage.join(output, wanted.name, INDEX), about)
    if units:
        seconds = time.perf_counter() - start
        say(f"features: {rows} images of {len(files)} datasets in {seconds:.1f} s, start of the processes included")
    return errors


def _run(
    units: list[dict[str, Any]], arguments: dict[str, Any], workers: int, resources: dict[str, float]
) -> Iterable[dict[str, Any]]:
    import ray.data

    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # its notes on progress bars and timings, in place of ours
    extractor: Any = Extractor
    options: dict[str, Any] = dict(resources)
    done = ray.data.from_items(units, override_num_blocks=len(units)).map(
        extractor,
        fn_constructor_kwargs=arguments,
        compute=ray.data.ActorPoolStrategy(size=workers),
        **options,
    )
    return done.iter_rows()


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


def load(folder: str) -> tuple[list[str], np.ndarray, torch.Tensor]:
    """Keys, labels (N,) or (N,M), and features (N,D) float32 of a finished feature set.

    Raises UserError for a part that is gone or damaged, and removes it: the next run computes it again.
    """
    keys: list[str] = []
    labels, features = [], []
    index = storage.join(folder, INDEX)
    for name in storage.read_json(index)["parts"]:
        uri = storage.join(folder, name)
        try:
            table = pq.read_table(pa.BufferReader(storage.read_bytes(uri)), page_checksum_verification=True)
        except (OSError, pa.ArrowException) as error:
            storage.remove(index)
            storage.remove(uri)
            raise UserError(f"{uri}: missing or damaged ({error}); run the command again to compute it anew") from error
        if not len(table):
            continue
        keys += table["key"].to_pylist()
        column = table["labels"].combine_chunks()
        labels.append(torch.from_numpy(column.flatten().to_numpy().reshape(len(table), -1).copy()))
        values = table["feature"].combine_chunks()
        with contextlib.suppress(AttributeError):  # a chunked column of one chunk
            values = values.chunk(0)
        features.append(np.frombuffer(values.buffers()[1], np.float32).reshape(len(table), -1))
    merged = padded(labels)
    return keys, merged[:, 0] if merged.shape[1] == 1 else merged, torch.from_numpy(np.concatenate(features).copy())
