"""How much of the cores `prepare` turns into images: its units against a bare loop over the same files.

    python tests/benchmarks/prepare_speed.py --photos FOLDER        JPEG files of ordinary size

`limit` is the bare loop of one process: read the file, simplejpeg decode, OpenCV area resize to 256, simplejpeg encode;
nothing is checked, hashed or written. `unit` is `prepare.process` in one process. `job` is the whole job on Ray Data with
one and two CPUs, steady state: from the first finished unit to the last. Measured in CPU
milliseconds per image (a busy machine disturbs them least) and images per second; results/prepare_speed.json keeps them.
"""

import argparse
import contextlib
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import cv2
import psutil
import simplejpeg

from pipeline import cluster
from pipeline.data import prepare
from pipeline.data.prepare import PrepareConfig

HERE = Path(__file__).parent


def photos_of(folder: str, count: int, room: str) -> str:
    """`count` photographs in ten class folders, as hard links or copies of the given ones."""
    found = [p for p in sorted(Path(folder).rglob("*")) if p.suffix.lower() in (".jpg", ".jpeg")]
    for i in range(count):
        path = Path(room, f"class{i % 10}", f"{i:06d}.jpg")
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(found[i % len(found)], path)
    return room


def cpu_seconds(process: psutil.Process) -> float:
    """CPU of a process and all its descendants, finished ones that were waited for included."""
    total = 0.0
    for member in [process, *process.children(recursive=True)]:
        with contextlib.suppress(psutil.Error):
            times = member.cpu_times()
            total += times.user + times.system
    return total


def timed(function, count: int) -> dict[str, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    function()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {"images_per_s": round(count / wall, 1), "cpu_ms": round(cpu / count * 1e3, 3)}


def limit(paths: list[str]) -> None:
    for path in paths:
        with open(path, "rb") as file:
            pixels = simplejpeg.decode_jpeg(file.read(), "RGB")
        height, width = pixels.shape[:2]
        if min(height, width) > 256:
            scale = 256 / min(height, width)
            pixels = cv2.resize(pixels, (round(width * scale), round(height * scale)), interpolation=cv2.INTER_AREA)
        simplejpeg.encode_jpeg(pixels, 90, "RGB", "420")


def one_process(source: str, room: str, count: int, repeats: int) -> dict[str, dict[str, float]]:
    """limit and unit, interleaved, the best of each."""
    paths = [str(p) for p in sorted(Path(source).rglob("*.jpg"))]
    best: dict[str, dict[str, float]] = {}
    for repeat in range(repeats):
        config = prepare.check(PrepareConfig(source=(source,), output=f"{room}/unit{repeat}"))
        plan = prepare.make_plan(config)

        def unit(plan=plan) -> None:
            for number in range(len(plan.units)):
                prepare.process(number, plan)

        for name, function in (("limit", lambda: limit(paths)), ("unit", unit)):
            result = timed(function, count)
            if name not in best or result["cpu_ms"] < best[name]["cpu_ms"]:
                best[name] = result
        shutil.rmtree(f"{room}/unit{repeat}")
    return best


def job(source: str, output: str, cpus: int, count: int) -> dict[str, float]:
    """The job on embedded Ray, in a process of its own; CPU of the whole tree while it works."""
    command = [sys.executable, __file__, "--job", source, output, str(cpus)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    values = json.loads(result.stdout.splitlines()[-1])
    return {
        "images_per_s": round(values["images"] / values["seconds"], 1),
        "cpu_ms": round(values["cpu"] / count * 1e3, 3),
        "worker_peak_mb": values["peak_mb"],
    }


def run_job(source: str, output: str, cpus: int) -> None:
    """Child process: warms the workers up with one unit each, then times the rest."""
    cluster.connect(num_cpus=cpus, quiet=True)
    config = prepare.check(PrepareConfig(source=(source,), output=output))
    plan = prepare.make_plan(config)
    times: list[tuple[float, int, float]] = []
    me = psutil.Process()

    def record(self, weight: float, inputs: int, rejects: int) -> None:
        times.append((time.monotonic(), int(inputs), cpu_seconds(me)))

    prepare._Progress.add = record  # type: ignore[method-assign]
    prepare._claim(plan)
    prepare._run(plan, quiet=True)
    first, last = times[cpus - 1], times[-1]
    images = sum(inputs for _, inputs, _ in times[cpus:])
    peak = max(
        (p.memory_info().rss for p in me.children(recursive=True) if "ray::" in " ".join(p.cmdline())), default=0
    )
    values = {"images": images, "seconds": last[0] - first[0], "cpu": last[2] - first[2], "peak_mb": peak >> 20}
    values["cpu"] *= sum(inputs for _, inputs, _ in times) / images  # scaled to all images
    print(json.dumps(values))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--photos")
    parser.add_argument("--count", type=int, default=3000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--job", nargs=3)
    options = parser.parse_args()
    cv2.setNumThreads(1)
    if options.job:
        run_job(options.job[0], options.job[1], int(options.job[2]))
        return
    with tempfile.TemporaryDirectory() as room:
        source = photos_of(options.photos, options.count, f"{room}/photos")
        size = sum(p.stat().st_size for p in Path(source).rglob("*.jpg")) / options.count
        rows = one_process(source, room, options.count, options.repeats)
        for cpus in (1, 2):
            rows[f"job, {cpus} CPU"] = job(source, f"{room}/job{cpus}", cpus, options.count)
    for row in rows.values():
        row["of_limit"] = round(rows["limit"]["cpu_ms"] / row["cpu_ms"], 3)
    rows["job, 2 CPU"]["speed_up"] = round(rows["job, 2 CPU"]["images_per_s"] / rows["job, 1 CPU"]["images_per_s"], 2)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=HERE
    ).stdout.strip()
    result = {
        "command": f"prepare_speed.py, {options.count} photographs of {size / 1e3:.0f} kB, JPEG 256 quality 90",
        "host": {"machine": platform.machine(), "cpus": os.cpu_count(), "load": os.getloadavg()},
        "commit": commit,
        "rows": rows,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10,
    }
    (HERE / "results").mkdir(exist_ok=True)
    (HERE / "results" / "prepare_speed.json").write_text(json.dumps(result, indent=1) + "\n")
    for name, row in rows.items():
        print(f"{name:12s} {row}")


if __name__ == "__main__":
    main()
