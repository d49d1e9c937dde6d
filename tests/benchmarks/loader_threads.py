"""How many images per second the threads of one `Loader` process deliver, on a machine with fewer cores than threads.

    python tests/benchmarks/loader_threads.py                       1 to 64 threads; writes results/loader_threads.json

Each image is a JPEG of 32x32 pixels, whose decoding and augmentation run all of the loader's Python code and take little time,
plus a sleep in place of the work on pixels of a photograph. Like that work, a sleep does not hold Python's interpreter lock, but
needs no core. So the rates are those of a machine with a core for each thread, up to the point where the lock, for which
two cores suffice, is the limit. `share` is the rate over that of `threads` loops that only sleep.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))

import cv2  # noqa: E402
import numpy as np  # noqa: E402

RESULTS = HERE / "results" / "loader_threads.json"
SIDE, BATCH, IMAGES = 32, 256, 16384


def make_dataset(folder: str) -> str:
    from pipeline.data.format import write_dataset

    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (64, SIDE, SIDE, 3), dtype=np.uint8)
    jpegs = [cv2.imencode(".jpg", each)[1].tobytes() for each in pixels]
    rows = ((f"{i}", jpegs[i % 64], i % 10, SIDE, SIDE) for i in range(IMAGES))
    write_dataset(folder, rows, classes=[str(k) for k in range(10)], row_group_bytes=1 << 18)
    return folder


def rate(data: str, threads: int, work_ms: float, augment: str, seconds: float) -> float:
    """Images per second of a loader, after its first batches."""
    from pipeline.data import Loader, open_dataset
    from pipeline.data.loading import loader as module
    from pipeline.data.loading.augment import Augment

    decode = module.decode_stored

    def decode_and_sleep(stored: bytes) -> np.ndarray:
        if work_ms:
            time.sleep(work_ms / 1e3)
        return decode(stored)

    module.decode_stored = decode_and_sleep
    count = 0
    options = (
        Augment(size=SIDE, randaug_layers=2, randaug_magnitude=10) if augment == "RandAugment" else Augment(size=SIDE)
    )
    with Loader(open_dataset(data), batch_size=BATCH, threads=threads, augment=options) as loader:
        begin = None
        while True:
            for i, batch in enumerate(loader):
                if begin is None and i == 2:
                    begin, count = time.perf_counter(), 0
                elif begin is not None:
                    count += len(batch["label"])
                    if time.perf_counter() - begin > seconds:
                        return count / (time.perf_counter() - begin)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--work-ms", type=float, default=2.0, help="the sleep, milliseconds per image")
    parser.add_argument("--seconds", type=float, default=5, help="length of each measurement")
    parser.add_argument("--measure", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        data, threads, work_ms, augment = options.measure
        print(rate(data, int(threads), float(work_ms), augment, options.seconds), flush=True)
        os._exit(0)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        data = make_dataset(f"{folder}/data")
        for augment in ("crop and flip", "RandAugment"):
            for threads in options.threads:
                words = [sys.executable, __file__, "--seconds", options.seconds, "--measure", data, threads]
                words += [options.work_ms, augment]
                done = subprocess.run(list(map(str, words)), capture_output=True, text=True, check=True)
                images = float(done.stdout.split()[-1])
                share = images / (threads * 1e3 / options.work_ms)
                rows.append({"augment": augment, "threads": threads, "images_per_s": round(images)})
                rows[-1]["share"] = round(share, 2)
                print(rows[-1], flush=True)
    result = {
        "command": f"python tests/benchmarks/loader_threads.py --work-ms {options.work_ms}",
        "host": {"machine": platform.machine(), "cpus": os.cpu_count(), "load": [round(x, 1) for x in os.getloadavg()]},
        "date": time.strftime("%Y-%m-%d"),
        "rows": rows,
    }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
