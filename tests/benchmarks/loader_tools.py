"""The loaders that loader_speed.py compares. Each function yields uint8 batches of BATCH images of SIZE pixels without end.

Each takes (work, workers): the folder of the corpus (`make_corpus` in loader_speed.py) and the number of worker processes.
"""

import random
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from pipeline.data.codecs import decode_stored  # noqa: E402
from pipeline.data.loading.augment import Augment  # noqa: E402
from pipeline.data.loading.transform import augment_image  # noqa: E402

BATCH, SIZE, THREADS = 256, 224, 2
AUGMENT = Augment(size=SIZE)


def one(data: bytes) -> np.ndarray:
    out = np.empty((SIZE, SIZE, 3), np.uint8)
    augment_image(AUGMENT, decode_stored(data), [random.random() for _ in range(5)], out)
    return out


def limit(work: Path, workers: int) -> Iterator[np.ndarray]:
    images = [path.read_bytes() for path in sorted((work / "files").iterdir())]
    buffers = [np.empty((BATCH, SIZE, SIZE, 3), np.uint8) for _ in range(4)]
    generator = np.random.default_rng(0)

    def fill(buffer: np.ndarray, chosen: np.ndarray, draws: list) -> None:
        for out, i, u in zip(buffer, chosen, draws, strict=True):
            augment_image(AUGMENT, decode_stored(images[i]), u, out)

    with ThreadPoolExecutor(THREADS) as pool:
        queue, step = [], 0
        while True:
            while len(queue) < 3:
                buffer, chosen = buffers[step % 4], generator.integers(0, len(images), BATCH)
                draws = generator.random((BATCH, 5)).tolist()
                parts = [slice(i, i + 32) for i in range(0, BATCH, 32)]
                queue.append((buffer, [pool.submit(fill, buffer[p], chosen[p], draws[p]) for p in parts]))
                step += 1
            buffer, tasks = queue.pop(0)
            for task in tasks:
                task.result()
            yield buffer


def ours(work: Path, workers: int) -> Iterator[np.ndarray]:
    from pipeline.data import Loader, open_dataset

    with Loader(open_dataset(work / "shards"), batch_size=BATCH, threads=THREADS, augment=AUGMENT) as loader:
        while True:
            for batch in loader:
                yield batch["image"].numpy()


def ours_processes(work: Path, workers: int) -> Iterator[np.ndarray]:
    from pipeline.data import open_dataset
    from pipeline.data.loading.processes import ProcessLoader

    options = {"batch_size": BATCH, "threads": THREADS, "augment": AUGMENT}
    with ProcessLoader(open_dataset(work / "shards"), processes=THREADS, **options) as loader:
        while True:
            for batch in loader:
                yield batch["image"].numpy()


class _Files:
    """A map-style dataset for torch's DataLoader."""

    def __init__(self, work: Path) -> None:
        self.paths = sorted((work / "files").iterdir())

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> np.ndarray:
        return one(self.paths[i].read_bytes())


def torch_loader(dataset: object, workers: int, **options: object) -> Iterator[np.ndarray]:
    import torch
    from torch.utils.data import DataLoader

    torch.set_num_threads(1)
    loader = DataLoader(dataset, BATCH, num_workers=workers, persistent_workers=workers > 0, drop_last=True, **options)
    while True:
        for batch in loader:
            yield (batch["image"] if isinstance(batch, dict) else batch).numpy()


def torch_dataloader(work: Path, workers: int) -> Iterator[np.ndarray]:
    return torch_loader(_Files(work), workers, shuffle=True)


def decode_row(row: dict) -> np.ndarray:
    return one(row["jpg"])


def webdataset(work: Path, workers: int) -> Iterator[np.ndarray]:
    import webdataset as wds

    shards = sorted(str(path) for path in (work / "tar").iterdir())
    pipeline = wds.WebDataset(shards, shardshuffle=len(shards), empty_check=False).shuffle(1000).map(decode_row)
    return torch_loader(pipeline, workers)


def mosaicml_streaming(work: Path, workers: int) -> Iterator[np.ndarray]:
    import torch

    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        # With a CPU build of torch, its CUDA wheel lacks these two operators, which are not used here.
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    from streaming import MDSWriter, StreamingDataset

    class Rows(StreamingDataset):
        def __getitem__(self, i: int) -> np.ndarray:
            return one(super().__getitem__(i)["image"])

    if not (work / "mds").exists():
        with MDSWriter(out=str(work / "mds"), columns={"image": "bytes", "label": "int"}) as writer:
            for i, path in enumerate(sorted((work / "files").iterdir())):
                writer.write({"image": path.read_bytes(), "label": i % 1000})
    return torch_loader(Rows(local=str(work / "mds"), shuffle=True, batch_size=BATCH), workers)


def decode_rows(rows: dict) -> dict:
    return {"image": [one(data) for data in rows["image"]]}


def hf_datasets(work: Path, workers: int) -> Iterator[np.ndarray]:
    import datasets

    files = [str(path) for path in sorted((work / "shards").glob("part-*.parquet"))]
    table = datasets.load_dataset("parquet", data_files=files, cache_dir=str(work / "hf"), split="train")
    return torch_loader(table.select_columns(["image"]).with_transform(decode_rows), workers, shuffle=True)


