"""An index of the hashes of evaluation sets, which `prepare` searches for every image of the corpus."""

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
from pipeline.data.duplicates.candidates import ALIGNMENTS, PERCEPTUAL, PIXELS, Removal
from pipeline.data.duplicates.hashes import VIEW, Hashes, compare_bits, hash_image, join_keys
from pipeline.data.duplicates.report import DUPLICATES, PAIRS
from pipeline.data.duplicates.verification import Agreement, compare_views, small_copy
from pipeline.data.format import MANIFEST, REJECTS, open_dataset
from pipeline.data.format.describe import thumbnail
from pipeline.errors import UserError, plural
from pipeline.revision_names import split_address

MAX_PROPOSALS = 8  # evaluation images that are compared in detail with one image
MAX_ENTRIES = 256  # views per join key that are compared
BLOCK = 16  # maximum number of pixel rows that JPEG decodes together
DAMAGED = ("corrupt", "truncated")  # reasons of codecs.decode for which a lenient decoder may still return an image
logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationIndex:
    """The hashes of all images of the evaluation sets."""

    sets: list[str]
    count: int  # number of images that were read
    keys: pa.Array  # key of each entry; an entry is an image, or a part of a damaged image
    pictures: pa.Array  # encoded small copies
    set_of: np.ndarray  # (entries,) position in `sets`
    exact: np.ndarray  # (entries,) pixel hashes, sorted
    exact_image: np.ndarray  # (entries,) entry of each hash in `exact`
    views: np.ndarray  # dtype VIEW
    joins: np.ndarray  # join keys of all views, sorted
    view_of: np.ndarray  # view of each join key

    def find(self, hashed: Hashes, pixels_HWC: np.ndarray, distance: int) -> "EvaluationMatch | None":
        """The evaluation image that an image duplicates, or None: an image with equal pixels, or else the nearest image
        that has a view within `distance` bits and that verification confirms."""
        at = int(np.searchsorted(self.exact, np.uint64(hashed.exact)))
        if at < len(self.exact) and int(self.exact[at]) == hashed.exact:
            return EvaluationMatch(int(self.exact_image[at]), 0, True, Agreement(0, detail=1.0, difference=0.0), b"")
        proposals = self.propose(hashed, distance)
        mine = small_copy(pixels_HWC) if proposals else b""
        for proposal in proposals:
            box, other_box = hashed.views["box"][proposal.view], self.views["box"][proposal.other_view]
            picture = self.pictures[proposal.image].as_py()
            agreement = compare_views(mine, picture, box, other_box, proposal.mirrored)
            if agreement.same:
                return EvaluationMatch(proposal.image, proposal.hamming, False, agreement, mine)
        return None

    def propose(self, hashed: Hashes, distance: int) -> list["Proposal"]:
        """The nearest pairs of views, for at most MAX_PROPOSALS images, with at most ALIGNMENTS pairs per image."""
        if not len(hashed.views) or not len(self.joins):
            return []
        views, joins = join_keys(hashed.views)
        begins = np.searchsorted(self.joins, joins, side="left")
        counts = np.minimum(np.searchsorted(self.joins, joins, side="right") - begins, MAX_ENTRIES)
        entries = np.repeat(begins - np.cumsum(counts) + counts, counts) + np.arange(counts.sum())
        pairs = np.unique(np.stack([np.repeat(views, counts), self.view_of[entries]]), axis=1)
        hamming, mirrored = compare_bits(hashed.views["bits"][pairs[0]], self.views["bits"][pairs[1]])
        images = self.views["image"][pairs[1]]
        good = np.flatnonzero(hamming <= distance)
        found: dict[int, list[Proposal]] = {}
        for i in good[np.argsort(hamming[good], kind="stable")].tolist():
            image = int(images[i])
            if image in found or len(found) < MAX_PROPOSALS:
                alignments = found.setdefault(image, [])
                if len(alignments) < ALIGNMENTS:
                    view, other = int(pairs[0, i]), int(pairs[1, i])
                    alignments.append(Proposal(image, view, other, bool(mirrored[i]), int(hamming[i])))
        return [proposal for alignments in found.values() for proposal in alignments]

    def name(self, image: int) -> tuple[str, str]:
        """(set, key) of an image."""
        return self.sets[self.set_of[image]], self.keys[image].as_py()


