"""Processes one slice of a source: writes shards and a receipt."""

import contextlib
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import cv2
import numpy as np
import pyarrow as pa

from pipeline import storage
from pipeline.data import codecs, images, sources
from pipeline.data.codecs import Refused
from pipeline.data.downloads.config import is_temporary
from pipeline.data.duplicates.hashes import ROW, VIEW, hash_image, pack_hashes
from pipeline.data.duplicates.report import attach_pictures
from pipeline.data.format import ShardWriter
from pipeline.data.format.verify import key_hash
from pipeline.data.patches import unpatchify
from pipeline.data.prepare import retry
from pipeline.data.prepare.config import PrepareConfig
from pipeline.data.prepare.plan import PreparePlan
from pipeline.data.sources import Item
from pipeline.errors import NotRead

MEASURED_ROWS = (
    16  # rows of pixels for the mean and the standard deviation of a corpus; all rows would take 0.2 ms an image
)


def prepare_slice(number: int, plan: PreparePlan) -> dict[str, Any]:
    """Reads, checks, transforms and writes slice `number` of the plan. Returns its receipt.

    Raises NotWritten when the output cannot be written, NotRead when a source has disappeared.
    """
    cv2.setNumThreads(1)
    try:
        return _prepare_slice(number, plan)
    except OSError as error:  # such as a full disk; `items_of_slice` raises other exceptions
        raise storage.not_written(plan.config.output, error) from error


def summarize(receipt: dict[str, Any]) -> tuple[int, int]:
    """(inputs, rejects) of a receipt, for the progress display of the driver."""
    return sum(receipt["inputs"].values()), sum(map(len, receipt["rejects"].values()))


@dataclass(kw_only=True)
class _Counts:
    """Content of the receipt of a slice in addition to its shards, by split."""

    inputs: dict[str, int]
    rejects: dict[str, list[list[str]]]
    duplicates: dict[str, list[dict[str, Any]]]
    pictures: dict[str, list[tuple[bytes, bytes]]]  # images of duplicates and of their matches
    hashed: bytearray = field(default_factory=bytearray)  # rows of hashes.ROW: tens of bytes per image
    views: list[np.ndarray] = field(default_factory=list)  # of these rows, dtype hashes.VIEW: about a kilobyte an image
    alike: int = 0  # rows with the same label as the previous row
    label: Any = None  # label of the previous row
    keys: set[int] = field(default_factory=set)  # hashes of the keys written
    skipped: dict[str, int]  # inputs whose key the dataset has that is added to
    deleted: dict[str, int]  # inputs whose key was deleted from that dataset
    again: dict[str, list[str]]  # keys of inputs that the reports of that dataset list as rejects or duplicates
    temporary: list[int] = field(default_factory=list)  # places of the inputs whose download failed temporarily
    reported: dict[str, list[dict[str, Any]]] = field(default_factory=dict)  # duplicates that are still written
    reported_pictures: dict[str, list[tuple[bytes, bytes]]] = field(default_factory=dict)


def _prepare_slice(number: int, plan: PreparePlan) -> dict[str, Any]:
    names, thresholds = list(plan.splits), np.cumsum(list(plan.splits.values())).tolist()
    counts = _Counts(
        inputs=dict.fromkeys(names, 0),
        rejects={name: [] for name in names},
        duplicates={name: [] for name in names},
        pictures={name: [] for name in names},
        skipped=dict.fromkeys(names, 0),
        deleted=dict.fromkeys(names, 0),
        again={name: [] for name in names},
    )
    is_new = plan.append is None or plan.sources[plan.slices[number].source].uri not in plan.append.known
    is_first_pass = plan.slices[number].again < 0
    with contextlib.ExitStack() as stack:
        writers = {name: stack.enter_context(plan.writer(name, number)) for name in names}
        for place, item in items_of_slice(number, plan):
            split = split_of_item(item, plan, thresholds)
            if plan.append is not None and plan.append.is_deleted(item.key):
                counts.deleted[split] += 1
                continue
            there = plan.append is not None and plan.append.has_key(split, item.key)
            if there and not is_new:
                counts.skipped[split] += 1
                continue
            counts.inputs[split] += 1
            if is_first_pass and plan.append is not None and not is_new and plan.append.is_left_out(item.key):
                counts.again[split].append(item.key)
            try:
                if there:
                    raise Refused("duplicate key")
                if item.split is None and plan.source_decides and plan.split_of_others is None:
                    raise item.refused or Refused("no split")
                _prepare_item(item, split, plan, counts, writers[split])
            except Refused as refused:
                counts.rejects[split].append([item.key, item.source, refused.reason, refused.detail[:200]])
                if is_temporary(refused.reason):
                    counts.temporary.append(place)
    if plan.finds_duplicates_of_rows:
        views = np.concatenate([np.empty(0, VIEW), *counts.views])
        storage.write_bytes(plan.hashes_uri(number), pack_hashes(np.frombuffer(counts.hashed, ROW), views))
    for name in names:
        attach_pictures(counts.duplicates[name], counts.pictures[name])
        attach_pictures(counts.reported.get(name, []), counts.reported_pictures.get(name, []))
    return {
        "inputs": counts.inputs,
        "rejects": counts.rejects,
        "duplicates": counts.duplicates,
        "reported": counts.reported,
        "skipped": counts.skipped,
        "deleted": counts.deleted,
        "again": counts.again,
        "temporary": counts.temporary,
        "alike": counts.alike,
        "splits": {name: writer.receipt.to_dict() for name, writer in writers.items()},
    }


