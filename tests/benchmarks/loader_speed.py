"""Speed of the loader compared with its limit and with other loaders: same bytes, same function, same batches.

    python tests/benchmarks/loader_speed.py                          # limit, this loader, torch DataLoader, Ray Data, patches, plan
    python tests/benchmarks/loader_speed.py --images photos.tar      # with real photos instead of synthetic ones
    python tests/benchmarks/loader_speed.py --peers .venv-bench      # and seven other loaders

`--peers` names a virtual environment for the loaders whose requirements contradict ours (mosaicml-streaming: numpy < 2.2):
    python -m venv .venv-bench && .venv-bench/bin/pip install "numpy<2.2" mosaicml-streaming webdataset datasets litdata grain spdl simplejpeg \
        opencv-python-headless psutil pillow torch

Protocol. One corpus of JPEGs (shorter side 256, quality 90, 4:2:0), packed for every tool without touching a byte. Every tool
calls the same function (simplejpeg decode, inception crop to 224 with OpenCV bilinear, flip) and yields uint8 batches of 256
to the same consumer, which reads a byte of each image. Each run is a process of its own, pinned to two cores, data in the page
cache and its modules imported, and starts counting after its first batch. Tools take turns; the table shows medians. `cpu_ms` is CPU time per image over the process tree
(steadier than wall-clock time on a machine with other work); `of_limit` is the limit's cpu_ms over the tool's. The limit is
two threads over bytes in memory. The number of workers of each peer is the best of 0 to 3, or its own default where it has none.
"""

import argparse
import contextlib
import importlib
import io
import json
import os
import platform
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import cv2  # noqa: E402
import numpy as np  # noqa: E402

from pipeline.data.codecs import decode_stored  # noqa: E402
from tests.benchmarks.loader_tools import BATCH, MODULES, PEERS, SWEEP, THREADS, TOOLS  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "loader_speed.json"


# ---------------------------------------------------------------- the corpus


def photos(source: str | None) -> Iterator[np.ndarray]:
    """Decoded pictures: the JPEGs of a tar archive, or synthetic ones with a photo's 1/f spectrum."""
    if source:
        with tarfile.open(source) as archive:
            for member in archive:
                if member.isfile() and member.name.lower().endswith((".jpg", ".jpeg")):
                    yield decode_stored(archive.extractfile(member).read()).copy()
        return
    generator = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(384)[:, None], np.fft.rfftfreq(512)[None])
    frequency[0, 0] = 1
    for _ in range(64):
        noise = np.fft.rfft2(generator.standard_normal((3, 384, 512)))
        image = np.fft.irfft2(noise / frequency**1.1).transpose(1, 2, 0)
        image = (image - image.mean()) / image.std() * 55 + 120
        yield image.clip(0, 255).astype(np.uint8)


def make_corpus(work: Path, source: str | None, count: int) -> None:
    """The same JPEG bytes as files, tar shards and our shards."""
    import simplejpeg

    from pipeline.data.format import write_dataset

    generator, pictures = np.random.default_rng(0), list(photos(source))
    rows = []
    for i in range(count):
        image = pictures[i % len(pictures)]
        height, width = image.shape[:2]
        keep = generator.uniform(0.8, 1)
        top, left = (int(generator.random() * side * (1 - keep)) for side in (height, width))
        image = np.ascontiguousarray(image[top : top + int(height * keep), left : left + int(width * keep)])
        scale = 256 / min(image.shape[:2])
        height, width = (max(256, round(side * scale)) for side in image.shape[:2])
        image = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
        data = simplejpeg.encode_jpeg(image, 90, "RGB", "420")
        rows.append((f"{i:06d}", data, i % 1000, width, height))
    write_dataset(str(work / "shards"), rows, classes=[str(i) for i in range(1000)])
    (work / "files").mkdir()
    for key, data, *_ in rows:
        (work / "files" / f"{key}.jpg").write_bytes(data)
    (work / "tar").mkdir()
    for shard in range(0, count, 1024):
        with tarfile.open(work / "tar" / f"{shard:06d}.tar", "w") as archive:
            for key, data, label, *_ in rows[shard : shard + 1024]:
                for suffix, content in (("jpg", data), ("cls", str(label).encode())):
                    info = tarfile.TarInfo(f"{key}.{suffix}")
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))


def make_patches(work: Path, count: int) -> None:
    """A dataset of random patches."""
    from pipeline.data.format import write_dataset

    patches = np.random.default_rng(0).integers(0, 256, (64, 196, 768), dtype=np.uint8)
    image = {"height": 224, "width": 224, "patch_size": 16, "channels": 3}
    packed = ((f"{i:06d}", patches[i % 64], i % 1000, 224, 224) for i in range(count))
    classes = [str(i) for i in range(1000)]
    write_dataset(str(work / "patches"), packed, classes=classes, encoding="patches", image=image)


