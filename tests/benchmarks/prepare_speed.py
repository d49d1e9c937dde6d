"""Speed of `prepare` compared with a simple loop and with the writers of other tools.

    python tests/benchmarks/prepare_speed.py --photos FOLDER                      JPEG files of ordinary size
    python tests/benchmarks/prepare_speed.py --photos FOLDER --peers .venv-bench  and four peers (see loader_speed.py; and Daft)

All tools read the same files and make the same pictures: shorter side 256 by OpenCV's area average, JPEG quality 90, 4:2:0.

    limit       a bare loop, one thread for each core: read, simplejpeg decode, resize, encode. Nothing is checked or written, and
                every image uses the same memory
    job         all of `prepare`: strict decoding, checksums, statistics, shards, manifest, and the end of Ray
    unit        one of its units without Ray
    mds, webdataset    MosaicML's MDSWriter and WebDataset's ShardWriter, a process for each core
    litdata     its optimize, with a worker for each core
    daft        a DataFrame in one process, with a thread for each core
    ray_data    read_binary_files, map_batches, write_parquet
    verify      a bare loop that only reads and decodes: the least for images that are stored unchanged
    kept_job, kept_unit    `prepare` and a unit of it on such images (the same photographs, with size 16384)

    images_per_s    from the first unit, batch or file that is done to the last
    cpu_ms          CPU time per image in that time, over the process tree: other work disturbs it least
    seconds         the whole command, start and end included
    of_limit        the cpu_ms of limit (of verify for kept_job and kept_unit) over that of the tool

Ray Data takes up to 0.3 s to start the next task on a free CPU, which shows in the rates of small corpora (docs/journal.md).
"""

import argparse
import contextlib
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))

import cv2  # noqa: E402
import numpy as np  # noqa: E402
import simplejpeg  # noqa: E402

SIZE, QUALITY = 256, 90


def shrink(data: bytes, memory: Callable[[str, int, int], np.ndarray | None] = lambda *_: None) -> bytes:
    """The work of every tool for one image. memory: where to decode and resize to, by name, height and width."""
    height, width = simplejpeg.decode_jpeg_header(data)[:2]
    pixels = simplejpeg.decode_jpeg(data, "RGB", buffer=memory("decode", height, width))
    if min(height, width) > SIZE:
        scale = SIZE / min(height, width)
        width, height = round(width * scale), round(height * scale)
        pixels = cv2.resize(pixels, (width, height), memory("resize", height, width), interpolation=cv2.INTER_AREA)
    return simplejpeg.encode_jpeg(pixels, QUALITY, "RGB", "420")


def check(data: bytes, memory: Callable[[str, int, int], np.ndarray]) -> None:
    height, width = simplejpeg.decode_jpeg_header(data)[:2]
    simplejpeg.decode_jpeg(data, "RGB", buffer=memory("decode", height, width))


# ---------------------------------------------------------------- the tools: each yields how many images are done


def limit(paths: list[str], output: str, cpus: int) -> Iterator[int]:
    yield from _bare(paths, cpus, shrink)


def verify(paths: list[str], output: str, cpus: int) -> Iterator[int]:
    yield from _bare(paths, cpus, check)


def _bare(paths: list[str], cpus: int, function: Callable) -> Iterator[int]:
    """Calls a function with the bytes of each file and memory that a thread uses again."""
    kept = threading.local()

    def memory(name: str, height: int, width: int) -> np.ndarray:
        size = 3 * height * width
        if getattr(kept, name, np.empty(0)).size < size:
            setattr(kept, name, np.empty(size, np.uint8))
        return getattr(kept, name)[:size].reshape(height, width, 3)

    def work(part: list[str]) -> int:
        for path in part:
            with open(path, "rb") as file:
                function(file.read(), memory)
        return len(part)

    with ThreadPoolExecutor(cpus) as pool:
        yield from pool.map(work, [paths[i : i + 64] for i in range(0, len(paths), 64)])


def unit(paths: list[str], output: str, cpus: int, size: int = SIZE) -> Iterator[int]:
    from pipeline.data.prepare.checks import check_config
    from pipeline.data.prepare.config import PrepareConfig
    from pipeline.data.prepare.plan import claim_output, make_plan
    from pipeline.data.prepare.worker import prepare_slice

    config = check_config(PrepareConfig(source=(str(Path(paths[0]).parents[1]),), output=output, size=size))
    plan = claim_output(make_plan(config))
    for number in range(len(plan.slices)):
        yield sum(prepare_slice(number, plan)["inputs"].values())


