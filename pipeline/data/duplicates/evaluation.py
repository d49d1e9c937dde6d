"""The images of evaluation sets, hashed: looked up while a corpus is prepared."""

import contextlib
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import cv2
import numpy as np
import pyarrow as pa
import simplejpeg

from pipeline import storage, workqueue
from pipeline.data import codecs, sources
from pipeline.data.duplicates.hashes import BANDS, MIRROR, VIEWS, Hashes, hamming, hash_image
from pipeline.data.duplicates.verification import compare_views, small_copy
from pipeline.data.format import MANIFEST, open_dataset
from pipeline.data.format.describe import thumbnail
from pipeline.errors import UserError

MOST_PROPOSALS = 8
DAMAGED = ("corrupt", "truncated")  # reasons of codecs.decode for which lenient decoders may still give a picture
logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationIndex:
    """The hashes of evaluation sets, to look images up in. An entry is one view of an image, mirrored or not."""

    sets: list[str]
    keys: pa.Array
    pictures: pa.Array  # small copies, encoded
    set_of: np.ndarray  # (images,)
    exact: np.ndarray  # (images,) sorted
    exact_image: np.ndarray
    bits: np.ndarray  # (entries, 2)
    image: np.ndarray  # (entries,)
    whole: np.ndarray  # (entries,) bool: not a crop
    starts: np.ndarray  # (BANDS, 65537): where the entries of each band value begin in `order`
    order: np.ndarray  # (BANDS, entries)

    def find(self, hashed: Hashes, pixels_HWC: np.ndarray, distance: int) -> "EvaluationMatch | None":
        """The evaluation image that an image repeats: the one with the same pixels, or the nearest of those whose hashes differ
        in at most `distance` bits and that the second look confirms. None without one."""
        at = int(np.searchsorted(self.exact, np.uint64(hashed.exact)))
        if at < len(self.exact) and int(self.exact[at]) == hashed.exact:
            return EvaluationMatch(int(self.exact_image[at]), 0, 1.0, True, b"")
        proposals = self.propose(hashed, distance)
        mine = small_copy(pixels_HWC) if proposals else b""
        for image, view, other_view, mirrored, apart in proposals:
            agreement = compare_views(mine, self.pictures[image].as_py(), view, other_view, mirrored)
            if agreement.same:
                return EvaluationMatch(image, apart, agreement.detail, False, mine)
        return None

    def propose(self, hashed: Hashes, distance: int) -> list[tuple[int, int, int, bool, int]]:
        """At most MOST_PROPOSALS images whose hashes are near, nearest first: (image, view of ours, view of its, mirrored, bits).

        A whole image is compared with whole images and with crops; crops are not compared with crops.
        """
        if hashed.flat or not len(self.bits):
            return []
        bands = hashed.bits.view(np.uint16)  # (views, BANDS)
        entries, views = [], []
        for values in bands.tolist():
            for band, value in enumerate(values):
                part = self.order[band, self.starts[band, value] : self.starts[band, value + 1]]
                entries.append(part)
                views.append(len(part))
        entry = np.concatenate(entries)
        view: np.ndarray = np.repeat(np.arange(len(hashed.bits)), np.reshape(views, (-1, BANDS)).sum(1))
        apart = hamming(self.bits[entry], hashed.bits[view])
        good = np.flatnonzero((apart <= distance) & ((view == 0) | self.whole[entry]))
        found: dict[int, tuple[int, int, int, bool, int]] = {}
        for i in good[np.argsort(apart[good], kind="stable")].tolist():
            image, place = int(self.image[entry[i]]), int(entry[i]) % (2 * VIEWS)
            if image not in found:
                found[image] = (image, int(view[i]), place // 2, bool(place % 2), int(apart[i]))
                if len(found) == MOST_PROPOSALS:
                    break
        return list(found.values())

    def name(self, image: int) -> tuple[str, str]:
        """(set, key) of an image."""
        return self.sets[self.set_of[image]], self.keys[image].as_py()


class EvaluationMatch(NamedTuple):
    """The image of an evaluation set that an image repeats."""

    image: int
    distance: int  # bits
    detail: float  # correlation of detail, 1.0 when the pixels are the same
    exact: bool
    picture: bytes  # small copy of the image that was looked up; empty when exact

    def record(self, key: str, index: EvaluationIndex) -> dict[str, Any]:
        """The line of duplicates.parquet about the image `key`."""
        uri, name = index.name(self.image)
        reason = "exact" if self.exact else "near"
        detail = round(self.detail, 3)
        return {"key": key, "reason": reason, "set": uri, "match": name, "distance": self.distance, "detail": detail}


def index_evaluation_sets(uris: Sequence[str], max_pixels: int) -> EvaluationIndex:
    """Hashes every image of evaluation sets: prepared datasets, folders of them, or anything that `prepare` reads.

    Raises UserError for a set that is missing or has no readable image.
    """
    jobs: list[tuple[int, Any, int]] = []
    for number, uri in enumerate(uris):
        jobs.extend((number, part, max_pixels) for part in _parts(uri))
    parts = workqueue.map_tasks(_hash_part, jobs)
    set_of = np.concatenate(
        [np.full(len(part.keys), job[0], np.int32) for job, part in zip(jobs, parts, strict=True)]
        or [np.empty(0, np.int32)]
    )
    for number, uri in enumerate(uris):
        _check_readable(uri, [part for job, part in zip(jobs, parts, strict=True) if job[0] == number])
    keys = [key for part in parts for key in part.keys]
    exact = np.concatenate([part.exact for part in parts])
    bits = np.concatenate([part.bits for part in parts])  # (images, VIEWS, 2)
    flat = np.concatenate([part.flat for part in parts])
    entries = np.stack([bits, bits ^ MIRROR], axis=2)[~flat]  # (images, VIEWS, 2 mirrored, 2)
    rows = np.ascontiguousarray(entries.reshape(-1, 2))
    values = rows.view(np.uint16).reshape(-1, BANDS)
    order = np.stack([np.argsort(values[:, band], kind="stable").astype(np.int32) for band in range(BANDS)])
    edges = np.arange(65_537)
    starts = np.stack([np.searchsorted(values[order[band], band], edges) for band in range(BANDS)])
    ranks = np.argsort(exact, kind="stable")
    return EvaluationIndex(
        sets=list(uris),
        keys=pa.array(keys, pa.large_string()),
        pictures=pa.array([picture for part in parts for picture in part.pictures], pa.large_binary()),
        set_of=set_of,
        exact=exact[ranks],
        exact_image=ranks,
        bits=rows,
        image=np.repeat(np.flatnonzero(~flat).astype(np.int32), VIEWS * 2),
        whole=np.tile(np.arange(VIEWS * 2) < 2, len(entries)),
        starts=starts.astype(np.int32),
        order=order,
    )


def _parts(uri: str) -> Iterator[Any]:
    """Parts of an evaluation set, for parallel hashing: (dataset URI, row group) or (source, first fragment, fragments)."""
    datasets = [f.uri for f in storage.list_files(uri) if f.path.rpartition("/")[2] == MANIFEST]
    for manifest in datasets:
        folder = manifest.rpartition("/")[0]
        yield from ((folder, group) for group in range(len(open_dataset(folder).row_groups)))
    if not datasets:
        for source in sources.discover([uri], need_names=False, unlabelled=True):
            step = 512 if source.listed else 1
            yield from ((source, first, step) for first in range(0, source.fragments.num_rows, step))


def read_part(part: Any, max_pixels: int) -> Iterator[tuple[str, np.ndarray | None, str]]:
    """(key, RGB pixels, "") of every image of one part, or (key, None, why it cannot be read).

    An image that is damaged but can be decoded is one: whoever evaluates on the set sees it, too.
    """
    if isinstance(part[0], str):
        dataset = open_dataset(part[0])
        group = dataset.read_row_group(part[1])
        for key, image in zip(group.keys, group.images, strict=True):
            yield key, thumbnail(dataset, image), ""
        return
    source, first, count = part
    for item in sources.read(source, source.fragments.slice(first, count)):
        if isinstance(item.image, np.ndarray):
            yield item.key, item.image, ""
        elif item.refused:
            yield item.key, None, item.refused.reason
        else:
            yield item.key, *_decode(item.image, max_pixels)


def _decode(data: bytes, max_pixels: int) -> tuple[np.ndarray | None, str]:
    try:
        return codecs.decode(data, max_pixels, math.inf).pixels, ""
    except codecs.Refused as refused:
        if refused.reason not in DAMAGED:
            return None, refused.reason
        pixels = _decode_leniently(data)
        return (None, refused.reason) if pixels is None else (pixels, "")


def _decode_leniently(data: bytes) -> np.ndarray | None:
    """What a viewer shows of a damaged image: RGB pixels, or None."""
    if data.startswith(b"\xff\xd8"):
        with contextlib.suppress(ValueError):
            return simplejpeg.decode_jpeg(data, "RGB", strict=False)
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR) if data else None
    return None if pixels is None else np.ascontiguousarray(pixels[:, :, ::-1])