class Proposal(NamedTuple):
    """A view of an image that is similar to a view of an evaluation image."""

    image: int
    view: int
    other_view: int
    mirrored: bool
    hamming: int  # bits


class EvaluationMatch(NamedTuple):
    """A match between an image and an evaluation set."""

    image: int
    distance: int  # bits
    exact: bool
    agreement: Agreement
    picture: bytes  # small copy of the query image; empty when exact

    def record(self, key: str, index: EvaluationIndex) -> dict[str, Any]:
        """The row of duplicates.parquet for the image `key`."""
        uri, name = index.name(self.image)
        kind, agreement = PIXELS if self.exact else PERCEPTUAL, self.agreement
        why = Removal(self.image, kind, self.distance, 0.0, agreement.detail, agreement.difference)
        return why.record(key, name, uri)


def index_evaluation_sets(uris: Sequence[str], max_pixels: int) -> EvaluationIndex:
    """Hashes every image of the evaluation sets: prepared datasets, folders of datasets, or any source that `prepare`
    reads.

    Raises UserError for a set that is missing or has no readable images.
    """
    jobs: list[tuple[int, Any, int]] = []
    for number, uri in enumerate(uris):
        jobs.extend((number, part, max_pixels) for part in parts_of_set(uri))
    parts = workqueue.map_tasks(_hash_part, jobs)
    set_of = np.concatenate(
        [np.full(len(part.keys), job[0], np.int32) for job, part in zip(jobs, parts, strict=True)]
        or [np.empty(0, np.int32)]
    )
    for number, uri in enumerate(uris):
        _check_readable(uri, [part for job, part in zip(jobs, parts, strict=True) if job[0] == number])
    keys = [key for part in parts for key in part.keys]
    exact = np.concatenate([part.exact for part in parts])
    starts = np.cumsum([0, *(len(part.keys) for part in parts)])
    for part, start in zip(parts, starts.tolist(), strict=False):
        part.views["image"] += start
    views = np.concatenate([part.views for part in parts])
    view_of, joins = join_keys(views)
    order, ranks = np.argsort(joins, kind="stable"), np.argsort(exact, kind="stable")
    return EvaluationIndex(
        sets=list(uris),
        count=sum(part.images for part in parts),
        keys=pa.array(keys, pa.large_string()),
        pictures=pa.array([picture for part in parts for picture in part.pictures], pa.large_binary()),
        set_of=set_of,
        exact=exact[ranks],
        exact_image=ranks,
        views=views,
        joins=joins[order],
        view_of=view_of[order].astype(np.int32),
    )


def parts_of_set(uri: str) -> Iterator[Any]:
    """Parts of an evaluation set, for parallel hashing: (dataset URI, row group) or (source, first fragment,
    fragments)."""
    if split_address(uri)[1] is not None:
        yield from ((uri, group) for group in range(len(open_dataset(uri).row_groups)))
        return
    folders = [f.path[: -len(MANIFEST)] for f in storage.list_files(uri) if f.path.rpartition("/")[2] == MANIFEST]
    for folder in folders:
        dataset = f"{uri}/{folder}".rstrip("/")
        yield from ((dataset, group) for group in range(len(open_dataset(dataset).row_groups)))
    if not folders:
        found = sources.discover([uri], need_names=False, unlabelled=True)
    elif "" not in folders:
        found = _beside_datasets(uri, folders)
    else:
        return
    for source in found:
        step = 512 if source.one_image_per_fragment else 1
        yield from ((source, first, step) for first in range(0, source.fragments.num_rows, step))


def _beside_datasets(uri: str, folders: Sequence[str]) -> list[sources.Source]:
    """Images and archives that are not in the folders of datasets, whose paths end in a slash. Reports of `prepare` are
    none."""
    files = sources.list_source(uri)
    keep = [
        not path.startswith(tuple(folders)) and path.rpartition("/")[2] not in (REJECTS, DUPLICATES, PAIRS)
        for path in files["path"].to_pylist()
    ]
    found = sources.discover_unlabelled(uri, files.filter(pa.array(keep, pa.bool_())))
    for source in found:
        logger.info(
            "--decontaminate %s: %s of format %s beside the datasets are part of the set, such as %s", uri,
            plural(source.fragments.num_rows, "fragment"), source.kind, source.fragments["path"][0].as_py(),
        )  # fmt: skip
    return found


