"""Download speed of lists of URLs compared with img2dataset, from a web server on this machine.

    python tests/benchmarks/download_speed.py --photos FOLDER --images 6000 --peer VENV/bin/img2dataset

Both download the same photographs with as many processes as there are cores and 64 connections each. `prepare` and
`img2dataset` make the shorter side 256, JPEG quality 90; `unit` does the work of `prepare` in one process without Ray; `download_only` and `img2dataset_keep` keep the files. Ours also
decodes strictly, computes checksums and statistics, and writes manifests; img2dataset also writes a table of the rows.
`per_second` is steady: between the first and the last answer of the server. `seconds` is the whole command. `cpu_ms` is
CPU time an image over the command's process tree, without the server, which runs on the same cores.
"""

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq

HERE = Path(__file__).parent
JOB = str(HERE.parents[1] / "jobs" / "prepare.py")
CONNECTIONS = 64
IN_PROCESS = """
from pipeline import workqueue
from pipeline.data.downloads.config import DownloadConfig
from pipeline.data.prepare import PrepareConfig, prepare
with workqueue.without_ray():
    """


# ---------------------------------------------------------------- the server


def serve(folder: str, address: Any) -> None:
    """Serves the photographs under any number of names, and at /times the times of the first and the last request."""
    from aiohttp import web

    files = [path.read_bytes() for path in sorted(Path(folder).rglob("*.jp*g"))[:500]]
    times: list[float] = []

    async def image(request: web.Request) -> web.Response:
        times.append(time.monotonic())
        return web.Response(body=files[int(request.match_info["number"]) % len(files)], content_type="image/jpeg")

    async def seconds(_: web.Request) -> web.Response:
        found = {"images": len(times), "seconds": times[-1] - times[0] if times else 0.0}
        times.clear()
        return web.json_response(found)

    async def main() -> None:
        application = web.Application()
        application.add_routes([web.get("/{number}.jpg", image), web.get("/times", seconds)])
        runner = web.AppRunner(application, access_log=None)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0, backlog=1024)
        await site.start()
        address.put(f"http://127.0.0.1:{runner.addresses[0][1]}")
        await asyncio.Event().wait()

    asyncio.run(main())


@contextlib.contextmanager
def server(folder: str) -> Iterator[str]:
    context = multiprocessing.get_context("spawn")
    address = context.Queue()
    process = context.Process(target=serve, args=(folder, address), daemon=True)
    process.start()
    try:
        yield address.get(timeout=120)
    finally:
        process.kill()
        process.join()


# ---------------------------------------------------------------- the tools


def commands(source: str, output: str, cpus: int, peer: str | None) -> dict[str, list[str]]:
    ours = [sys.executable, JOB, "--source", source, "--output", output, "--allow-private-hosts", "--no-tracking"]
    ours += ["--num-cpus", str(cpus), "--download.connections", str(CONNECTIONS), "--download.per-host", "4096"]
    settings = f"source=({source!r},), output={output!r}, unlabelled=True, allow_private_hosts=True, "
    settings += f"download=DownloadConfig(connections={CONNECTIONS}, per_host=4096)"
    found = {"prepare": [*ours, "--unlabelled"], "download_only": [*ours, "--download-only"]}
    found |= {"unit": [sys.executable, "-c", f"{IN_PROCESS}prepare(PrepareConfig({settings}))"]}
    if peer:
        theirs = [
            peer,
            "--url_list",
            source,
            "--input_format",
            "parquet",
            "--url_col",
            "url",
            "--caption_col",
            "caption",
        ]
        theirs += ["--output_folder", output, "--output_format", "webdataset", "--processes_count", str(cpus)]
        theirs += ["--thread_count", str(CONNECTIONS), "--number_sample_per_shard", "1000", "--enable_wandb", "False"]
        resize = ["--image_size", "256", "--resize_mode", "keep_ratio", "--encode_quality", "90"]
        found |= {"img2dataset": [*theirs, *resize], "img2dataset_keep": [*theirs, "--resize_mode", "no"]}
    return found


def run(command: list[str]) -> tuple[float, float, dict[str, int]]:
    """(seconds, CPU seconds of the process tree, peak MB of the driver and of the largest other process that downloads or
    prepares) of a command that must succeed."""
    begin, used, peaks = time.monotonic(), {}, {"driver": 0, "worker": 0}
    with tempfile.TemporaryFile() as log:
        process = psutil.Popen(command, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"})
        while process.poll() is None:
            with contextlib.suppress(psutil.NoSuchProcess):
                for part in [process, *process.children(recursive=True)]:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        times = part.cpu_times()
                        used[part.pid] = times.user + times.system
                        memory = part.memory_info()
                        own = (memory.rss - memory.shared) >> 20  # Ray's object store is shared
                        name = "driver" if part.pid == process.pid else "worker"
                        if name == "driver" or "MapBatches" in " ".join(part.cmdline()) or command[0] != sys.executable:
                            peaks[name] = max(peaks[name], own)
            time.sleep(0.1)
        if process.returncode:
            log.seek(0)
            raise SystemExit(f"{command[0]} failed:\n{log.read().decode()[-2000:]}")
    return time.monotonic() - begin, sum(used.values()), peaks


def measure(url: str, tool: str, images: int, arguments: argparse.Namespace) -> dict[str, Any]:
    import urllib.request

    with tempfile.TemporaryDirectory(prefix="download-speed-") as folder:
        source = f"{folder}/list.parquet"
        rows = [{"url": f"{url}/{i}.jpg", "caption": f"photograph {i}"} for i in range(images)]
        pq.write_table(pa.Table.from_pylist(rows), source)
        urllib.request.urlopen(f"{url}/times").read()
        seconds, cpu, peaks = run(commands(source, f"{folder}/out", arguments.cpus, arguments.peer)[tool])
        steady = json.load(urllib.request.urlopen(f"{url}/times"))
        shutil.rmtree(f"{folder}/out", ignore_errors=True)
    assert steady["images"] == images, (tool, steady)
    return {
        "tool": tool,
        "images": images,
        "seconds": round(seconds, 1),
        "per_second": round(images / steady["seconds"]),
        "cpu_ms": round(1000 * cpu / images, 2),
        "peak_mb": peaks,
        "load": os.getloadavg()[0],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", required=True, help="folder of JPEG files")
    parser.add_argument("--images", type=int, default=6000)
    parser.add_argument("--cpus", type=int, default=os.cpu_count())
    parser.add_argument("--peer", default=None, help="path of the command img2dataset")
    parser.add_argument("--tools", nargs="*", default=None, help="some of the tools")
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--output", default=None, help="JSON file for the results")
    arguments = parser.parse_args()
    results = []
    with server(arguments.photos) as url:
        for _ in range(arguments.repeat):
            for tool in arguments.tools or commands("", "", 1, arguments.peer):
                results.append(measure(url, tool, arguments.images, arguments))
                print(json.dumps(results[-1]), flush=True)
    if arguments.output:
        about = {"date": time.strftime("%Y-%m-%d"), "machine": f"{arguments.cpus} cores, {platform.processor()}"}
        Path(arguments.output).write_text(
            json.dumps({**about, "command": " ".join(sys.argv), "results": results}, indent=1)
        )


if __name__ == "__main__":
    main()