def job(paths: list[str], output: str, cpus: int, size: int = SIZE) -> Iterator[int]:
    from pipeline import cluster
    from pipeline.data.prepare import PrepareConfig, prepare

    done: list[int] = []

    def note(inputs: int, rejects: int) -> None:
        done.append(inputs - sum(done))

    config = PrepareConfig(source=(str(Path(paths[0]).parents[1]),), output=output, size=size)
    cluster.configure(num_cpus=cpus, dashboard=False)
    cluster.connect()  # here, because Ray's processes end with the thread that starts them
    yield from _beside(lambda: prepare(config, on_progress=note), done)
    cluster.disconnect()


def kept_unit(paths: list[str], output: str, cpus: int) -> Iterator[int]:
    yield from unit(paths, output, cpus, 16384)


def kept_job(paths: list[str], output: str, cpus: int) -> Iterator[int]:
    yield from job(paths, output, cpus, 16384)


def ray_data(paths: list[str], output: str, cpus: int) -> Iterator[int]:
    import ray

    ray.init(address="local", num_cpus=cpus, include_dashboard=False, logging_level="error", log_to_driver=False,
             runtime_env={"env_vars": {"PYTHONPATH": f"{HERE.parents[1]}:{HERE}"}})  # fmt: skip
    ray.data.DataContext.get_current().enable_progress_bars = False

    def rows(batch: dict) -> dict:
        return batch | {"bytes": [shrink(data) for data in batch["bytes"]]}

    images = ray.data.read_binary_files(paths, include_paths=True).map_batches(rows, batch_size=64)
    yield from _files(lambda: images.write_parquet(output), output, ".parquet", len(paths))


def mds(paths: list[str], output: str, cpus: int) -> Iterator[int]:
    yield from _processes("mds", paths, output, cpus)


def webdataset(paths: list[str], output: str, cpus: int) -> Iterator[int]:
    yield from _processes("webdataset", paths, output, cpus)


def _processes(writer: str, paths: list[str], output: str, cpus: int) -> Iterator[int]:
    """Writes with a process for each CPU."""
    done = f"{output}.done"
    command = [sys.executable, __file__, "--write", writer, output, done]
    os.makedirs(output)
    for i in range(cpus):
        Path(f"{done}{i}").unlink(missing_ok=True)  # of the run before
    writers = [
        subprocess.Popen([*command, str(i), *paths[i::cpus]], env={**os.environ, "PYTHONWARNINGS": "ignore"})
        for i in range(cpus)
    ]
    yield from _counted(lambda: any(writer.poll() is None for writer in writers), [f"{done}{i}" for i in range(cpus)])
    assert not any(writer.returncode for writer in writers)


def _counted(running: Callable[[], bool], logs: list[str]) -> Iterator[int]:
    """Yields the images that the bytes of the logs count, 64 each."""
    seen, over = 0, False
    while not over:
        over = not running()
        now = sum(os.path.getsize(log) for log in logs if os.path.exists(log))
        if now > seen:
            yield (now - seen) * 64
            seen = now
        time.sleep(0.02)


def write_part(writer: str, output: str, done: str, number: int, paths: list[str]) -> None:
    """One process of MDSWriter or ShardWriter; a byte is added to `done` for every 64 images."""
    from pipeline.libraries import load_torchvision

    load_torchvision()  # streaming imports torchvision
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(open(f"{done}{number}", "wb", 0))
        if writer == "mds":
            from streaming import MDSWriter

            columns = {"key": "str", "image": "bytes", "label": "int"}
            mds_file = stack.enter_context(MDSWriter(out=f"{output}/{number}", columns=columns, hashes=["sha1"]))
        else:
            import webdataset

            shards = webdataset.ShardWriter(f"{output}/{number}-%06d.tar", maxsize=64 << 20, verbose=0)
            tars = stack.enter_context(shards)
        for i, path in enumerate(paths, 1):
            with open(path, "rb") as file:
                image = shrink(file.read())
            if writer == "mds":
                mds_file.write({"key": path, "image": image, "label": 0})
            else:
                tars.write({"__key__": Path(path).stem, "jpg": image, "cls": b"0"})
            if i % 64 == 0:
                log.write(b".")


