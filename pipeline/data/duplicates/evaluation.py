"""The images of evaluation sets, hashed: looked up while a corpus is prepared."""

import base64
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import pyarrow as pa

from pipeline import storage, workqueue
from pipeline.data import format as shards
from pipeline.data import images, sources
from pipeline.data.duplicates.hashes import BANDS, BITS, MIRROR, VIEWS, Hashes, hamming, hash_image
from pipeline.data.duplicates.report import small_picture
from pipeline.data.format.describe import thumbnail
from pipeline.errors import UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationIndex:
    """The hashes of evaluation sets, to look images up in. An entry is one view of an image, mirrored or not."""

    sets: list[str]
    keys: pa.Array
    set_of: np.ndarray  # (images,)
    exact: np.ndarray  # (images,) sorted
    exact_image: np.ndarray
    bits: np.ndarray  # (entries, 2)
    image: np.ndarray  # (entries,)
    whole: np.ndarray  # (entries,) bool: not a crop
    starts: np.ndarray  # (BANDS, 65537): where the entries of each band value begin in `order`
    order: np.ndarray  # (BANDS, entries)

    def find(self, found: Hashes, distance: int) -> tuple[int, int, bool] | None:
        """(image, bits that differ, whether the pixels are the same) of the nearest image within `distance`, or None.

        A whole image is compared with whole images and with crops; crops are not compared with crops."""
        at = int(np.searchsorted(self.exact, np.uint64(found.exact)))
        if at < len(self.exact) and int(self.exact[at]) == found.exact:
            return int(self.exact_image[at]), 0, True
        if found.flat or not len(self.bits):
            return None
        bands = found.bits.view(np.uint16)  # (views, BANDS)
        entries, views = [], []
        for values in bands.tolist():
            for band, value in enumerate(values):
                part = self.order[band, self.starts[band, value] : self.starts[band, value + 1]]
                entries.append(part)
                views.append(len(part))
        entry = np.concatenate(entries)
        if not len(entry):
            return None
        view: np.ndarray = np.repeat(np.arange(len(found.bits)), np.reshape(views, (-1, BANDS)).sum(1))
        apart = hamming(self.bits[entry], found.bits[view])
        apart[(view > 0) & ~self.whole[entry]] = BITS + 1
        best = int(apart.argmin())
        return (int(self.image[entry[best]]), int(apart[best]), False) if apart[best] <= distance else None

    def name(self, image: int) -> tuple[str, str]:
        """(set, key) of an image."""
        return self.sets[self.set_of[image]], self.keys[image].as_py()


def removal_record(
    key: str, picture: np.ndarray, match: tuple[int, int, bool], index: EvaluationIndex
) -> dict[str, Any]:
    """The record of an image that an evaluation set holds, with a thumbnail for the contact sheet."""
    found, distance, exact = match
    uri, name = index.name(found)
    thumbnail = cv2.imencode(".jpg", small_picture(picture)[:, :, ::-1])[1].tobytes()
    record = {"key": key, "reason": "exact" if exact else "near", "set": uri, "match": name, "distance": distance}
    return record | {"thumbnail": base64.b64encode(thumbnail).decode()}


def index_evaluation_sets(uris: Sequence[str], max_pixels: int) -> EvaluationIndex:
    """Hashes every image of evaluation sets: prepared datasets, folders of them, or anything that `prepare` reads.

    Raises UserError for a set that is missing or has no readable image.
    """
    jobs: list[tuple[int, Any, int]] = []
    for number, uri in enumerate(uris):
        jobs.extend((number, part, max_pixels) for part in _parts(uri))
    parts = workqueue.map_tasks(_hash_part, jobs)
    keys = [key for part in parts for key in part[0]]
    if not keys:
        raise UserError(f"--decontaminate {' '.join(uris)}: not one readable image")
    set_of = np.concatenate([np.full(len(part[0]), job[0], np.int32) for job, part in zip(jobs, parts, strict=True)])
    exact = np.concatenate([part[1] for part in parts])
    bits = np.concatenate([part[2] for part in parts])  # (images, VIEWS, 2)
    flat = np.concatenate([part[3] for part in parts])
    empty = [uri for number, uri in enumerate(uris) if not (set_of == number).any()]
    if empty:
        raise UserError(f"--decontaminate {empty[0]}: not one readable image")
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
    datasets = [f.uri for f in storage.list_files(uri) if f.path.rpartition("/")[2] == shards.MANIFEST]
    for manifest in datasets:
        folder = manifest.rpartition("/")[0]
        yield from ((folder, group) for group in range(len(shards.open_dataset(folder).row_groups)))
    if not datasets:
        for source in sources.discover([uri], need_names=False):
            step = 512 if source.listed else 1
            yield from ((source, first, step) for first in range(0, source.pieces.num_rows, step))


def read_part(part: Any, max_pixels: int) -> Iterator[tuple[str, np.ndarray]]:
    """(key, RGB pixels) of one part; images that do not decode are left out."""
    if isinstance(part[0], str):
        dataset = shards.open_dataset(part[0])
        group = dataset.read_row_group(part[1])
        for key, image in zip(group.keys, group.images, strict=True):
            yield key, thumbnail(dataset, image)
        return
    source, first, count = part
    for item in sources.read(source, source.pieces.slice(first, count)):
        if isinstance(item.image, np.ndarray):
            yield item.key, item.image
        elif not item.refused:
            try:
                yield item.key, images.decode(item.image, max_pixels).pixels
            except images.Refused:
                continue


def _hash_part(job: tuple[int, Any, int]) -> tuple[list[str], np.ndarray, np.ndarray, np.ndarray]:
    _, part, max_pixels = job
    cv2.setNumThreads(1)
    keys, found = [], []
    for key, pixels in read_part(part, max_pixels):
        keys.append(key)
        found.append(hash_image(pixels, crops=True))
    exact = np.array([h.exact for h in found], np.uint64)
    bits = np.array([h.bits for h in found], np.uint64).reshape(-1, VIEWS, 2)
    return keys, exact, bits, np.array([h.flat for h in found], bool)


def find_picture(uri: str, key: str, max_pixels: int) -> np.ndarray | None:
    """The picture of a key in an evaluation set. It searches the set: only for the few that a contact sheet shows."""
    for part in _parts(uri):
        for name, pixels in read_part(part, max_pixels):
            if name == key:
                return small_picture(pixels).copy()
    return None
