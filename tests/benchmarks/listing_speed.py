"""Lists a large bucket with several tasks and with one, on a simulated store with S3's page size and latency.

    python tests/benchmarks/listing_speed.py --count 10000000 --layout nested flat skewed --tasks 16 1 --output results/listing_speed.json
    python tests/benchmarks/listing_speed.py --count 1000000 --first          time to the first prepared unit

The store (tests/simulatedstore.py) computes the pages of 1,000 names and waits before each answer. So the rates are those of
the pages and of this project, without the SDK, which `sdk_ms_per_page` measures: CPU time for a page of boto3, from a
server in memory. 0 tasks: the listing without Ray. Memory is what processes have alone (RssAnon), of the driver and of the
largest worker. Seconds are those of the listing after the start of Ray.
"""

import argparse
import contextlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))

from tests import simulatedstore  # noqa: E402

SAMPLES = 3.0  # seconds between two measurements of memory


class Enough(Exception):
    """Raised after the first prepared unit."""


def _anonymous(pid: int) -> int:
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) >> 10
    return 0


@contextlib.contextmanager
def watched() -> Any:
    """Yields a dictionary, which has the peaks of memory in MB at the end."""
    over, peaks = threading.Event(), {"driver_mb": 0, "worker_mb": 0, "workers": 0}

    def watch() -> None:
        while not over.wait(SAMPLES):
            workers = []
            for process in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error, IndexError):
                    if "ray::" in process.cmdline()[0]:
                        workers.append(_anonymous(process.pid))
            peaks["driver_mb"] = max(peaks["driver_mb"], _anonymous(os.getpid()))
            peaks["worker_mb"] = max([peaks["worker_mb"], *workers])
            peaks["workers"] = max(peaks["workers"], len(workers))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peaks
    finally:
        peaks["driver_mb"] = max(peaks["driver_mb"], _anonymous(os.getpid()))
        over.set()
        thread.join()


def _start_ray() -> None:
    import ray

    from pipeline import cluster

    environment = cluster.runtime_env(ship_project=False)
    environment["worker_process_setup_hook"] = "tests.simulatedstore.register"
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        runtime_env=environment,
        logging_level="error",
        log_to_driver=False,
    )


def measure(layout: str, count: int, latency: float, tasks: int, room: str) -> dict[str, Any]:
    """Lists once, with `tasks` Ray tasks; 0: in this process."""
    from pipeline.data.sources import listing, parallel_listing

    simulatedstore.register()
    uri = f"sim://{layout}-{count}-{latency:g}/photos"
    if tasks:
        _start_ray()
    load, begin, cpu = os.getloadavg()[0], time.perf_counter(), time.process_time()
    with watched() as peaks:
        if tasks:
            how = parallel_listing.ParallelListing(folder=room, tasks=tasks, small_files=0, small_seconds=0)
            found = parallel_listing.list_source(uri, how)
        else:
            found = listing.list_source(uri)
        seconds = time.perf_counter() - begin
    units = sum(path.suffix == ".json" for path in Path(room).rglob("*")) - 1
    return {
        "layout": layout,
        "files": found.num_rows,
        "tasks": tasks,
        "seconds": round(seconds, 1),
        "files_per_s": round(found.num_rows / seconds),
        "driver_cpu_s": round(time.process_time() - cpu, 1),
        "units": max(0, units),
        "load": [round(load, 1), round(os.getloadavg()[0], 1)],
        **peaks,
    }


