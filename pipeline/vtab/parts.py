"""Units of work: a worker reads the images of one part of an archive and writes them to their splits."""

import math
from dataclasses import asdict, dataclass
from typing import Any

import cv2
import numpy as np

from pipeline import storage
from pipeline.config import fingerprint
from pipeline.data import codecs
from pipeline.data.format import Reject, Schema, ShardWriter
from pipeline.errors import UserError
from pipeline.vtab import tasks
from pipeline.vtab.datasets.base import ArchiveFile
from pipeline.vtab.examples import read_images
from pipeline.vtab.plan import Example, TaskPlan

SMALL = (
    "train800",
    "val200",
    "train800val200",
)  # held in memory while an archive streams by, written in official order
SLICE = 1024  # images of a random-access archive in one part
MAX_PIXELS = 200_000_000
MAX_HELD_BYTES = (
    640 << 20
)  # of the images of a small split, which wait in memory; 800 photographs of SUN397 have 300 MB

Row = tuple[int, Example]  # (position in the split, example)


@dataclass(frozen=True, kw_only=True, slots=True)
class ArchivePart:
    """Some members of one archive file. rows: the rows of each split."""

    task: str
    output: str
    identity: dict[str, Any]
    strict: bool
    number: int
    file: ArchiveFile
    rows: dict[str, list[Row]]

    @property
    def name(self) -> str:
        """A name that depends on the contents, so that a receipt never matches other data."""
        content = [self.identity, self.file.uri, self.file.prefix, self.file.part, self.rows]
        return f"{self.task}-{self.number:05d}-{fingerprint(content)}"


def split_uri(plan: TaskPlan | ArchivePart, split: str) -> str:
    return storage.join(plan.output, plan.task, split)


def is_finished(plan: TaskPlan, split: str) -> bool:
    return storage.exists(storage.join(split_uri(plan, split), "manifest.json"))


def cut_parts(plan: TaskPlan) -> list[ArchivePart]:
    """One part per archive file; large splits of random-access files are divided into slices, in archive order.

    Finished splits are skipped.
    """
    parts: list[ArchivePart] = []

    def add(file: ArchiveFile, rows: dict[str, list[Row]]) -> None:
        parts.append(
            ArchivePart(
                task=plan.task, output=plan.output, identity=plan.identity, strict=plan.strict, number=len(parts),
                file=file, rows=rows,
            )
        )  # fmt: skip

    todo = {split: examples for split, examples in plan.examples.items() if not is_finished(plan, split)}
    for number, file in enumerate(plan.files):
        here = {
            split: [(i, example) for i, example in enumerate(examples) if example.file == number]
            for split, examples in todo.items()
        }
        here = {split: rows for split, rows in here.items() if rows}
        large = [split for split in here if split not in SMALL] if file.random_access else []
        together = {split: rows for split, rows in here.items() if split not in large}
        if together:
            add(file, together)
        for split in large:
            rows = sorted(here[split], key=lambda row: row[1].member)
            for first in range(0, len(rows), SLICE):
                add(file, {split: rows[first : first + SLICE]})
    return parts


# ---------------------------------------------------------------- in a worker


def build_part(part: ArchivePart, context: None = None) -> dict[str, Any]:
    """Reads the images of a part and writes shards of their splits. Returns {split: {"receipt", "rejects"}}. Raises
    UserError for a damaged archive, and for a missing image if the plan is strict.
    """
    cv2.setNumThreads(1)
    classes = tasks.get(part.task).classes
    writers = {split: _SplitWriter(part, split, classes) for split in part.rows}
    try:
        _write_images(part, writers)
        for writer in writers.values():
            writer.write_held()
    except BaseException:
        for writer in writers.values():
            writer.shards.abort()
        raise
    for writer in writers.values():
        writer.shards.close()
    return {
        split: {"receipt": writer.shards.receipt.to_dict(), "rejects": writer.rejects}
        for split, writer in writers.items()
    }


def count_rows(receipt: dict[str, Any]) -> int:
    """The number of images that a part has written."""
    return sum(split["receipt"]["rows"] for split in receipt.values())


class _SplitWriter:
    """Writes the rows of one split: large splits in reading order, small ones in official order at the end."""

    def __init__(self, part: ArchivePart, split: str, classes: list[str]) -> None:
        self.part = part
        self.shards = ShardWriter(split_uri(part, split), f"{part.number:05d}", Schema(classes=classes))
        self.rejects: list[dict[str, str]] = []
        self.held: dict[int, tuple] | None = {} if split in SMALL else None
        self.held_bytes = 0

    def write(self, position: int, example: Example, data: bytes, pixels_HWC: np.ndarray | None) -> None:
        """Adds an image, or rejects it if it cannot be decoded."""
        if pixels_HWC is None:
            self.reject(example, "undecodable")
            return
        row = example.key, data, example.label, pixels_HWC.shape[1], pixels_HWC.shape[0]
        self.shards.measure(pixels_HWC)
        if self.held is None:
            self.shards.write(*row)
        else:
            self.held[position] = row
            self.held_bytes += len(data)
            if self.held_bytes > MAX_HELD_BYTES:
                raise UserError(
                    f"{self.part.file.uri}: {len(self.held):,} images have {self.held_bytes:,} bytes in total, more "
                    "than in the official data set"
                )

    def write_held(self) -> None:
        for _, row in sorted((self.held or {}).items()):
            self.shards.write(*row)

    def reject(self, example: Example, reason: str) -> None:
        source = f"{self.part.file.uri}: {example.member}"
        self.rejects.append(asdict(Reject(key=example.key, source=source, reason=reason)))


def _write_images(part: ArchivePart, writers: dict[str, _SplitWriter]) -> None:
    """Reads every member once and hands it to each split that contains it."""
    places: dict[Any, list[tuple[str, int, Example]]] = {}  # {member: ...}; members are all numbers or all names
    for split, rows in part.rows.items():
        for position, example in rows:
            places.setdefault(example.member, []).append((split, position, example))
    for member, data in read_images(part.file, sorted(places)):
        pixels_HWC = decode_pixels(data)
        for split, position, example in places.pop(member):
            writers[split].write(position, example, data, pixels_HWC)
    if places and part.strict:
        raise UserError(
            f"{part.file.uri}: {len(places):,} or more of the listed images are missing from the archive, such as "
            f"{next(iter(places))} (--no-verify skips them)"
        )
    for missing in places.values():
        for split, _, example in missing:
            writers[split].reject(example, "missing")


def decode_pixels(data: bytes) -> np.ndarray | None:
    """uint8 RGB (H, W, 3) of an image file, or None if it cannot be decoded; valid until the next call. Some official
    JPEGs have faults that common decoders tolerate, so an image is valid if OpenCV decodes it.
    """
    try:
        return codecs.decode(
            data, MAX_PIXELS, math.inf
        ).pixels  # images of any aspect ratio are part of the official sets
    except codecs.Refused as refused:
        if refused.reason not in ("corrupt", "truncated"):
            return None
    shown = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
    return None if shown is None else np.asarray(shown)
