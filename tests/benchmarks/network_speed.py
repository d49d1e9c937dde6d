"""Speed of the loader over a network, compared with its speed on a local disk and with other loaders on the same network.

    python tests/benchmarks/network_speed.py --latency 20 50 200                     this loader
    python tests/benchmarks/network_speed.py --peers .venv-bench                     and four others (see loader_speed.py)

The store (tests/slowstore.py) speaks S3 and HTTP on loopback, waits before each answer, and sends 100 MB/s over all
connections. Corpus, function, batches and consumer are those of loader_speed.py. Each run is a process of its own that reads at
most one epoch, because some tools keep what they have read on the local disk. `of_local` is the rate over the same tool's rate on the local disk in the
same turn. `first_batch_s` is the time from the construction of the loader to its first batch.
"""

import argparse
import importlib
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402

from tests.benchmarks import loader_speed  # noqa: E402
from tests.benchmarks.loader_tools import AUGMENT, BATCH, THREADS, decode_row, decode_rows, one, torch_loader  # noqa: E402
from tests.slowstore import slow_store  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "network_speed.json"
LOCAL = "local"
WORKERS = 2  # processes of the peers: the best of 1 to 3 in loader_speed.py on two cores
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "us-east-1"}


# ---------------------------------------------------------------- the tools: (work, address of the store or "local")


def ours(work: Path, store: str) -> Iterator[np.ndarray]:
    from pipeline.data import Loader, open_dataset

    uri = work / "bucket" / "shards" if store == LOCAL else "s3://bucket/shards"
    with Loader(open_dataset(uri), batch_size=BATCH, threads=THREADS, augment=AUGMENT) as loader:
        while True:
            for batch in loader:
                yield batch["image"].numpy()


def webdataset(work: Path, store: str) -> Iterator[np.ndarray]:
    import webdataset as wds

    names = sorted(path.name for path in (work / "bucket" / "tar").iterdir())
    folder = work / "bucket" / "tar" if store == LOCAL else f"pipe:curl -sf {store}/bucket/tar"
    pipeline = wds.WebDataset([f"{folder}/{name}" for name in names], shardshuffle=len(names), empty_check=False)
    return torch_loader(pipeline.shuffle(1000).map(decode_row), WORKERS)


def mosaicml_streaming(work: Path, store: str) -> Iterator[np.ndarray]:
    from pipeline.libraries import load_torchvision

    load_torchvision()  # streaming imports torchvision
    from streaming import StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    clean_stale_shared_memory()  # of the run before, which ended without cleaning up

    class Rows(StreamingDataset):
        def __getitem__(self, i: int) -> np.ndarray:
            return one(super().__getitem__(i)["image"])

    where = {"local": str(work / "bucket" / "mds")}
    if store != LOCAL:
        os.environ["S3_ENDPOINT_URL"] = store
        where = {"local": tempfile.mkdtemp(dir=work), "remote": "s3://bucket/mds"}
    workers = (
        WORKERS if store == LOCAL else 0
    )  # with two, one reads shards that the other is still downloading (0.13.0)
    return torch_loader(Rows(**where, shuffle=True, batch_size=BATCH), workers)


def litdata(work: Path, store: str) -> Iterator[np.ndarray]:
    import torch
    from litdata import StreamingDataLoader, StreamingDataset
    from litdata.streaming import downloader

    downloader._OBSTORE_CLIENT_OPTIONS["allow_http"] = True  # it has no setting for a store without TLS

    class Rows(StreamingDataset):
        def __getitem__(self, i: int) -> np.ndarray:
            return one(super().__getitem__(i))

    options = {"input_dir": str(work / "bucket" / "litdata")}
    if store != LOCAL:
        keys = {"aws_access_key_id": "a", "aws_secret_access_key": "b", "region_name": "us-east-1"}
        options = {"input_dir": "s3://bucket/litdata", "storage_options": {"endpoint_url": store, **keys}}
        options["cache_dir"] = tempfile.mkdtemp(dir=work)
    torch.set_num_threads(1)
    rows = Rows(**options, shuffle=True, drop_last=True)
    for batch in StreamingDataLoader(rows, batch_size=BATCH, num_workers=WORKERS, drop_last=True):
        yield batch.numpy()


def hf_streaming(work: Path, store: str) -> Iterator[np.ndarray]:
    import datasets

    names = sorted(path.name for path in (work / "bucket" / "shards").glob("part-*.parquet"))
    folder = work / "bucket" / "shards" if store == LOCAL else f"{store}/bucket/shards"
    files = [f"{folder}/{name}" for name in names]
    rows = datasets.load_dataset("parquet", data_files=files, split="train", streaming=True)
    rows = rows.select_columns(["image"]).shuffle(seed=0, buffer_size=1000).map(decode_rows, batched=True)
    return torch_loader(rows, min(WORKERS, len(names)))


TOOLS = {tool.__name__: tool for tool in (ours, webdataset, mosaicml_streaming, litdata, hf_streaming)}
MODULES = {"ours": "pipeline.data.loading.loader", "webdataset": "webdataset", "hf_streaming": "datasets"}


# ---------------------------------------------------------------- measuring