def litdata(paths: list[str], output: str, cpus: int) -> Iterator[int]:
    done = f"{output}.done"
    Path(done).unlink(missing_ok=True)
    command = [sys.executable, __file__, "--write", "litdata", output, done, str(cpus), *paths]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env={**os.environ, "PYTHONWARNINGS": "ignore"})
    yield from _counted(lambda: process.poll() is None, [done])
    assert not process.returncode


def optimize(output: str, done: str, cpus: int, paths: list[str]) -> None:
    """litdata's optimize. A worker adds a byte to `done` for every 64 images of its own."""
    import functools

    from litdata import optimize

    optimize(
        fn=functools.partial(_optimized, done),
        inputs=paths,
        output_dir=output,
        chunk_bytes="64MB",
        num_workers=cpus,
        verbose=False,
    )


_written = 0


def _counted_shrink(done: str, path: str) -> bytes:
    """The image of a file; every 64th adds a byte to `done`."""
    global _written
    _written += 1
    if _written % 64 == 0:
        with open(done, "ab", 0) as log:
            log.write(b".")
    with open(path, "rb") as file:
        return shrink(file.read())


def _optimized(done: str, path: str) -> dict:
    return {"key": path, "image": _counted_shrink(done, path), "label": 0}


def daft(paths: list[str], output: str, cpus: int) -> Iterator[int]:
    import daft

    done = f"{output}.done"
    Path(done).unlink(missing_ok=True)

    @daft.func(return_dtype=daft.DataType.binary())
    def small(path: str) -> bytes:
        return _counted_shrink(done, path)

    rows = daft.from_pydict({"path": paths}).into_batches(256)
    thread = threading.Thread(target=lambda: rows.with_column("image", small(rows["path"])).write_parquet(output))
    thread.start()
    yield from _counted(thread.is_alive, [done])


def _beside(work: Callable[[], object], done: list[int]) -> Iterator[int]:
    """Runs `work` in a thread and yields what it adds to `done`; the units of one task come at the same moment, as one."""
    thread = threading.Thread(target=work)
    thread.start()
    seen = 0
    while thread.is_alive() or seen < len(done):
        time.sleep(0.02)
        if len(done) > seen:
            time.sleep(0.005)  # for the rest of a task's
            until = len(done)
            yield sum(done[seen:until])
            seen = until


def _files(work: Callable[[], object], output: str, suffix: str, count: int) -> Iterator[int]:
    """Runs `work` in a thread and yields the rows of each file that appears."""
    import pyarrow.parquet as pq

    thread, seen = threading.Thread(target=work), set()
    thread.start()
    while thread.is_alive() or len(seen) == 0:
        time.sleep(0.05)
        for path in set(Path(output).glob(f"*{suffix}")) - seen:
            with contextlib.suppress(Exception):  # still being written
                yield pq.read_metadata(path).num_rows
                seen.add(path)
    assert sum(pq.read_metadata(path).num_rows for path in Path(output).glob(f"*{suffix}")) == count


TOOLS = {
    tool.__name__: tool
    for tool in (limit, verify, unit, job, kept_unit, kept_job, ray_data, mds, webdataset, litdata, daft)
}
PEERS = ("mds", "webdataset", "litdata", "daft")


# ---------------------------------------------------------------- measuring


asking = 0.0  # CPU seconds of the measurement itself: with Ray, the tree has many processes