def items_of_slice(number: int, plan: PreparePlan) -> Iterator[tuple[int, Item]]:
    """(place, input) of the inputs of a slice. The place is the number of the input in the slice. A slice of a further
    pass has the places of the first pass, because keys may repeat in a list. Raises NotRead for a source that has
    disappeared; other problems of inputs are rejects."""
    part = plan.slices[number]
    source = plan.sources[part.source]
    fragments = pa.ipc.open_stream(storage.read_bytes(plan.fragments_uri(number))).read_all()
    places = retry.places_again(part, plan)
    if source.downloads is not None:
        source = replace(source, limit=part.limit, only=None if places is None else frozenset(places))
    items = sources.read(source, fragments, plan.config.include)
    if storage.is_remote(source.uri):
        items = sources.prefetched(items)
    try:
        for i, item in enumerate(items):
            if i == part.limit:
                return
            yield i if places is None else places[i], item
    except OSError as error:
        raise NotRead(
            f"{source.uri}: can no longer be read ({error}); restore it and repeat the command, finished work is kept"
        ) from error


def _prepare_item(item: Item, split: str, plan: PreparePlan, counts: _Counts, writer: ShardWriter) -> None:
    """Writes one input as a row, unless it is in an evaluation set. Raises Refused for an unusable input."""
    if item.refused:
        raise item.refused
    key = key_hash(item.key)
    if key in counts.keys:
        raise Refused("duplicate key")
    label = plan.labels.encode(item.labels)
    picture, stored, pixels = transform(item.image, plan.config)
    exact = 0
    if plan.evaluation is not None or plan.config.deduplicate != "off":
        hashed = hash_image(picture, views=plan.evaluation is not None or plan.finds_near_duplicates)
        exact, index = hashed.exact, plan.evaluation
        match = index.find(hashed, picture, plan.config.distance) if index is not None else None
        if index is not None and match is not None:
            counts.duplicates[split].append(match.record(item.key, index))
            counts.pictures[split].append((match.picture, index.pictures[match.image].as_py()))
            return
    if plan.append is not None and plan.append.index is not None:
        found = _duplicate_in_dataset(stored, item.key, plan)
        if found is not None and plan.config.deduplicate != "report":
            counts.duplicates[split].append(found[0])
            counts.pictures[split].append(found[1])
            return
        if found is not None:
            counts.reported.setdefault(split, []).append(found[0])
            counts.reported_pictures.setdefault(split, []).append(found[1])
    if plan.finds_near_duplicates:
        hashed.views["image"] = len(counts.hashed) // ROW.itemsize
        counts.views.append(hashed.views)
    if plan.finds_duplicates_of_rows:
        counts.hashed += np.array([(key, exact, list(plan.splits).index(split))], ROW).tobytes()
    counts.keys.add(key)
    counts.alike, counts.label = counts.alike + (label == counts.label), label
    height, width = picture.shape[:2]
    step = max(1, len(pixels) // MEASURED_ROWS)
    writer.write(item.key, stored, label, width, height, pixels[step // 2 :: step])


def _duplicate_in_dataset(
    stored: bytes | np.ndarray, key: str, plan: PreparePlan
) -> tuple[dict[str, Any], tuple[bytes, bytes]] | None:
    """The record of the image of the dataset that a new image repeats, both as they are stored, and small copies of
    both; None if there is none."""
    assert plan.append is not None
    assert plan.append.index is not None
    c, index = plan.config, plan.append.index
    if isinstance(stored, np.ndarray):
        pixels = unpatchify(stored, c.size, c.size, c.patch_size)
    else:
        pixels = codecs.decode_stored(stored).copy()
    match = index.find(hash_image(pixels, views=plan.finds_near_duplicates), pixels, c.distance)
    if match is None:
        return None
    return match.record(key, index) | {"set": ""}, (match.picture, index.pictures[match.image].as_py())


def transform(image: bytes | np.ndarray, config: PrepareConfig) -> tuple[np.ndarray, bytes | np.ndarray, np.ndarray]:
    """Returns (original pixels, stored image, pixels of the stored image) of an input. Pixels are RGB uint8 (H, W, 3).

    Raises Refused for an image that cannot be used.
    """
    if isinstance(image, np.ndarray):  # raw pixels of an archive: stored losslessly
        picture = codecs.Picture(image, True)
        data = cv2.imencode(".png", image[:, :, ::-1])[1].tobytes() if config.encoding == "jpeg" else b""
    else:
        picture, data = codecs.decode(image, config.max_pixels), image
    if config.encoding == "jpeg":
        return picture.pixels, *images.as_jpeg(picture, data, config.size, config.quality, config.small == "lossless")
    return picture.pixels, *images.as_patches(picture, config.size, config.patch_size, config.fit)


def split_of_item(item: Item, plan: PreparePlan, thresholds: list[float]) -> str:
    """The split of an input. In a source with splits, inputs without one are assigned to `split_of_others` or the first."""
    names = list(plan.splits)
    if plan.source_decides:
        return item.split if item.split in plan.splits else plan.split_of_others or names[0]
    return names[0] if len(names) == 1 else names[_split_of(item.key, thresholds)]


def _split_of(key: str, thresholds: list[float]) -> int:
    """The split of a key: uniformly distributed, and a function of the key only."""
    draw = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") / 2**64
    return next((i for i, threshold in enumerate(thresholds) if draw < threshold), len(thresholds) - 1)