def measure(tool: str, work: Path, store: str, count: int, seconds: float) -> dict:
    """One run of one tool, in a process of its own."""
    if store != LOCAL:
        os.environ |= {"AWS_ENDPOINT_URL": store, **CREDENTIALS}
    importlib.import_module(MODULES.get(tool, "torch"))
    begin = time.perf_counter()
    batches = TOOLS[tool](work, store)
    len(next(batches))
    first, images = time.perf_counter() - begin, 0
    start, cpu = time.perf_counter(), loader_speed.cpu_seconds()
    while time.perf_counter() - start < seconds and images + 2 * BATCH <= count:
        batch = next(batches, None)
        if batch is None:  # the end of the epoch
            break
        assert batch.dtype == np.uint8
        images += len(batch)
    wall, cpu = time.perf_counter() - start, loader_speed.cpu_seconds() - cpu
    return {
        "first_batch_s": round(first, 2),
        "img_s": round(images / wall),
        "cpu_ms": round(cpu / images * 1e3, 3),
        "images": images,
    }


def pack_for_peers(work: Path) -> None:
    """The same images in the formats of MosaicML and litdata. Runs in the environment of the peers."""
    from pipeline.libraries import load_torchvision

    load_torchvision()
    from litdata.streaming.writer import BinaryWriter
    from streaming import MDSWriter

    files = sorted((work / "files").iterdir())
    with MDSWriter(out=str(work / "bucket" / "mds"), columns={"image": "bytes", "label": "int"}) as mds:
        for i, path in enumerate(files):
            mds.write({"image": path.read_bytes(), "label": i % 1000})
    (work / "bucket" / "litdata").mkdir()
    chunks = BinaryWriter(str(work / "bucket" / "litdata"), chunk_bytes="64MB")
    for i, path in enumerate(files):
        chunks[i] = path.read_bytes()
    chunks.done()
    chunks.merge()


def child(python: str, *arguments: object) -> dict:
    return loader_speed.child(python, *arguments, script=__file__)


def benchmark(options: argparse.Namespace) -> dict:
    peers = str(Path(options.peers) / "bin" / "python") if options.peers else None
    tools = [tool for tool in TOOLS if tool == "ours" or peers]
    runs: dict[str, dict[str, list[dict]]] = {tool: {} for tool in tools}
    with tempfile.TemporaryDirectory(prefix="network-speed-") as folder:
        work = Path(folder)
        loader_speed.make_corpus(work, options.images, options.count)
        (work / "bucket").mkdir()
        for name in ("shards", "tar"):
            (work / name).rename(work / "bucket" / name)
        if peers:
            child(peers, "--pack", work)
        for _ in range(options.repeats):
            for latency in [None, *options.latency]:
                for tool in tools:
                    python = sys.executable if tool == "ours" else peers
                    with slow_store(work, (latency or 0) / 1e3, options.bandwidth * 1e6) as endpoint:
                        store = LOCAL if latency is None else endpoint
                        run = child(
                            python,
                            "--tool",
                            tool,
                            "--work",
                            work,
                            "--store",
                            store,
                            "--count",
                            options.count,
                            "--seconds",
                            options.seconds,
                        )
                    run["load"] = round(os.getloadavg()[0], 1)
                    name = LOCAL if latency is None else f"{latency:g} ms"
                    runs[tool].setdefault(name, []).append(run)
                    print(f"{tool:20} {name:8} {run}", flush=True)
    table: dict[str, dict[str, dict]] = {}
    for tool, places in runs.items():
        for name, tried in places.items():
            good = [run for run in tried if "error" not in run]
            row = {k: statistics.median(run[k] for run in good) for k in good[0]} if good else tried[0]
            local = table.get(tool, {}).get(LOCAL, row)
            if "img_s" in row and "img_s" in local:
                row["of_local"] = round(row["img_s"] / local["img_s"], 3)
            table.setdefault(tool, {})[name] = row
    return {
        "command": "python tests/benchmarks/network_speed.py " + " ".join(sys.argv[1:]),
        "date": time.strftime("%Y-%m-%d"),
        "host": {"cpu": loader_speed.cpu_model(), "cores": THREADS},
        "bandwidth_mb_s": options.bandwidth,
        "images": options.count,
        "table": table,
        "runs": runs,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--latency", type=float, nargs="+", default=[20, 50, 200], help="ms before each answer")
    parser.add_argument("--bandwidth", type=float, default=100, help="MB/s over all connections")
    parser.add_argument("--images", help="tar archive of photos to make the corpus of (default: synthetic pictures)")
    parser.add_argument("--count", type=int, default=32_768, help="images in the corpus")
    parser.add_argument("--seconds", type=float, default=10, help="length of each measurement, or one epoch")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--peers", help="virtual environment of the other loaders")
    parser.add_argument("--output", type=Path, default=RESULTS)
    for name in ("--tool", "--work", "--store", "--pack"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.pack:
        pack_for_peers(Path(options.pack))
        print("{}")
    elif options.tool:
        print(
            json.dumps(measure(options.tool, Path(options.work), options.store, options.count, options.seconds)),
            flush=True,
        )
        os._exit(0)  # loaders with threads of their own
    else:
        result = benchmark(options)
        options.output.write_text(json.dumps(result, indent=1) + "\n")
        for tool, places in result["table"].items():
            for name, row in places.items():
                print(f"{tool:20} {name:8} {row}")


if __name__ == "__main__":
    main()