def cpu_seconds() -> float:
    """CPU time of this process, its descendants, and those of them that have ended and been waited for, without the
    cost of the measurement itself."""
    import psutil

    global asking
    begin, me, total = time.thread_time(), psutil.Process(), -asking
    for process in [me, *me.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            total += sum(process.cpu_times()[:4])
    asking += time.thread_time() - begin
    return total


def measure(tool: str, cpus: int, source: str, output: str) -> dict:
    """One run of one tool, in a process of its own."""
    cv2.setNumThreads(1)
    paths = [str(path) for path in sorted(Path(source).rglob("*.jpg"))]
    begin, marks = time.perf_counter(), []
    for count in TOOLS[tool](paths, output, cpus):
        marks.append((time.perf_counter(), cpu_seconds(), count))
    seconds, first, last = time.perf_counter() - begin, marks[min(cpus, len(marks)) - 1], marks[-1]
    images = sum(count for _, _, count in marks[cpus:])
    return {
        "images_per_s": round(images / (last[0] - first[0]), 1),
        "cpu_ms": round((last[1] - first[1]) / images * 1e3, 3),
        "seconds": round(seconds, 1),
    }


# ---------------------------------------------------------------- the corpus


def photos_of(folder: str, count: int, room: str) -> str:
    """`count` photographs in ten class folders, as copies of the given ones."""
    found = [p for p in sorted(Path(folder).rglob("*")) if p.suffix.lower() in (".jpg", ".jpeg")]
    for i in range(count):
        path = Path(room, f"class{i % 10}", f"{i:06d}.jpg")
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(found[i % len(found)], path)
    return room


def child(python: str, *arguments: object) -> dict:
    """Runs this file again; its last line of output is JSON."""
    done = subprocess.run([python, __file__, *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["?"])[-1][:300]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def benchmark(options: argparse.Namespace) -> dict:
    peers = str(Path(options.peers) / "bin" / "python") if options.peers else None
    plan = [("limit", 2), ("job", 2), ("limit", 1), ("unit", 1), ("job", 1), ("ray_data", 2)]
    plan += [("verify", 1), ("kept_unit", 1), ("verify", 2), ("kept_job", 2)]
    plan += [(peer, 2) for peer in PEERS] if peers else []
    runs: dict[str, list[dict]] = {f"{tool}, {cpus} CPU": [] for tool, cpus in plan}
    with tempfile.TemporaryDirectory(dir=options.room) as room:
        source = photos_of(options.photos, options.count, f"{room}/photos")
        size = sum(p.stat().st_size for p in Path(source).rglob("*.jpg")) / options.count
        for _ in range(options.repeats):  # tools take turns
            for tool, cpus in plan:
                python = peers if tool in PEERS and peers else sys.executable
                runs[f"{tool}, {cpus} CPU"].append(child(python, "--measure", tool, cpus, source, f"{room}/out"))
                shutil.rmtree(f"{room}/out", ignore_errors=True)
                print(tool, cpus, runs[f"{tool}, {cpus} CPU"][-1], flush=True)
    table: dict[str, dict] = {}
    for name, tried in runs.items():
        good = [run for run in tried if "error" not in run]
        table[name] = {k: statistics.median(run[k] for run in good) for k in good[0]} if good else tried[0]
    for name, row in table.items():
        if "cpu_ms" in row:
            bare = "verify" if name.startswith(("verify", "kept")) else "limit"
            limit_row = table[f"{bare}, {name.split()[-2]} CPU"]
            row["of_limit"] = round(limit_row["cpu_ms"] / row["cpu_ms"], 3)
            row["of_limit_rate"] = round(row["images_per_s"] / limit_row["images_per_s"], 3)
    table["job, 2 CPU"]["speed_up"] = round(
        table["job, 2 CPU"]["images_per_s"] / table["job, 1 CPU"]["images_per_s"], 2
    )
    return {"corpus": {"images": options.count, "mean_bytes": round(size)}, "table": table, "runs": runs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", help="folder of JPEG photographs")
    parser.add_argument("--count", type=int, default=24000, help="images of the corpus")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peers", help="virtual environment of MDSWriter")
    parser.add_argument("--room", help="folder for the corpus and what is made of it")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "prepare_speed.json")
    for name, count in (("--measure", 4), ("--write", "+")):
        parser.add_argument(name, nargs=count, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.write and options.write[0] == "litdata":
        optimize(options.write[1], options.write[2], int(options.write[3]), options.write[4:])
        return
    if options.write:
        write_part(*options.write[:3], int(options.write[3]), options.write[4:])
        return
    if options.measure:
        tool, cpus, source, output = options.measure
        print(json.dumps(measure(tool, int(cpus), source, output)), flush=True)
        os._exit(0)
    if not options.photos:
        parser.error("--photos FOLDER is needed")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=HERE)
    result = {
        "command": f"python tests/benchmarks/prepare_speed.py --photos FOLDER --count {options.count} --repeats {options.repeats}",
        "host": {"machine": platform.machine(), "cpus": os.cpu_count(), "load": [round(x, 1) for x in os.getloadavg()]},
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit.stdout.strip(),
    }
    result |= benchmark(options)
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    for name, row in result["table"].items():
        print(f"{name:16s} {row}")


if __name__ == "__main__":
    main()
