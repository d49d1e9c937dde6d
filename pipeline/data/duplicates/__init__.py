"""Duplicates: exact and near, inside a corpus and against evaluation sets.

The ViT paper (section 4.1) removes images of its downstream test sets from the pre-training data, following BiT (appendix C).

Two images are the same when their decoded pixels hash to the same value, and nearly the same when at most `distance` of
128 bits differ: the signs of the 128 lowest frequencies (without the constant one) of the discrete cosine transform of the
image, in grey, squashed to 32x32 by area averaging. Everything is compared at 32x32, so a CIFAR or SVHN image is matched
at its own resolution. A mirrored image has known bits: those of odd horizontal frequency are inverted. Against evaluation
sets, fourteen crops of 90% and 95% of each side are hashed as well, on both sides. docs/decontamination.md has what this finds and misses.

No search compares all pairs. The evaluation sets fit in memory: their hashes, indexed by each of eight 16-bit bands, go to
every worker, and images are looked up while they are prepared. A corpus does not: Ray Data brings rows together that agree
in any two of the eight bands.
"""

import hashlib
import io
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.data import images, sources
from pipeline.data.format import shards
from pipeline.errors import UserError

SIDE, BITS, BANDS = 32, 128, 8
# Crops beside the whole image: (part of each side, where it begins as a part of what is left over)
_CORNERS = [(0.0, 0.0), (0.0, 1.0), (1.0, 0.0), (1.0, 1.0), (0.5, 0.5)]
CROPS = [(0.95, y, x) for y, x in _CORNERS] + [(0.9, y, x) for y in (0.0, 0.5, 1.0) for x in (0.0, 0.5, 1.0)]
VIEWS = 1 + len(CROPS)
# Frequencies by rising order (diagonals of the transform), without the constant one.
_V, _U = np.divmod(np.arange(SIDE * SIDE), SIDE)
_ORDER = np.lexsort((_U, _U + _V))[1 : BITS + 1]
_MIRROR = np.packbits(_U[_ORDER] % 2 == 1).view(np.uint64)
# Two bands are 32 bits, few enough rows to compare at any size of corpus; any two of eight are met by pictures that differ
# in three times as many places as four fixed bands of 32 bits would allow.
BAND_PAIRS = list(itertools.combinations(range(BANDS), 2))
FLAT = 2.0  # standard deviation (of 255) under which a picture has no structure to compare: only exact copies match

DUPLICATES, PAIRS = "duplicates.parquet", "duplicates.png"
# One hashed row: of its key, of its pixels, and its 128 bits; `flat` rows take no part in near matching.
ROW = np.dtype([("key", "u8"), ("exact", "u8"), ("bits", "u8", 2), ("flat", "?"), ("split", "i4")])


class Hashes(NamedTuple):
    """Of one image: 64 bits of its pixels, and (views, 2) uint64 of their look; `flat` says that the look means nothing."""

    exact: int
    bits: np.ndarray
    flat: bool


def hashes(pixels_HWC: np.ndarray, crops: bool = False) -> Hashes:
    """The hashes of an upright RGB image; with `crops`, of its CROPS too."""
    pixels = np.ascontiguousarray(pixels_HWC)
    exact = hashlib.sha256(pixels.data)
    exact.update(repr(pixels.shape).encode())
    height, width = min(160, pixels.shape[0]), min(160, pixels.shape[1])
    small = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA)
    grey = cv2.cvtColor(small, cv2.COLOR_RGB2GRAY)
    boxes = [(0, 0, height, width)]
    if crops:
        for side, y, x in CROPS:
            h, w = max(1, round(height * side)), max(1, round(width * side))
            boxes.append((round(y * (height - h)), round(x * (width - w)), h, w))
    bits = np.empty((len(boxes), BITS), bool)
    flat = False
    for i, (y, x, h, w) in enumerate(boxes):
        square = cv2.resize(grey[y : y + h, x : x + w], (SIDE, SIDE), interpolation=cv2.INTER_AREA).astype(np.float32)
        if i == 0:
            flat = float(square.std()) < FLAT
        bits[i] = cv2.dct(square).ravel()[_ORDER] > 0
    value = int.from_bytes(exact.digest()[:8], "little")
    return Hashes(value, np.packbits(bits, axis=1).view(np.uint64), flat)


