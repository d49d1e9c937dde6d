"""Memory of `prepare` while it works, against the number of images.

    python tests/benchmarks/prepare_memory.py --counts 10000 100000 1000000     measures, loose files and tars
    python tests/benchmarks/prepare_memory.py --picture docs/prepare-memory.png   draws the results

Each run prepares JPEGs of 32x32 pixels on two CPUs in a process of its own. Memory is what a process has alone, without
shared pages (Ray's object store, mapped files): that of the driver, and that of the largest worker at the time.
"""

import argparse
import contextlib
import io
import itertools
import json
import os
import platform
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))

import cv2  # noqa: E402
import numpy as np  # noqa: E402
import simplejpeg  # noqa: E402

RESULTS = HERE / "results" / "prepare_memory.json"
FILES = 200  # different pictures
POINTS = 100  # of a curve in the results


def pictures() -> list[bytes]:
    generator = np.random.default_rng(0)
    small = (generator.integers(0, 256, (5, 5, 3), dtype=np.uint8) for _ in range(FILES))
    return [simplejpeg.encode_jpeg(cv2.resize(pixels, (32, 32)), 90, "RGB", "420") for pixels in small]


def loose_images(count: int, room: str) -> str:
    """`count` files in a hundred class folders: names of 200 files."""
    os.makedirs(f"{room}/files")
    for i, data in enumerate(pictures()):
        Path(room, "files", f"{i}.jpg").write_bytes(data)
    for label in range(100):
        os.makedirs(f"{room}/source/class{label:03d}")
    for i in range(count):
        os.link(f"{room}/files/{i % FILES}.jpg", f"{room}/source/class{i % 100:03d}/{i:07d}.jpg")
    return f"{room}/source"


def packed_images(count: int, room: str) -> str:
    """The same in tars of ten thousand, names and labels as in class folders."""
    files = pictures()
    os.makedirs(f"{room}/tars")
    for first in range(0, count, 10_000):
        with tarfile.open(f"{room}/tars/{first:07d}.tar", "w") as archive:
            for i in range(first, min(first + 10_000, count)):
                member = tarfile.TarInfo(f"class{i % 100:03d}/{i:07d}.jpg")
                member.size = len(files[i % FILES])
                archive.addfile(member, io.BytesIO(files[i % FILES]))
    return f"{room}/tars"


def measure(kind: str, count: int, room: str) -> dict:
    """Peaks over the job, and a curve of (seconds, driver MB, MB of the largest worker)."""
    import psutil

    from pipeline import cluster
    from pipeline.data.prepare import PrepareConfig, prepare

    source = (packed_images if kind == "packed" else loose_images)(count, f"{room}/source")
    me, over, curve = psutil.Process(), threading.Event(), []
    begin = time.perf_counter()

    def watch() -> None:
        while not over.wait(0.2):
            driver = worker = 0
            for process in [me, *me.children(recursive=True)]:
                with contextlib.suppress(psutil.Error, IndexError):
                    held = process.memory_info()
                    if process == me:
                        driver = (held.rss - held.shared) >> 20
                    elif "ray::" in process.cmdline()[0]:
                        worker = max(worker, (held.rss - held.shared) >> 20)
            curve.append((round(time.perf_counter() - begin, 1), driver, worker))

    threading.Thread(target=watch, daemon=True).start()
    cluster.configure(num_cpus=2, dashboard=False)
    rows = prepare(PrepareConfig(source=(source,), output=f"{room}/out"))[""].rows
    over.set()
    seconds = time.perf_counter() - begin
    return {
        "kind": kind,
        "images": rows,
        "seconds": round(seconds, 1),
        "driver_mb": max(driver for _, driver, _ in curve),
        "worker_mb": max(worker for _, _, worker in curve),
        "curve": thinned(curve),
    }


def thinned(curve: list[tuple[float, int, int]]) -> list[tuple[float, int, int]]:
    """About POINTS points, each with the largest values since the one before."""
    step = max(1, len(curve) // POINTS)
    parts = (curve[first : first + step] for first in range(0, len(curve), step))
    return [(part[-1][0], max(driver for _, driver, _ in part), max(worker for *_, worker in part)) for part in parts]


def draw(result: dict, target: str) -> None:
    """Memory against the share of the run's time, a line for each number of images."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    kinds = {"loose": "JPEG files in folders", "packed": "tar archives of 10,000"}
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 3.6), sharey=True, layout="constrained")
    colors = ("#9ecae1", "#4292c6", "#08306b")
    for axis, (kind, title) in zip(axes, kinds.items(), strict=True):
        rows = [row for row in result["rows"] if row["kind"] == kind]
        for row, color in zip(rows, colors, strict=False):
            times, drivers, workers = (np.array(column, float) for column in zip(*row["curve"], strict=True))
            share = 100 * times / row["seconds"]
            axis.plot(share, drivers, color=color, label=f"driver, {row['images']:,} images")
            axis.plot(share, workers, color=color, linestyle="--", label=f"largest worker, {row['images']:,} images")
        axis.set(title=title, xlabel="share of the job's time, %", xlim=(0, 100), ylim=(0, None))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("memory without shared pages, MB")
    axes[1].legend(fontsize=8, loc="lower right")
    figure.savefig(target, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", type=int, nargs="+", help="numbers of images")
    parser.add_argument("--room", help="folder for the images and what is made of them")
    parser.add_argument("--picture", help="file to draw the results to")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        kind, count, room = options.measure
        print(json.dumps(measure(kind, int(count), room)), flush=True)
        os._exit(0)
    if options.counts:
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=HERE)
        result = {
            "command": f"python tests/benchmarks/prepare_memory.py --counts {' '.join(map(str, options.counts))}",
            "host": {"machine": platform.machine(), "cpus": os.cpu_count()},
            "date": time.strftime("%Y-%m-%d"),
            "commit": commit.stdout.strip(),
            "rows": [],
        }
        for kind, count in itertools.product(("loose", "packed"), options.counts):
            with tempfile.TemporaryDirectory(dir=options.room) as room:
                command = [sys.executable, __file__, "--measure", kind, str(count), room]
                done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(done.stderr)
            result["rows"].append(json.loads(done.stdout.strip().splitlines()[-1]))
            print({key: value for key, value in result["rows"][-1].items() if key != "curve"}, flush=True)
        RESULTS.write_text(json.dumps(result) + "\n")
    if options.picture:
        draw(json.loads(RESULTS.read_text()), options.picture)


if __name__ == "__main__":
    main()