def read_part(part: Any, max_pixels: int) -> Iterator[tuple[str, np.ndarray | None, str]]:
    """(key, RGB pixels, "") of every image of one part, or (key, None, why it cannot be read).

    A damaged image that can still be decoded is returned whole and once for each of its `undamaged_parts`, with the
    same key, because evaluation code may decode it as well."""
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
            yield from ((item.key, *decoded) for decoded in _decode(item.image, max_pixels))


def _decode(data: bytes, max_pixels: int) -> Iterator[tuple[np.ndarray | None, str]]:
    try:
        yield codecs.decode(data, max_pixels, math.inf).pixels, ""
    except codecs.Refused as refused:
        pixels = _decode_leniently(data) if refused.reason in DAMAGED else None
        if pixels is None:
            yield None, refused.reason
            return
        yield pixels, ""
        yield from ((part, "") for part in undamaged_parts(pixels))


def undamaged_parts(pixels_HWC: np.ndarray) -> list[np.ndarray]:
    """Upper parts of a damaged image that may be undamaged: files store an image from top to bottom.

    The first part ends above the uniform rows with which decoders replace missing data; the second is the upper half of
    the image. Parts with fewer than BLOCK rows are omitted."""
    height = len(pixels_HWC)
    values = pixels_HWC.astype(np.int16)
    filled = int(np.argmin((np.ptp(values, axis=1) <= 2).all(axis=1)[::-1]))  # rows of one colour at the bottom
    cut = filled > 0 or bool((np.ptp(values[-1, -8:], axis=0) <= 2).all())
    ends = {height - filled - BLOCK if cut else height, height // 2}
    return [pixels_HWC[:end] for end in sorted(ends, reverse=True) if BLOCK <= end < height]


def _decode_leniently(data: bytes) -> np.ndarray | None:
    """RGB pixels of the part of a damaged image that can be decoded, or None."""
    if data.startswith(b"\xff\xd8"):
        with contextlib.suppress(ValueError):
            return simplejpeg.decode_jpeg(data, "RGB", strict=False)
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR) if data else None
    return None if pixels is None else np.ascontiguousarray(pixels[:, :, ::-1])


class _Part(NamedTuple):
    """The hashed images of one part of an evaluation set."""

    images: int  # number of images that were read
    keys: list[str]
    exact: np.ndarray
    views: np.ndarray  # `image` is a position in the part
    pictures: list[bytes]
    unreadable: list[str]  # "key (reason)"


def _hash_part(job: tuple[int, Any, int]) -> _Part:
    _, part, max_pixels = job
    cv2.setNumThreads(1)
    keys: list[str] = []
    found, pictures, unreadable = [], [], []
    for key, pixels, problem in read_part(part, max_pixels):
        if pixels is None:
            unreadable.append(f"{key} ({problem})")
            continue
        found.append(hash_image(pixels))
        found[-1].views["image"] = len(keys)
        keys.append(key)
        pictures.append(small_copy(pixels))
    exact = np.array([h.exact for h in found], np.uint64)
    views = np.concatenate([np.empty(0, VIEW), *(h.views for h in found)])
    return _Part(len(set(keys)), keys, exact, views, pictures, unreadable)


def _check_readable(uri: str, parts: Sequence[_Part]) -> None:
    """Raises UserError for a set without readable images. Warns about images that cannot be read."""
    readable = sum(part.images for part in parts)
    unreadable = [text for part in parts for text in part.unreadable]
    if not readable:
        raise UserError(
            f"--decontaminate {uri}: no readable images{f', such as {unreadable[0]}' if unreadable else ''}"
        )
    if unreadable:
        logger.warning(
            "--decontaminate %s: %d of %d images cannot be read and are therefore not removed from the corpus, such as %s",
            uri, len(unreadable), readable + len(unreadable), unreadable[0],
        )  # fmt: skip