def differing(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Bits that differ, over the last axis of two uint64."""
    return np.bitwise_count(a ^ b).sum(-1).astype(np.int64)


# ---------------------------------------------------------------- evaluation sets


@dataclass(frozen=True, kw_only=True, slots=True)
class Index:
    """The hashes of evaluation sets, to look images up in. Entries are (image, view, mirrored or not)."""

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
        """(image, bits that differ, same pixels?) of the nearest image within `distance`, or None. Whole images are compared with whole
        images and with crops of the other, crops are not compared with crops."""
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
        apart = differing(self.bits[entry], found.bits[view])
        apart[(view > 0) & ~self.whole[entry]] = BITS + 1
        best = int(apart.argmin())
        return (int(self.image[entry[best]]), int(apart[best]), False) if apart[best] <= distance else None

    def name(self, image: int) -> tuple[str, str]:
        """(set, key) of an image."""
        return self.sets[self.set_of[image]], self.keys[image].as_py()


def build_index(uris: Sequence[str], max_pixels: int, run: Callable[[Callable, list], Iterable]) -> Index:
    """Hashes every image of some evaluation sets: prepared datasets, folders of them, or anything `prepare` reads.

    `run(function, arguments)` is a parallel map. Raises UserError for a set that is missing or has no readable image.
    """
    jobs: list[tuple[int, Any, int]] = []
    for number, uri in enumerate(uris):
        jobs.extend((number, part, max_pixels) for part in _parts(uri))
    parts = list(run(_hash_part, jobs))
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
    entries = np.stack([bits, bits ^ _MIRROR], axis=2)[~flat]  # (images, VIEWS, 2 mirrored, 2)
    flatland = np.ascontiguousarray(entries.reshape(-1, 2))
    values = flatland.view(np.uint16).reshape(-1, BANDS)
    order = np.stack([np.argsort(values[:, band], kind="stable").astype(np.int32) for band in range(BANDS)])
    edges = np.arange(65_537)
    starts = np.stack([np.searchsorted(values[order[band], band], edges) for band in range(BANDS)])
    ranks = np.argsort(exact, kind="stable")
    return Index(
        sets=list(uris),
        keys=pa.array(keys, pa.large_string()),
        set_of=set_of,
        exact=exact[ranks],
        exact_image=ranks,
        bits=flatland,
        image=np.repeat(np.flatnonzero(~flat).astype(np.int32), VIEWS * 2),
        whole=np.tile(np.arange(VIEWS * 2) < 2, len(entries)),
        starts=starts.astype(np.int32),
        order=order,
    )


def _parts(uri: str) -> Iterator[Any]:
    """Pieces of an evaluation set, for parallel hashing: (dataset URI, row group) or (source, first piece, pieces)."""
    datasets = [f.uri for f in storage.list_files(uri) if f.path.rpartition("/")[2] == shards.MANIFEST]
    for manifest in datasets:
        folder = manifest.rpartition("/")[0]
        yield from ((folder, group) for group in range(len(shards.open_dataset(folder).row_groups)))
    if not datasets:
        for source in sources.discover([uri], need_names=False):
            step = 512 if source.listed else 1
            yield from ((source, first, step) for first in range(0, source.pieces.num_rows, step))


def read_part(part: Any, max_pixels: int) -> Iterator[tuple[str, np.ndarray]]:
    """(key, RGB pixels) of one piece; images that do not decode are no test images and are passed over."""
    if isinstance(part[0], str):
        from pipeline.data.format.describe import thumbnail

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
        found.append(hashes(pixels, crops=True))
    exact = np.array([h.exact for h in found], np.uint64)
    bits = np.array([h.bits for h in found], np.uint64).reshape(-1, VIEWS, 2)
    return keys, exact, bits, np.array([h.flat for h in found], bool)


# ---------------------------------------------------------------- inside a corpus


def emit(table: np.ndarray, unit: int, keys: bool, exact: bool, near: bool) -> dict[str, np.ndarray]:
    """Rows of one unit (dtype ROW) -> one line per way to meet another row: equal `join` values may be duplicates.

    `row` is unit << 32 | row in the unit; `kind` 0 is the key, 1 the pixels, 2 and 3 the look, as it is and mirrored.
    """
    rows = (np.int64(unit) << 32) | np.arange(len(table), dtype=np.int64)
    joins, numbers, bits, kinds = [], [], [], []

    def add(join: np.ndarray, which: np.ndarray, look: np.ndarray, kind: int) -> None:
        joins.append(join)
        numbers.append(rows[which])
        bits.append(look)
        kinds.append(np.full(len(join), kind, np.int8))

    everything = np.arange(len(table))
    if keys:
        add(table["key"], everything, table["bits"], 0)
    if exact or near:
        add(table["exact"], everything, table["bits"], 1)
    if near:
        which = np.flatnonzero(~table["flat"])
        for kind, look in ((2, table["bits"][which]), (3, table["bits"][which] ^ _MIRROR)):
            bands = np.ascontiguousarray(look).view(np.uint16).reshape(-1, BANDS).astype(np.uint64)
            for pair, (i, j) in enumerate(BAND_PAIRS):
                both = bands[:, i] | bands[:, j] << np.uint64(16) | np.uint64(pair + 1) << np.uint64(32)
                add(both * np.uint64(0x9E3779B97F4A7C15), which, look, kind)  # spread: buckets by remainder are even
    look = np.concatenate(bits)
    return {
        "join": np.concatenate(joins),
        "row": np.concatenate(numbers),
        "kind": np.concatenate(kinds),
        "low": look[:, 0],
        "high": look[:, 1],
    }


def meet(lines: dict[str, np.ndarray], distance: int, most: int = 64) -> dict[str, np.ndarray]:
    """Lines of one bucket -> pairs of rows (first < second) that are duplicates: kind 0 key, 1 pixels, 2 look.

    Among many lines of one band value, each is compared with the `most` before it.
    """
    # The kind groups (key, pixels, look) join only within themselves; look and mirrored look join with each other.
    family = np.minimum(lines["kind"], 2)
    order = np.lexsort((lines["row"], lines["join"], family))
    join, row, kind, family = (a[order] for a in (lines["join"], lines["row"], lines["kind"], family))
    bits = np.stack([lines["low"], lines["high"]], axis=1)[order]
    first, second, kinds, apart = [], [], [], []

    def add(a: np.ndarray, b: np.ndarray, d: np.ndarray) -> None:
        first.append(np.minimum(row[a], row[b]))
        second.append(np.maximum(row[a], row[b]))
        kinds.append(family[a])
        apart.append(d)

    # Being the same is transitive: every line of a run is compared with the run's first.
    changes = np.flatnonzero((join[1:] != join[:-1]) | (family[1:] != family[:-1])) + 1
    begins = np.zeros(len(join), np.int64)
    begins[changes] = changes
    begins = np.maximum.accumulate(begins)
    rest = np.flatnonzero((family < 2) & (begins != np.arange(len(join))))
    add(begins[rest], rest, np.zeros(len(rest), np.int64))
    # Looking alike is not.
    looks = np.flatnonzero(family == 2)
    for step in range(1, most + 1):
        a, b = looks[:-step], looks[step:]
        same = join[a] == join[b]
        if not same.any():
            break
        a, b = a[same], b[same]
        d = differing(bits[a], bits[b])
        good = (d <= distance) & (row[a] != row[b]) & ~((kind[a] == 3) & (kind[b] == 3))
        add(a[good], b[good], d[good])
    return {
        "first": np.concatenate(first),
        "second": np.concatenate(second),
        "kind": np.concatenate(kinds),
        "apart": np.concatenate(apart),
    }


def decide(pairs: dict[str, np.ndarray]) -> dict[int, tuple[int, int, int]]:
    """Which rows go: {row: (row it repeats, kind, bits that differ)}. The first of a group stays; a row goes only for one
    that stays."""
    order = np.lexsort((pairs["apart"], pairs["kind"], pairs["first"], pairs["second"]))
    gone: dict[int, tuple[int, int, int]] = {}
    columns = (pairs[name][order].tolist() for name in ("first", "second", "kind", "apart"))
    for first, second, kind, apart in zip(*columns, strict=True):
        if second not in gone and first not in gone:
            gone[second] = (first, kind, apart)
    return gone


# ---------------------------------------------------------------- report


def report_table(records: Sequence[dict[str, Any]]) -> bytes:
    """`duplicates.parquet`: key, reason (exact, near), the set and key it matches, distance in bits."""
    fields = {
        "key": pa.string(),
        "reason": pa.string(),
        "set": pa.string(),
        "match": pa.string(),
        "distance": pa.int32(),
    }
    columns = {name: pa.array([record[name] for record in records], kind) for name, kind in fields.items()}
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue().to_pybytes()


def pair_sheet(pairs: Sequence[tuple[np.ndarray, np.ndarray, str]]) -> bytes:
    """Pairs of pictures side by side with a title, as PNG."""
    from matplotlib.figure import Figure

    columns = 4
    lines = -(-len(pairs) // columns)
    figure = Figure(figsize=(3.2 * columns, 1.9 * lines), dpi=90, layout="constrained")
    axes = np.atleast_2d(figure.subplots(lines, 2 * columns)).ravel()
    for axis in axes:
        axis.axis("off")
    for i, (left, right, title) in enumerate(pairs):
        axes[2 * i].imshow(left)
        axes[2 * i + 1].imshow(right)
        axes[2 * i].set_title(title, fontsize=7, loc="left")
    sink = io.BytesIO()
    figure.savefig(sink, format="png")
    return sink.getvalue()


def small(pixels_HWC: np.ndarray, side: int = 96) -> np.ndarray:
    """For a contact sheet: the longer side at most `side`."""
    height, width = pixels_HWC.shape[:2]
    scale = min(1.0, side / max(height, width))
    return images.shrink(pixels_HWC, max(1, round(width * scale)), max(1, round(height * scale)))


def find_picture(uri: str, key: str, max_pixels: int) -> np.ndarray | None:
    """The picture of a key in an evaluation set; a search, for the few that a contact sheet shows."""
    for part in _parts(uri):
        for name, pixels in read_part(part, max_pixels):
            if name == key:
                return small(pixels).copy()
    return None
