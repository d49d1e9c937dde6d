"""Memory and time of the join of a listing with a label table of as many rows, by number of rows.

    python tests/benchmarks/label_tables.py --millions 1 4 16 --form parquet

The listing and the table are made up, so that no image is written: one row in a hundred has no file, one file in a hundred
has no row. Reports the peaks of memory of their own (resident without shared pages) of the driver and of the largest
worker, above what both have before the join, which are the imports. Each size is a process of its own.
"""

import argparse
import contextlib
import json
import logging
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from datetime import date

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

STEP = 1 << 16
CLASSES = 100_000


def rows(count: int) -> Iterator[pa.Table]:
    for first in range(0, count, STEP):
        numbers = range(first, min(count, first + STEP))
        names = [f"PHOTOS/{i % 1000:03d}/{i:09d}" for i in numbers]  # in capitals and without extension
        yield pa.table({"file_name": names, "label": [f"class {i * 7919 % CLASSES:06d}" for i in numbers]})


def write_table(path: str, count: int, form: str) -> None:
    with contextlib.ExitStack() as stack:
        make = pq.ParquetWriter if form == "parquet" else pa.csv.CSVWriter
        writer = None
        for part in rows(count):
            writer = writer or stack.enter_context(make(path, part.schema))
            writer.write_table(part)


def listing(path: str, count: int) -> pa.Table:
    from pipeline.data.sources.items import LISTING

    with pa.ipc.new_file(path, LISTING) as writer:
        for first in range(0, count, STEP):
            last = min(count, first + STEP)
            names = [f"photos/{i % 1000:03d}/{i if i % 100 else count + i:09d}.jpg" for i in range(first, last)]
            writer.write_table(pa.table([names, [20_000] * len(names)], schema=LISTING))
    return pa.ipc.open_file(pa.memory_map(path)).read_all()


def measure(millions: float, form: str, cpus: int) -> dict:
    import psutil
    import ray

    from pipeline import cluster
    from pipeline.data.sources.label_join import join_files
    from pipeline.data.sources.large_tables import LargeTable, open_label_table
    from pipeline.data.sources.naming import Naming

    count = int(millions * 1e6)
    me, over, workers = psutil.Process(), threading.Event(), set()
    peak = {"driver_mb": 0, "worker_mb": 0}

    def private(process: psutil.Process) -> int:
        held = process.memory_info()
        return (held.rss - held.shared) >> 20

    def watch() -> None:
        while not over.wait(0.2):
            for process in [me, *me.children(recursive=True)]:
                with contextlib.suppress(psutil.Error, IndexError):
                    if process == me or "ray::" in process.cmdline()[0]:
                        what = "driver_mb" if process == me else "worker_mb"
                        peak[what] = max(peak[what], private(process))
                        workers.add(process.pid)

    with tempfile.TemporaryDirectory() as room:
        table_uri = f"{room}/t.{form}"
        write_table(table_uri, count, form)
        files = listing(f"{room}/listing", count)
        cluster.configure("local", cpus, dashboard=False)
        cluster.connect()
        before = private(me)
        watcher = threading.Thread(target=watch)
        watcher.start()
        start = time.monotonic()
        try:
            table = open_label_table(table_uri)
            opened = time.monotonic()
            assert isinstance(table, LargeTable), "raise --millions: smaller tables are read at once"
            joined = join_files(room, files, Naming(table=table), lambda path: False)
        finally:
            over.set()
            watcher.join()
        end = time.monotonic()
        without = sum(joined.files["row"].slice(first, STEP).to_pylist().count(-1) for first in range(0, count, STEP))
        found = {"rows": count, "files_without_row": without, "rows_without_file": joined.gone.num_rows}
        found |= {"table_mb": os.path.getsize(table_uri) >> 20, "classes": len(joined.names)}
    ray.shutdown()
    seconds = {"first_pass_s": round(opened - start, 1), "join_s": round(end - opened, 1)}
    return found | {"driver_before_mb": before} | peak | seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--millions", type=float, nargs="+", default=[1, 4])
    parser.add_argument("--form", choices=("parquet", "csv"), default="parquet")
    parser.add_argument("--cpus", type=int, default=2)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        from pipeline.data.sources import table_chunks

        table_chunks.LARGE_ROWS = table_chunks.LARGE_BYTES = 1
        print(json.dumps(measure(options.millions[0], options.form, options.cpus)))
        return
    print(f"{date.today()}, load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    for millions in options.millions:
        command = [sys.executable, __file__, "--one", "--millions", str(millions), "--form", options.form]
        done = subprocess.run([*command, "--cpus", str(options.cpus)], stdout=subprocess.PIPE, text=True, check=True)
        print(done.stdout.strip().splitlines()[-1], flush=True)


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    main()