def first_unit(layout: str, count: int, latency: float, room: str) -> dict[str, Any]:
    """Prepares a source until its first unit is finished: listing, scan, plan, and the unit."""
    from pipeline.data.prepare import PrepareConfig, prepare

    simulatedstore.register()
    _start_ray()
    planned: list[float] = []
    load, begin = os.getloadavg()[0], time.perf_counter()

    def stop(inputs: int, rejects: int) -> None:
        raise Enough(f"{inputs} inputs, {rejects} rejects")

    def watch_plan() -> None:
        while not planned:
            if Path(room, "out", "_work", "plan.json").exists():
                planned.append(time.perf_counter() - begin)
            time.sleep(0.5)

    threading.Thread(target=watch_plan, daemon=True).start()
    source = f"sim://{layout}-{count}-{latency:g}/photos"
    what = ""
    with watched() as peaks:
        try:
            prepare(PrepareConfig(source=(source,), output=f"{room}/out"), on_progress=stop)
        except Enough as error:
            what = str(error)
        seconds = time.perf_counter() - begin
    return {
        "layout": layout,
        "files": count,
        "plan_s": round(planned[0], 1) if planned else None,
        "first_unit_s": round(seconds, 1),
        "first_unit": what,
        "load": [round(load, 1), round(os.getloadavg()[0], 1)],
        **peaks,
    }


def sdk_ms_per_page() -> float:
    """CPU time in ms that a page of 1,000 names of S3 takes, from a server in another process."""
    import http.server

    from pipeline import storage

    rows = "".join(
        f"<Contents><Key>n{i:08d}/n{i:08d}_00001.JPEG</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified><ETag>"
        f"&quot;{i:032x}&quot;</ETag><Size>{i}</Size><StorageClass>STANDARD</StorageClass></Contents>"
        for i in range(simulatedstore.PAGE)
    )
    space = "http://s3.amazonaws.com/doc/2006-03-01/"
    body = f'<?xml version="1.0"?><ListBucketResult xmlns="{space}"><Name>b</Name>{rows}</ListBucketResult>'.encode()

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "application/xml")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Answer)
    process = os.fork()
    if not process:
        server.serve_forever()
    os.environ |= {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": "a",
        "AWS_SECRET_ACCESS_KEY": "b",
    }
    try:
        storage.list_files("s3://b")
        begin = time.process_time()
        for _ in range(50):
            storage.list_files("s3://b")
        return round((time.process_time() - begin) / 50 * 1000, 1)
    finally:
        os.kill(process, 9)
        os.waitpid(process, 0)


def _child(*arguments: Any) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="listing-speed-") as room:
        command = [sys.executable, __file__, "--room", room, *map(str, arguments)]
        environment = {**os.environ, "PYTHONPATH": str(HERE.parents[1])}
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
        return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=10_000_000, help="number of names")
    parser.add_argument("--layout", nargs="+", default=["nested"], choices=simulatedstore.LAYOUTS)
    parser.add_argument("--latency", type=float, default=80, help="ms before each answer")
    parser.add_argument("--tasks", type=int, nargs="+", default=[16, 1], help="numbers of tasks; 0: without Ray")
    parser.add_argument("--first", action="store_true", help="measure the time to the first prepared unit instead")
    parser.add_argument("--output", type=Path, help="JSON file to which the results are added")
    parser.add_argument("--room", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.room:
        [layout] = options.layout
        if options.first:
            print(json.dumps(first_unit(layout, options.count, options.latency, options.room)))
        else:
            print(json.dumps(measure(layout, options.count, options.latency, options.tasks[0], options.room)))
        return
    rows = []
    for layout in options.layout:
        common = ("--count", options.count, "--layout", layout, "--latency", options.latency)
        for tasks in [0] if options.first else options.tasks:
            row = _child(*common, "--tasks", tasks, *["--first"] * options.first)
            rows.append(row | {"latency_ms": options.latency, "date": time.strftime("%Y-%m-%d")})
            print(json.dumps(rows[-1]), flush=True)
    if options.output:
        known = json.loads(options.output.read_text()) if options.output.exists() else {"first": [], "listings": []}
        known["host"] = {"cpu": _cpu_model(), "cores": os.cpu_count(), "python": platform.python_version()}
        known["sdk_ms_per_page"] = sdk_ms_per_page()
        known["first" if options.first else "listings"] += rows
        options.output.write_text(json.dumps(known, indent=1) + "\n")


def _cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()