class _Part(NamedTuple):
    """The hashed images of one part of an evaluation set."""

    keys: list[str]
    exact: np.ndarray
    bits: np.ndarray
    flat: np.ndarray
    pictures: list[bytes]
    unreadable: list[str]  # "key (reason)"


def _hash_part(job: tuple[int, Any, int]) -> _Part:
    _, part, max_pixels = job
    cv2.setNumThreads(1)
    keys, found, pictures, unreadable = [], [], [], []
    for key, pixels, problem in read_part(part, max_pixels):
        if pixels is None:
            unreadable.append(f"{key} ({problem})")
            continue
        keys.append(key)
        found.append(hash_image(pixels, crops=True))
        pictures.append(small_copy(pixels))
    exact = np.array([h.exact for h in found], np.uint64)
    bits = np.array([h.bits for h in found], np.uint64).reshape(-1, VIEWS, 2)
    return _Part(keys, exact, bits, np.array([h.flat for h in found], bool), pictures, unreadable)


def _check_readable(uri: str, parts: Sequence[_Part]) -> None:
    """Raises UserError for a set without a readable image; warns with the number of images that cannot be kept out."""
    readable = sum(len(part.keys) for part in parts)
    unreadable = [text for part in parts for text in part.unreadable]
    if not readable:
        raise UserError(
            f"--decontaminate {uri}: not one readable image{f', such as {unreadable[0]}' if unreadable else ''}"
        )
    if unreadable:
        logger.warning(
            "--decontaminate %s: %d of %d images cannot be read and are not kept out, such as %s",
            uri, len(unreadable), readable + len(unreadable), unreadable[0],
        )  # fmt: skip