# ---------------------------------------------------------------- measuring


def cpu_seconds() -> float:
    """CPU time of this process, its descendants, and those of them that have ended and been waited for."""
    import psutil

    me = psutil.Process()
    total = 0.0
    for process in [me, *me.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            total += sum(process.cpu_times()[:4])  # user, system, and both of children that ended
    return total


def measure(tool: str, work: Path, workers: int, seconds: float) -> dict:
    """Runs in a process of its own: one tool, one worker count."""
    cv2.setNumThreads(1)
    importlib.import_module(MODULES.get(tool, "torch"))  # a warm process: the first batch counts without imports
    make = next(t for t in TOOLS if t.__name__ == tool)
    begin = time.perf_counter()
    batches = make(work, workers)
    touch = 0

    def consume() -> int:
        nonlocal touch
        batch = next(batches)
        assert batch.dtype == np.uint8, batch.dtype
        touch += int(batch.reshape(len(batch), -1)[:, 0].sum())
        return len(batch)

    consume()
    first, images = time.perf_counter() - begin, 0
    start, cpu = time.perf_counter(), cpu_seconds()
    while time.perf_counter() - start < seconds or (images < 8 * BATCH and time.perf_counter() - start < 4 * seconds):
        images += consume()
    wall, cpu = time.perf_counter() - start, cpu_seconds() - cpu
    return {
        "cpu_ms": round(cpu / images * 1e3, 4),
        "img_s": round(images / wall),
        "first_batch_s": round(first, 2),
        "images": images,
    }


def plan(manifest: str) -> dict:
    """Opens a dataset, plans an epoch of it and resumes in its middle, as rank 0 of 8: CPU time, and the memory that it adds."""
    import psutil

    import pipeline.data.loading.loader  # noqa: F401 - its imports are no part of the plan
    from pipeline.data.format import Dataset, Manifest
    from pipeline.data.loading.order import Order

    before, start = psutil.Process().memory_info().rss, time.process_time()
    dataset = Dataset(str(Path(manifest).parent), Manifest.from_json(Path(manifest).read_bytes()))
    opened = time.process_time()
    order = Order(dataset.row_groups["rows"], seed=0, epoch=7, batch_size=4096, lanes=64, shuffle_window=16_384)
    reads = order.reads(range(8))
    order.locate(order.batch(order.steps // 2, range(8)))
    planned = time.process_time()
    return {
        "images": len(dataset),
        "row_groups": len(dataset.row_groups),
        "reads": len(reads),
        "open_cpu_s": round(opened - start, 2),
        "plan_and_resume_cpu_s": round(planned - opened, 3),
        "memory_mb": round((psutil.Process().memory_info().rss - before) / 1e6),
    }


def simulated_manifest(folder: str) -> str:
    """303 million images in 10,000 shards of 30 row groups."""
    from pipeline.data.format import Manifest, Shard

    rows, size = 1010, 24 << 20
    groups = [[rows, 4 + g * size, 40_000 + g * size, (g + 1) * size, 7] for g in range(30)]
    shards = [
        Shard(name=f"part-{i:05d}-0000.parquet", rows=30 * rows, bytes=30 * size, sha256="0" * 64, row_groups=groups)
        for i in range(10_000)
    ]
    total = 30 * rows * 10_000
    manifest = Manifest(encoding="jpeg", image={}, rows=total, inputs=total, fingerprint="0", shards=shards)
    path = Path(folder) / "manifest.json"
    path.write_text(manifest.to_json())
    return str(path)


def child(python: str, *arguments: object, script: str = __file__, timeout: float = 300) -> dict:
    """Runs a script with `arguments` on two cores; its last line of output is JSON."""
    cores = sorted(os.sched_getaffinity(0))[:THREADS]
    command = ["taskset", "-c", ",".join(map(str, cores)), python, script, *map(str, arguments)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return {"error": f"no result within {timeout:.0f} s"}
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["?"])[-1][:300]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def versions(python: str) -> dict:
    names = ["numpy", "opencv-python-headless", "simplejpeg", "torch", "ray", "pyarrow"]
    names += ["webdataset", "mosaicml-streaming", "datasets", "litdata", "grain", "spdl"]
    code = (
        "import importlib.metadata as m, json\nv = {}\n"
        f"for n in {names}:\n  try: v[n] = m.version(n)\n  except m.PackageNotFoundError: pass\nprint(json.dumps(v))"
    )
    return json.loads(subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout)


def summarise(runs: dict[str, dict[int, list[dict]]]) -> dict[str, dict]:
    """Medians per tool, at the worker count that won the first turn (the one that was then repeated)."""
    table = {}
    for tool, tried in runs.items():
        best = max(tried, key=lambda n: (len(tried[n]), tried[n][0].get("img_s", 0)))
        good = [run for run in tried[best] if "error" not in run]
        if not good:
            table[tool] = {"error": tried[best][0]["error"]}
            continue
        table[tool] = {
            name: round(statistics.median(run[name] for run in good), 4)
            for name in ("cpu_ms", "img_s", "first_batch_s")
        }
        table[tool] |= {"repeats": len(good)} | ({"workers": best} if tool in SWEEP else {})
    for tool, row in table.items():
        reference = table["patches_copy" if tool.startswith("patches") else "limit"]
        if "cpu_ms" in row and "cpu_ms" in reference:
            row["of_limit"] = round(reference["cpu_ms"] / row["cpu_ms"], 3)
    return table


def benchmark(arguments: argparse.Namespace) -> dict:
    peers = str(Path(arguments.peers) / "bin" / "python") if arguments.peers else None
    tools = [t.__name__ for t in TOOLS if t.__name__ not in PEERS or peers]
    runs: dict[str, dict[int, list[dict]]] = {tool: {} for tool in tools}
    with tempfile.TemporaryDirectory(prefix="loader-speed-") as folder:
        work = Path(folder)
        make_corpus(work, arguments.images, arguments.count)
        make_patches(work, arguments.count)
        sizes = [path.stat().st_size for path in (work / "files").iterdir()]
        for repeat in range(arguments.repeats):
            for tool in tools:
                tried = runs[tool]
                sweep = range(4) if tool in SWEEP and not repeat else sorted(tried) if tool in SWEEP else [0]
                if tool in SWEEP and repeat:  # later rounds use only the worker count that was fastest in the first
                    sweep = [max(tried, key=lambda n: tried[n][0].get("img_s", 0))]
                for workers in sweep:
                    python = peers if tool in PEERS else sys.executable
                    result = child(
                        python, "--tool", tool, "--work", work, "--workers", workers, "--seconds", arguments.seconds
                    )
                    result["load"] = round(os.getloadavg()[0], 1)
                    tried.setdefault(workers, []).append(result)
                    print(f"{tool:20} workers {workers}  {result}", flush=True)
        with tempfile.TemporaryDirectory() as simulated:
            planned = child(sys.executable, "--plan-in", simulated_manifest(simulated))
    loads = [run["load"] for tried in runs.values() for results in tried.values() for run in results]
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    return {
        "command": "python tests/benchmarks/loader_speed.py " + " ".join(sys.argv[1:]),
        "commit": commit,
        "date": time.strftime("%Y-%m-%d"),
        "host": {
            "cpu": cpu_model(),
            "cores": THREADS,
            "kernel": platform.release(),
            "python": platform.python_version(),
        },
        "versions": versions(sys.executable),
        "peer_versions": versions(peers) if peers else None,
        "corpus": {
            "images": len(sizes),
            "mean_bytes": round(sum(sizes) / len(sizes)),
            "photos": bool(arguments.images),
        },
        "load_average": [min(loads), max(loads)],  # of a quiet machine: below 1 at the start
        "table": summarise(runs),
        "plan": planned,
        "runs": runs,
    }


def cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", help="tar archive of photos to make the corpus of (default: synthetic pictures)")
    parser.add_argument("--count", type=int, default=8192, help="images in the corpus")
    parser.add_argument("--seconds", type=float, default=25, help="length of each measurement")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--peers", help="virtual environment of the other loaders")
    parser.add_argument("--output", type=Path, default=RESULTS)
    for name in ("--tool", "--work", "--workers", "--plan-in"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.plan_in:
        print(json.dumps(plan(arguments.plan_in)))
        return
    if arguments.tool:
        print(
            json.dumps(measure(arguments.tool, Path(arguments.work), int(arguments.workers), arguments.seconds)),
            flush=True,
        )
        os._exit(0)  # generators without end, and loaders with threads of their own
    if os.getloadavg()[0] > 1:
        print(f"warning: load average {os.getloadavg()[0]:.1f}: compare cpu_ms, not img_s", file=sys.stderr)
    result = benchmark(arguments)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    for tool, row in result["table"].items():
        print(f"{tool:20} {row}")
    print(f"plan                 {result['plan']}\n{arguments.output}")


if __name__ == "__main__":
    main()