def litdata(work: Path, workers: int) -> Iterator[np.ndarray]:
    """Litdata: optimized chunks, StreamingDataset and StreamingDataLoader."""
    import torch
    from litdata import StreamingDataLoader, StreamingDataset
    from litdata.streaming.writer import BinaryWriter

    class Rows(StreamingDataset):
        def __getitem__(self, i: int) -> np.ndarray:
            return one(super().__getitem__(i))

    if not (work / "litdata").exists():
        (work / "litdata").mkdir()
        writer = BinaryWriter(str(work / "litdata"), chunk_bytes="64MB")
        for i, path in enumerate(sorted((work / "files").iterdir())):
            writer[i] = path.read_bytes()
        writer.done()
        writer.merge()
    torch.set_num_threads(1)
    rows = Rows(str(work / "litdata"), shuffle=True, drop_last=True)
    loader = StreamingDataLoader(rows, batch_size=BATCH, num_workers=workers, drop_last=True)
    while True:
        for batch in loader:
            yield batch.numpy()


def grain(work: Path, workers: int) -> Iterator[np.ndarray]:
    """A MapDataset over files, shuffled, decoded and batched; with workers, its mp_prefetch."""
    import grain.python as pygrain

    rows = pygrain.MapDataset.source(_Files(work)).shuffle(seed=0).repeat().batch(BATCH, drop_remainder=True)
    if not workers:
        yield from rows.to_iter_dataset(pygrain.ReadOptions(num_threads=THREADS, prefetch_buffer_size=4))
    once = rows.to_iter_dataset(pygrain.ReadOptions(num_threads=1, prefetch_buffer_size=2))
    yield from once.mp_prefetch(pygrain.MultiprocessingOptions(num_workers=workers))


def spdl(work: Path, workers: int) -> Iterator[np.ndarray]:
    """Its pipeline of threads with the same function; batches are stacked in one more thread."""
    from spdl.pipeline import PipelineBuilder

    paths = sorted((work / "files").iterdir())

    def shuffled() -> Iterator[Path]:
        generator = np.random.default_rng(0)
        while True:
            yield from (paths[i] for i in generator.permutation(len(paths)))

    builder = PipelineBuilder().add_source(shuffled()).pipe(lambda path: one(path.read_bytes()), concurrency=THREADS)
    pipeline = builder.aggregate(BATCH).pipe(np.stack).add_sink(3).build(num_threads=THREADS + 1)
    with pipeline.auto_stop():
        yield from pipeline


def _ray_rows(rows: dict) -> dict:
    return {"image": np.stack([one(data) for data in rows["image"]])}


def ray_data(work: Path, workers: int) -> Iterator[np.ndarray]:
    """Stock Ray Data: read_parquet, map_batches with the fast function, iter_batches; default settings, two CPUs."""
    import ray

    ray.init(address="local", num_cpus=THREADS, include_dashboard=False, logging_level="error", log_to_driver=False,
             runtime_env={"env_vars": {"PYTHONPATH": f"{ROOT}:{Path(__file__).parent}"}})  # fmt: skip
    ray.data.DataContext.get_current().enable_progress_bars = False
    rows = ray.data.read_parquet([str(p) for p in sorted((work / "shards").glob("part-*.parquet"))], columns=["image"])
    rows = rows.map_batches(_ray_rows, batch_size=64)
    while True:
        for batch in rows.iter_batches(batch_size=BATCH, drop_last=True, local_shuffle_buffer_size=2 * BATCH):
            yield batch["image"]


def patches_copy(work: Path, workers: int) -> Iterator[np.ndarray]:
    """The limit for patches: rows of memory-mapped files copied into batches by one thread, in order."""
    from pipeline.data import open_dataset

    dataset = open_dataset(work / "patches")
    groups = [dataset.read_row_group(i).images for i in range(len(dataset.row_groups))]
    buffers, step, row = [np.empty((BATCH, 196, 768), np.uint8) for _ in range(4)], 0, 0
    while True:
        for group in groups:
            for patches in group:
                buffers[step % 4][row] = patches
                row += 1
                if row == BATCH:
                    yield buffers[step % 4]
                    step, row = step + 1, 0


def patches_ours(work: Path, workers: int) -> Iterator[np.ndarray]:
    from pipeline.data import Loader, open_dataset

    with Loader(open_dataset(work / "patches"), batch_size=BATCH, threads=1) as loader:
        while True:
            for batch in loader:
                yield batch["patches"].numpy()


TOOLS = [
    limit,
    ours,
    ours_processes,
    torch_dataloader,
    ray_data,
    webdataset,
    mosaicml_streaming,
    hf_datasets,
    litdata,
    grain,
    spdl,
    patches_copy,
    patches_ours,
]
SWEEP = {"torch_dataloader", "webdataset", "mosaicml_streaming", "hf_datasets", "litdata", "grain"}
PEERS = {"webdataset", "mosaicml_streaming", "hf_datasets", "litdata", "grain", "spdl"}
MODULES = {"ours": "pipeline.data.loading.loader", "ray_data": "ray.data", "webdataset": "webdataset"}
MODULES |= {"hf_datasets": "datasets", "patches_ours": "pipeline.data.loading.loader"}
