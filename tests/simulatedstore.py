"""A store that keeps no files: names and contents are computed from their numbers, with the page size and the latency of S3.

    simulatedstore.register()                    # in this process; ray.init(runtime_env=WORKERS) does it in Ray's workers
    listing.list_source("sim://flat-10000000-80/photos")

The bucket is LAYOUT-COUNT-MILLISECONDS of latency. Layouts: "flat" (decimal numbers in one folder), "hex" (16 hex digits in one
folder), "nested" (folders of 1,300 files), "skewed" (one folder has nearly all), "chain" (each of the first names begins
the next), "mixed" (also hidden and system files, and names beyond ASCII). `folders-` before the layout: a store that does
not list by name. A line in the file that $SIMULATED_REQUESTS names is written for every page; $SIMULATED_FAULTS=N: every Nth page of a process is answered by
status 503.
"""

import bisect
import functools
import os
import time
from typing import Any

import cv2
import numpy as np

from pipeline.stores import SCHEMES
from pipeline.stores.base import After, Entry, ObjectStore, split, split_folder

PAGE = 1000


def _flat(i: int, count: int) -> str:
    return f"{i:010d}.jpg"


def _hex(i: int, count: int) -> str:
    return f"{i * (1 << 64) // count:016x}.jpg"


def _nested(i: int, count: int) -> str:
    return f"n{i // 1300:08d}/n{i // 1300:08d}_{i % 1300:05d}.JPEG"


def _skewed(i: int, count: int) -> str:
    edge = count // 100
    if i < edge:
        return f"a{i // 10:06d}/{i % 10}.jpg"
    if i < count - edge:
        return f"everything/else/is/in/this/folder/photo-{i:012d}.jpg"
    return f"z/{i:09d}/1.jpg"


def _chain(i: int, count: int) -> str:
    return "a" * (i + 1) if i < 40 else f"{'a' * 40}{i:09d}.png"


def _mixed(i: int, count: int) -> str:
    kind, number = i * 8 // count, f"{i:09d}"
    return (
        ".git/{}",
        "a/__MACOSX/{}.jpg",
        "b b/{}.jpg",
        "b-c/{}.tmp",
        "c/{}.png",
        "d#?/{}.jpg",
        "ü/{}.jpg",
        "日本/{}😀.jpg",
    )[kind].format(number)


LAYOUTS = {"flat": _flat, "hex": _hex, "nested": _nested, "skewed": _skewed, "chain": _chain, "mixed": _mixed}


class Refused(OSError):
    """A response with status 503."""


class SimulatedStore(ObjectStore):
    EXAMPLE = "sim://flat-1000-0/photos"
    WRITABLE = False
    ACCESS = REMEDY = "correct the test"

    def __init__(self) -> None:
        super().__init__()
        self.requests = 0

    @classmethod
    def lists_by_name(cls, uri: str) -> bool:
        return not split(uri)[0].startswith("folders-")

    def _page(self, uri: str, recursive: bool, token: Any, limit: int | None) -> tuple[list[Entry], Any]:
        bucket, prefix = split_folder(uri)
        assert not isinstance(token, After) or self.lists_by_name(uri)
        self._wait(bucket)
        below = prefix.partition("/")[2]  # the first folder is any
        find = functools.partial(_index, bucket)
        layout, count, _ = _parts(bucket)
        start, limit = len(below), min(limit or PAGE, PAGE)
        i = find(below + token, True) if token else find(below, False)
        found: list[Entry] = []
        while i < count and len(found) < limit and (name := layout(i, count)).startswith(below):
            if recursive or "/" not in name[start:]:
                found.append(Entry(name[start:], 1 + i % 1000, ""))
                i += 1
            else:
                folder = name[start:].partition("/")[0]
                found.append(Entry(folder, 0, "", is_folder=True))
                i = find(f"{below}{folder}0", False)  # 0 follows /
        last = f"{found[-1].path}{'/' + chr(0x10FFFF) if found[-1].is_folder else ''}" if found else ""
        more = i < count and layout(i, count).startswith(below)
        return found, last if more else None

    def _wait(self, bucket: str) -> None:
        with self._lock:
            self.requests += 1
            refused = self.requests % int(os.environ.get("SIMULATED_FAULTS", 1 << 60)) == 0
        time.sleep(_parts(bucket)[2] / 1000)
        if refused:
            raise Refused("503")
        if path := os.environ.get("SIMULATED_REQUESTS"):
            with open(path, "a") as file:
                file.write(".")

    def _get(self, uri: str, start: int, end: int | None, exact: bool) -> bytes:
        time.sleep(_parts(split(uri)[0])[2] / 1000)
        return _photo(hash(uri) % 64)[start:end]

    def _head(self, uri: str) -> Entry:
        raise FileNotFoundError(f"{uri}: no such file")

    def _status(self, error: Exception) -> int:
        return 503 if isinstance(error, Refused) else 0

    def _may_pass(self, error: Exception) -> bool:
        return isinstance(error, Refused)


@functools.cache
def _parts(bucket: str) -> tuple[Any, int, float]:
    layout, count, latency = bucket.removeprefix("folders-").split("-")
    return LAYOUTS[layout], int(count), float(latency)


def _name(bucket: str, i: int) -> str:
    layout, count, _ = _parts(bucket)
    return layout(i, count)


def _index(bucket: str, name: str, after: bool) -> int:
    """The number of the first name that is not smaller, or greater."""
    search = bisect.bisect_right if after else bisect.bisect_left
    return search(range(_parts(bucket)[1]), name, key=functools.partial(_name, bucket))


@functools.cache
def _photo(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (8, 8, 3), np.uint8)
    return cv2.imencode(".jpg", cv2.resize(pixels, (64, 64)))[1].tobytes()


def register() -> None:
    """Makes sim:// known to this process."""
    SCHEMES["sim"] = SimulatedStore
