"""From sources of images to a dataset of shards, on Ray Data.

The work is cut into *units*: deterministic slices of the sources. A Ray Data row names a unit; the one task that gets it
reads, checks, transforms and writes its shards, and only a receipt comes back, so image bytes never pass through the
object store. A receipt on storage marks its unit as done: a job that is killed and run again redoes the other units and
ends in the byte-identical dataset, whatever the number of workers.

    <output>/manifest.json          written last       (with --splits: <output>/<split>/manifest.json)
    <output>/part-UUUUU-NNNN.parquet                   unit and shard in it
    <output>/rejects.parquet
    <output>/_work/                 plan and receipts of an unfinished job, removed at the end
"""

import base64
import contextlib
import dataclasses
import hashlib
import io
import json
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import config as configuration
from pipeline import storage
from pipeline.data import duplicates as dedup
from pipeline.data import images, sources
from pipeline.data.format import describe, shards
from pipeline.data.format.shards import Encoding, Manifest, Receipt, Reject, ShardWriter
from pipeline.data.images import Fit, Refused
from pipeline.data.loading.augment import decode
from pipeline.data.prepare import mix
from pipeline.data.prepare.record import Record
from pipeline.data.sources import Labels, Source
from pipeline.errors import UserError

SHARE_BYTES = 256 << 20  # some seconds of work
DIGITS = "demo:digits"  # the built-in source: scikit-learn's handwritten digits, written as class folders of PNG


@dataclass(frozen=True, kw_only=True, slots=True)
class PrepareConfig:
    """Everything that decides the bytes of a dataset, and where it goes."""

    source: tuple[str, ...] = ()
    """Folders, archives or s3:// prefixes to read; several become one dataset."""
    output: str = ""
    """Where the dataset goes: an empty or new folder, or an unfinished run of the same command."""
    format: str = "auto"
    """What the sources are: auto (recognised by file names), folder, tar, parquet, tfrecord or cifar."""
    labels: str | None = None
    """Table of file names and labels (CSV, JSONL, JSON, Parquet, or ImageNet's devkit archive)."""
    label_map: str | None = None
    """Class names in index order (text or JSON list), or a JSON object that renames them; others are refused."""
    include: str | None = None
    """Glob over keys: everything else is no input."""
    unlabelled: bool = False
    """Take images without labels."""
    sample: int | None = None
    """At most N inputs, drawn evenly from the sources."""
    encoding: Encoding = "jpeg"
    """jpeg: shorter side `size`, crops happen at load time. patches: the N x (P*P*C) matrix, nothing to decode."""
    size: int = 256
    """Shorter side (jpeg), or side of the square (patches)."""
    quality: int = 90
    """JPEG quality of images that are re-encoded (4:2:0)."""
    patch_size: int = 16
    """P of encoding patches."""
    fit: Fit = "crop"
    """How patches become square: centre crop of the resized image, or squash."""
    splits: tuple[str, ...] = ()
    """Such as train=0.9 test=0.1: by hash of the key, each a dataset under its name."""
    shuffle: bool = True
    """Mix the images over all shards: listed folders as they are read, archives as `--mix` says."""
    mix: Literal["auto", "always", "never"] = "auto"
    """Archives keep the order in which they were written, unless they are sorted by class (auto) or in any case (always):
    then a second pass over the shards mixes them."""
    seed: int = 0
    """Of the shuffle and of --sample."""
    deduplicate: Literal["off", "exact", "near"] = "off"
    """Remove images that repeat another of the corpus: the same pixels, or nearly the same (re-encoded, resized, mirrored)."""
    decontaminate: tuple[str, ...] = ()
    """Evaluation sets (datasets, or anything that --source takes): images that are in them are removed."""
    distance: int = 24
    """Near duplicates differ in at most this many of 128 bits (docs/decontamination.md)."""
    max_pixels: int = 100_000_000
    """Larger images are refused before they are decoded."""
    max_reject_fraction: float = 0.05
    """More rejects than this fraction of the inputs fail the job, at the end."""
    row_group_bytes: int = shards.ROW_GROUP_BYTES
    shard_bytes: int = shards.SHARD_BYTES
    unit_bytes: int = 1 << 30
    """Input bytes of one unit of work, at most; small corpora are cut finer."""


def demo() -> PrepareConfig:
    """Scikit-learn's handwritten digits, 1,797 images in two splits; about 5 s on two cores.

    Source: the package itself, written as PNG class folders to runs/demo/raw. Expected: 1,797 rows, 10 classes, no reject;
    train about 80%, test the rest. `--source` puts your own class folders in their place.
    """
    return PrepareConfig(
        source=(DIGITS,),
        output="runs/demo/data",
        encoding="jpeg",
        size=32,
        splits=("train=0.8", "test=0.2"),
    )


def jpeg256() -> PrepareConfig:
    """JPEG with the shorter side at 256, for pre-training at 224 (the default with --source).

    Expected: about 24 KB an image; 500 ImageNet originals a second and core.
    """
    return PrepareConfig()


def patches224() -> PrepareConfig:
    """224x224 in 16x16 patches, for evaluation sets and CPU-poor GPU nodes: 150 KB an image, nothing to decode."""
    return PrepareConfig(encoding="patches", size=224, patch_size=16)


def patches32() -> PrepareConfig:
    """32x32 in 4x4 patches, for CIFAR, SVHN and other tiny images."""
    return PrepareConfig(encoding="patches", size=32, patch_size=4)


RECIPES: dict[str, Callable[[], PrepareConfig]] = {
    "demo": demo,
    "jpeg256": jpeg256,
    "patches224": patches224,
    "patches32": patches32,
}


# ---------------------------------------------------------------- plan


class Unit(NamedTuple):
    """A slice of the pieces of a source (its number), of which at most `limit` items are taken (-1: all)."""

    source: int
    first: int
    pieces: int
    size: int  # bytes of input
    limit: int = -1


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What every task needs to know. The pieces of its unit it reads from storage: a listing may be larger than a machine."""

    config: PrepareConfig
    sources: list[Source]
    labels: Labels
    splits: dict[str, float]  # name -> fraction; {"": 1.0} without splits
    units: list[Unit]
    input_fingerprint: str
    work: str  # URI of the folder of receipts
    index: Any = None  # Ray reference to the hashes of the evaluation sets (dedup.Index)

    @property
    def image(self) -> dict[str, Any]:
        c = self.config
        if c.encoding == "jpeg":
            return {"size": c.size, "quality": c.quality}
        return {"height": c.size, "width": c.size, "patch_size": c.patch_size, "channels": 3, "fit": c.fit}

    def split_uri(self, split: str) -> str:
        return storage.join(self.config.output, split) if split else self.config.output

    def pieces_uri(self, unit: int) -> str:
        return storage.join(self.work, f"pieces-{unit:05d}.arrow")

    def receipt_uri(self, unit: int) -> str:
        return storage.join(self.work, f"unit-{unit:05d}.json")

    def hashes_uri(self, unit: int) -> str:
        return storage.join(self.work, f"hash-{unit:05d}.npy")

    def kept_uri(self, unit: int) -> str:
        """The receipt of a unit from which duplicates were removed."""
        return storage.join(self.work, f"kept-{unit:05d}.json")

    def writer(self, split: str, number: int, mark: str = "", **sizes: int) -> ShardWriter:
        sizes = {"row_group_bytes": self.config.row_group_bytes, "shard_bytes": self.config.shard_bytes} | sizes
        return ShardWriter(
            self.split_uri(split),
            f"{number:05d}{mark}",
            encoding=self.config.encoding,
            image=self.image,
            classes=self.labels.classes,
            multilabel=self.labels.multilabel,
            row_group_bytes=sizes["row_group_bytes"],
            shard_bytes=sizes["shard_bytes"],
        )

    def written(self, receipt: dict[str, Any], split: str) -> shards.Dataset:
        """The rows that a writer of `split` wrote, as a dataset."""
        written = Receipt.from_dict(receipt)
        manifest = Manifest(
            encoding=self.config.encoding,
            image=self.image,
            multilabel=self.labels.multilabel,
            rows=written.rows,
            inputs=written.rows,
            fingerprint="",
            classes=list(self.labels.classes),
            shards=written.shards,
        )
        return shards.Dataset(self.split_uri(split), manifest)

    @property
    def buckets(self) -> int:
        """Parts that mix the units' rows (pipeline.data.prepare.mix)."""
        return min(len(self.units), mix.MOST_BUCKETS)

    @property
    def checks_keys(self) -> bool:
        """Whether keys of different units can be equal; those of listed files are paths."""
        return len(self.units) > 1 and not all(source.listed for source in self.sources)

    @property
    def joins(self) -> bool:
        return self.checks_keys or self.config.deduplicate != "off"


def prepare(
    config: PrepareConfig,
    quiet: bool = False,
    connect: Callable[[], None] = lambda: None,
    tracking_uri: str | None = None,
) -> dict[str, Manifest]:
    """Makes the dataset(s) that `config` describes: {split name: manifest}, or {"": manifest} without splits.

    `connect` joins Ray (`pipeline.cluster.connect`); it is called when there is work for it, so that a bad command fails
    before any worker starts. With `tracking_uri` the work is an MLflow run. A dataset that is finished already is returned as it
    is. Raises UserError: bad configuration or source, an output that holds something else, no usable image, too many rejects.
    """
    config = check(config)
    done = _check_output(config)
    if DIGITS in config.source:
        raw = write_digits(storage.join(os.path.dirname(config.output), "raw"))
        config = dataclasses.replace(config, source=tuple(raw if uri == DIGITS else uri for uri in config.source))
    plan = make_plan(config, connect)
    if done is not None:
        for name, manifest in done.items():
            if (
                identity(PrepareConfig()) | manifest.config != identity(config)
                or manifest.input_fingerprint != plan.input_fingerprint
            ):
                raise UserError(
                    f"{plan.split_uri(name)}: already holds another dataset ({_difference(manifest, plan)}); choose another "
                    "--output or remove it"
                )
        if storage.exists(plan.work):
            _tidy(plan, done)  # it was stopped while it did
        if not quiet:
            print(f"prepare: {config.output} is finished already", flush=True)
        return done
    plan = claim(plan)
    if tracking_uri is None:
        return _carry_out(plan, quiet, connect)
    with Record(tracking_uri, config, plan.work, plan.input_fingerprint) as record:
        manifests = _carry_out(plan, quiet, connect, record)
        record.finish({name: (plan.split_uri(name), manifest) for name, manifest in manifests.items()})
    return manifests


def _carry_out(
    plan: Plan, quiet: bool, connect: Callable[[], None], record: Record | None = None
) -> dict[str, Manifest]:
    connect()
    if plan.config.decontaminate:
        plan = dataclasses.replace(plan, index=_index(plan.config, connect, quiet))
    _run(plan, quiet, record)
    if plan.joins:
        remove_duplicates(plan, find_duplicates(plan))
    receipts = _receipts(plan)
    mixed = mix_units(plan, receipts, quiet) if wants_mixing(plan, receipts) else None
    if record is not None:
        record.wait()
    return finish(plan, receipts, mixed)


def check(config: PrepareConfig) -> PrepareConfig:
    """The config with absolute URIs. Raises UserError for values that cannot work."""
    if not config.source:
        raise UserError("no --source: name a folder, an archive or an s3:// prefix of images")
    if not config.output:
        raise UserError("no --output: name the folder or s3:// prefix for the dataset")
    limits = {"size": 1, "quality": 1, "patch_size": 1, "max_pixels": 1, "row_group_bytes": 1, "shard_bytes": 1}
    for name, least in {**limits, "unit_bytes": 1}.items():
        if getattr(config, name) < least:
            raise UserError(f"--{name.replace('_', '-')} {getattr(config, name)}: at least {least}")
    if config.encoding == "patches" and config.size % config.patch_size:
        raise UserError(f"--patch-size {config.patch_size} does not divide --size {config.size}")
    if config.row_group_bytes > shards.MOST_ROW_GROUP_BYTES:
        raise UserError(f"--row-group-bytes {config.row_group_bytes}: at most {shards.MOST_ROW_GROUP_BYTES}")
    if config.quality > 100:
        raise UserError(f"--quality {config.quality}: at most 100")
    if config.sample is not None and config.sample < 1:
        raise UserError(f"--sample {config.sample}: at least 1")
    if not 0 <= config.distance < dedup.BITS // 4:
        raise UserError(f"--distance {config.distance}: between 0 and {dedup.BITS // 4 - 1} bits")
    if not 0 <= config.max_reject_fraction <= 1:
        raise UserError(f"--max-reject-fraction {config.max_reject_fraction}: between 0 and 1")
    parse_splits(config.splits)
    output = storage.normalise(config.output)
    inputs = tuple(uri if uri == DIGITS else storage.normalise(uri) for uri in config.source)
    for uri in inputs:
        if output == uri or output.startswith(uri + "/"):
            raise UserError(f"--output {output} lies inside --source {uri}; choose a place outside it")
    labels, label_map = (storage.normalise(uri) if uri else None for uri in (config.labels, config.label_map))
    return dataclasses.replace(
        config,
        source=inputs,
        output=output,
        labels=labels,
        label_map=label_map,
        decontaminate=tuple(map(storage.normalise, config.decontaminate)),
    )


def parse_splits(splits: Sequence[str]) -> dict[str, float]:
    """("train=0.9", "test=0.1") as fractions of one. Raises UserError unless they add up to 1."""
    if not splits:
        return {"": 1.0}
    fractions: dict[str, float] = {}
    for text in splits:
        name, _, value = text.partition("=")
        try:
            fractions[name] = float(value)
        except ValueError:
            raise UserError(f'--splits {text}: write name=fraction, such as "train=0.9 test=0.1"') from None
        if not name or not all(c.isalnum() or c in "-_" for c in name) or name == mix.WORK or not fractions[name] > 0:
            raise UserError(f"--splits {text}: a plain name and a fraction above 0")
    if len(fractions) != len(splits) or not abs(sum(fractions.values()) - 1) <= 1e-6:
        raise UserError(f"--splits {' '.join(splits)}: different names, and fractions that add up to 1")
    return fractions


def identity(config: PrepareConfig) -> dict[str, Any]:
    """The part of the config that decides the content of the dataset: what a rerun has to agree on."""
    values = configuration.to_dict(config)
    return {name: value for name, value in values.items() if name not in ("output", "max_reject_fraction")}


def make_plan(config: PrepareConfig, connect: Callable[[], None] = lambda: None) -> Plan:
    """Looks through the sources and cuts the work. Runs on the driver; archives are looked through by Ray tasks."""
    label_map = sources.read_label_map(config.label_map)
    found = sources.discover(
        config.source,
        format=config.format,
        labels=config.labels,
        include=config.include,
        need_names=not config.unlabelled and not isinstance(label_map, list),
        unit_bytes=config.unit_bytes,
    )
    labels = sources.make_labels(found, label_map, config.unlabelled)
    digest = hashlib.sha256()
    for source in found:
        digest.update(json.dumps([source.uri, source.kind, source.table], sort_keys=True).encode())
        pieces = source.pieces
        if not source.listed:
            pieces = pieces.sort_by([("path", "ascending"), ("start", "ascending")])
        for first in range(0, pieces.num_rows, sources.SPILL_ROWS):
            part = pieces.slice(first, sources.SPILL_ROWS)
            for name in part.column_names:  # one after the other: fewer Python objects at a time
                digest.update(json.dumps([name, part[name].to_pylist()]).encode())
    digest.update(json.dumps(labels.classes).encode())
    rng = np.random.Generator(np.random.Philox(config.seed))
    if config.shuffle:
        found = [dataclasses.replace(s, pieces=sources.shuffled(s.pieces, rng)) if s.listed else s for s in found]
    units = cut(found, config)
    return Plan(
        config=config,
        sources=found,
        labels=labels,
        splits=parse_splits(config.splits),
        units=units,
        input_fingerprint=digest.hexdigest()[:16],
        work=storage.join(config.output, mix.WORK),
    )


def _ray_map(function: Callable, arguments: list, connect: Callable[[], None]) -> Iterable:
    """`map` as Ray tasks; one or two arguments are not worth a process."""
    if len(arguments) <= 2:
        return map(function, arguments)
    import ray

    connect()
    return ray.get([ray.remote(function).remote(argument) for argument in arguments])


def cut(found: Sequence[Source], config: PrepareConfig) -> list[Unit]:
    """Units of about a 32nd of the corpus each, within limits: at most `unit_bytes` and 16,384 files, at least 8 MB or 256
    files. A function of the input alone, so that any cluster makes the same shards."""
    total = sum(pc.sum(source.pieces["size"]).as_py() or 0 for source in found)
    count = sum(source.pieces.num_rows for source in found)
    most_bytes = min(config.unit_bytes, max(8 << 20, total // 32))
    most_files = min(16_384, max(256, math.ceil(count / 32)))
    units = []
    for i, source in enumerate(found):
        first = 0
        while first < source.pieces.num_rows:
            ends = np.cumsum(source.pieces["size"].slice(first, most_files).to_numpy())
            taken = max(1, int(np.searchsorted(ends, most_bytes, side="right")))
            units.append(Unit(i, first, taken, int(ends[taken - 1])))
            first += taken
    if config.sample is not None:
        units = _sampled(units, config.sample)
    return units


def _sampled(units: list[Unit], sample: int) -> list[Unit]:
    """The units, limited to `sample` items in all, in proportion to their bytes."""
    weights = np.array([unit.size + 1 for unit in units], np.float64)
    ends = np.floor(np.cumsum(weights) / weights.sum() * sample + 1e-9).astype(np.int64)
    limits = np.diff(ends, prepend=0).tolist()
    return [unit._replace(limit=limit) for unit, limit in zip(units, limits, strict=True) if limit]


# ---------------------------------------------------------------- output folder


def _check_output(config: PrepareConfig) -> dict[str, Manifest] | None:
    """The finished dataset(s) already at the output, or None when there is none. Raises UserError when something else is."""
    done = {}
    splits = parse_splits(config.splits)
    for name in splits:
        uri = storage.join(config.output, name) if name else config.output
        if storage.exists(storage.join(uri, shards.MANIFEST)):
            done[name] = shards.open_dataset(uri).manifest
    if len(done) == len(splits):
        return done
    if storage.exists(storage.join(config.output, mix.WORK, "plan.json")):
        return None
    files = storage.list_files(config.output)
    if files:
        raise UserError(
            f"{config.output}: already holds other files ({files[0].path}{', ...' if len(files) > 1 else ''}); choose another "
            "--output or empty it"
        )
    return None


def claim(plan: Plan) -> Plan:
    """Marks the output as ours, or checks that the unfinished run in it is this one. Every unit's pieces are laid down beside
    the mark, and the plan that is returned goes without them: it is small, whatever the corpus."""
    where = storage.join(plan.work, "plan.json")
    mark = {"config": identity(plan.config), "input_fingerprint": plan.input_fingerprint, "units": len(plan.units)}
    mark = json.loads(json.dumps(mark))
    before = storage.read_json(where) if storage.exists(where) else mark
    if before != mark:
        old, new = configuration.flatten(before), configuration.flatten(mark)
        changed = ", ".join(key.removeprefix("config.") for key in {**old, **new} if old.get(key) != new.get(key))
        raise UserError(
            f"{plan.config.output}: holds an unfinished dataset of another command or input (different: {changed}); run that "
            "command again to finish it, or choose another --output"
        )

    try:
        storage.write_json(where, mark)
        there = {file.path for file in storage.list_files(plan.work)}
        for number, (source, first, count, *_) in enumerate(plan.units):
            if os.path.basename(plan.pieces_uri(number)) not in there:
                sink = pa.BufferOutputStream()
                with pa.ipc.new_stream(sink, sources.PIECES) as stream:
                    stream.write_table(plan.sources[source].pieces.slice(first, count))
                storage.write_bytes(plan.pieces_uri(number), sink.getvalue().to_pybytes())
    except OSError as error:
        raise UserError(f"--output {plan.config.output}: cannot be written ({error}); choose another place") from error
    without = [dataclasses.replace(source, pieces=source.pieces.slice(0, 0)) for source in plan.sources]
    return dataclasses.replace(plan, sources=without)


def _difference(manifest: Manifest, plan: Plan) -> str:
    old, new = configuration.flatten(manifest.config), configuration.flatten(identity(plan.config))
    changed = [
        f"{key}: {old.get(key)!r}, now {new.get(key)!r}" for key in {**old, **new} if old.get(key) != new.get(key)
    ]
    return "; ".join(changed[:3]) or "the source files have changed"


# ---------------------------------------------------------------- one unit


def process(unit: int, plan: Plan, index: dedup.Index | None = None) -> dict[str, Any]:
    """Reads, checks, transforms and writes one unit; returns its receipt, from storage when it is there already."""
    where = plan.receipt_uri(unit)
    if storage.exists(where):
        return storage.read_json(where)
    config = plan.config
    source = plan.sources[plan.units[unit].source]
    pieces = pa.ipc.open_stream(storage.read_bytes(plan.pieces_uri(unit))).read_all()
    items = sources.read(source, pieces, config.include)
    if storage.is_remote(source.uri):
        items = sources.prefetched(items)
    names, thresholds = list(plan.splits), np.cumsum(list(plan.splits.values())).tolist()
    inputs = dict.fromkeys(names, 0)
    rejects: dict[str, list[list[str]]] = {name: [] for name in names}
    duplicates: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    hashed, seen = bytearray(), set()  # rows of dedup.ROW, and hashes of keys: tens of bytes a row, not hundreds
    alike, before = 0, None  # rows of the same label as the row before
    with contextlib.ExitStack() as stack:
        writers = {name: stack.enter_context(plan.writer(name, unit)) for name in names}
        for number, item in enumerate(items):
            if number == plan.units[unit].limit:
                break
            split = names[0] if len(names) == 1 else names[_bucket(item.key, thresholds)]
            inputs[split] += 1
            key = describe.key_hash(item.key)
            try:
                if item.refused:
                    raise item.refused
                if key in seen:
                    raise Refused("duplicate key")
                label = plan.labels.encode(item.labels)
                picture, stored, pixels = transform(item.image, config)
            except Refused as refused:
                rejects[split].append([item.key, item.source, refused.reason, refused.detail[:200]])
                continue
            height, width = picture.shape[:2]
            if index is not None or config.deduplicate != "off":
                found = dedup.hashes(picture, crops=index is not None)
                match = index.find(found, config.distance) if index is not None else None
                if index is not None and match:
                    duplicates[split].append(_contaminated(item.key, picture, match, index))
                    continue
                row = (key, found.exact, found.bits[0], found.flat, names.index(split))
                hashed += np.array([row], dedup.ROW).tobytes()
            elif plan.joins:
                hashed += np.array([(key, 0, (0, 0), True, names.index(split))], dedup.ROW).tobytes()
            seen.add(key)
            alike, before = alike + (label == before), label
            # every fourth row is plenty for a mean over a corpus, at a quarter of the cost
            writers[split].write(item.key, stored, label, width, height, pixels[::4])
    if plan.joins:
        sink = io.BytesIO()
        np.save(sink, np.frombuffer(hashed, dedup.ROW))
        storage.write_bytes(plan.hashes_uri(unit), sink.getvalue())
    receipt = {
        "inputs": inputs,
        "rejects": rejects,
        "duplicates": duplicates,
        "alike": alike,
        "splits": {name: writer.receipt.to_dict() for name, writer in writers.items()},
    }
    storage.write_bytes(where, json.dumps(receipt).encode())
    return receipt


def _bucket(key: str, thresholds: list[float]) -> int:
    """Which split a key falls in: uniform, and independent of everything but the key."""
    draw = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") / 2**64
    return next((i for i, threshold in enumerate(thresholds) if draw < threshold), len(thresholds) - 1)


def _contaminated(key: str, picture: np.ndarray, match: tuple[int, int, bool], index: dedup.Index) -> dict[str, Any]:
    """The record of an image that an evaluation set holds, with a thumbnail for the contact sheet."""
    found, distance, exact = match
    uri, name = index.name(found)
    thumbnail = cv2.imencode(".jpg", dedup.small(picture)[:, :, ::-1])[1].tobytes()
    reason = "exact" if exact else "near"
    record = {"key": key, "reason": reason, "set": uri, "match": name, "distance": distance}
    return record | {"thumbnail": base64.b64encode(thumbnail).decode()}


def transform(image: bytes | np.ndarray, config: PrepareConfig) -> tuple[np.ndarray, bytes | np.ndarray, np.ndarray]:
    """(original pixels, what is stored, its pixels). Raises Refused."""
    if isinstance(image, np.ndarray):  # raw pixels of an archive: stored losslessly
        picture = images.Picture(image, True)
        data = cv2.imencode(".png", image[:, :, ::-1])[1].tobytes() if config.encoding == "jpeg" else b""
    else:
        picture, data = images.decode(image, config.max_pixels), image
    if config.encoding == "jpeg":
        return picture.pixels, *images.as_jpeg(picture, data, config.size, config.quality)
    return picture.pixels, *images.as_patches(picture, config.size, config.patch_size, config.fit)


# ---------------------------------------------------------------- all units


def _run(plan: Plan, quiet: bool, record: Record | None = None) -> None:
    """Every unfinished unit through Ray Data, with a progress line."""
    import ray

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # its notes on progress bars and timings, in place of ours
    finished = {file.path for file in storage.list_files(plan.work)}
    todo = [unit for unit in range(len(plan.units)) if os.path.basename(plan.receipt_uri(unit)) not in finished]
    if len(todo) < len(plan.units) and not quiet:
        print(f"prepare: {len(plan.units) - len(todo)} of {len(plan.units)} units are done already", flush=True)
    if not todo:
        return
    progress = _Progress(sum(plan.units[unit].size for unit in todo), quiet, record)
    reference = ray.put(plan)
    shares = _shares(todo, [unit.size for unit in plan.units], int(ray.cluster_resources().get("CPU", 0)))
    rows = ray.data.from_arrow([pa.table({"unit": share}) for share in shares])
    work: Any = _process_batch  # Ray's stubs know no typed dict of arrays
    receipts = rows.map_batches(work, batch_size=None, fn_args=(reference,), num_cpus=1)
    for row in receipts.iter_rows():
        if row["error"]:
            raise UserError(row["error"])
        progress.add(plan.units[row["unit"]].size, row["inputs"], row["rejects"])
    progress.close()


def _shares(todo: Sequence[int], sizes: Sequence[int], cpus: int) -> list[list[int]]:
    """The units of each task. Ray Data takes up to 0.3 s to start the next task on a free CPU: while many units are left, a task
    has several small ones, at the end one each, so that all CPUs end together."""
    shares, first = [], 0
    while first < len(todo):
        several = (len(todo) - first) // (2 * cpus) if cpus else 1  # without CPUs yet, an autoscaler counts the tasks
        share = list(todo[first : first + max(1, min(4, several))])
        while len(share) > 1 and sum(sizes[unit] for unit in share) > SHARE_BYTES:
            share.pop()
        shares.append(share)
        first += len(share)
    return shares


def _process_batch(batch: dict[str, np.ndarray], reference: Any) -> dict[str, np.ndarray]:
    """Rows of unit numbers -> rows of counts. Runs in a Ray worker, on one CPU.

    A UserError travels back as a value: Ray Data would wrap it beyond recognition.
    """
    import ray

    cv2.setNumThreads(1)
    plan = ray.get(reference) if isinstance(reference, ray.ObjectRef) else reference
    index = ray.get(plan.index) if plan.index is not None else None
    counts: dict[str, list[Any]] = {"unit": [], "inputs": [], "rejects": [], "error": []}
    for unit in batch["unit"].tolist():
        inputs = rejects = 0
        error = ""
        try:
            receipt = process(unit, plan, index)
            inputs = sum(receipt["inputs"].values())
            rejects = sum(map(len, receipt["rejects"].values()))
        except UserError as problem:
            error = str(problem)
        except OSError as problem:  # what cannot be read is a reject: this is the output, such as a full disk
            error = f"{plan.config.output}: cannot be written ({problem}); make room and run it again, finished work is kept"
        for name, value in zip(counts, (unit, inputs, rejects, error), strict=True):
            counts[name].append(value)
    return {name: np.array(values) for name, values in counts.items()}


class _Progress:
    """One line that is rewritten on a terminal, or printed every ten seconds into a log; the same numbers to the record."""

    def __init__(self, total: float, quiet: bool, record: Record | None = None) -> None:
        self.total, self.quiet, self.record = max(total, 1.0), quiet, record
        self.done, self.inputs, self.rejects = 0.0, 0, 0
        self.begin = self.shown = self.recorded = time.monotonic()

    def add(self, weight: float, inputs: int, rejects: int) -> None:
        self.done += weight
        self.inputs += int(inputs)
        self.rejects += int(rejects)
        now = time.monotonic()
        if not self.quiet and now - self.shown >= (0.2 if sys.stdout.isatty() else 10):
            self.shown = now
            self.show("\r" if sys.stdout.isatty() else "\n")
        if self.record and now - self.recorded >= 10:
            self.recorded = now
            self.record.progress(self.inputs, self.rejects, now - self.begin)

    def show(self, end: str) -> None:
        seconds = max(time.monotonic() - self.begin, 1e-9)
        left = round((self.total - self.done) * seconds / max(self.done, 1.0))
        eta = f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}"
        print(
            f"prepare: {self.done / self.total:4.0%}  {self.inputs:,} inputs  {self.inputs / seconds:,.0f}/s  "
            f"{self.done / seconds / 1e6:,.1f} MB/s  rejects {self.rejects:,}  ETA {eta}",
            end=end,
            flush=True,
        )

    def close(self) -> None:
        if not self.quiet:
            self.show("\n")
        if self.record:
            self.record.progress(self.inputs, self.rejects, max(time.monotonic() - self.begin, 1e-9))


# ---------------------------------------------------------------- duplicates


def _index(config: PrepareConfig, connect: Callable[[], None], quiet: bool) -> Any:
    """Hashes the evaluation sets and hands them to all workers."""
    import ray

    index = dedup.build_index(
        config.decontaminate, config.max_pixels, lambda function, arguments: _ray_map(function, arguments, connect)
    )
    if not quiet:
        print(f"prepare: {len(index.keys):,} images of {len(index.sets)} evaluation sets to keep out", flush=True)
    return ray.put(index)


def find_duplicates(plan: Plan) -> dict[int, tuple[int, int, int]]:
    """{row: (row it repeats, kind, bits that differ)}; a row is unit << 32 | row in the unit. A Ray Data job: units ->
    lines to join on -> shuffled into buckets -> pairs."""
    import ray

    near, exact = plan.config.deduplicate == "near", plan.config.deduplicate != "off"
    # Buckets of at most a million lines: 57 lines a row when near, else 2, and units of at most some ten thousand rows.
    count = len(plan.units)
    buckets = max(4, count if near else min(count, max(64, count // 8)))
    # What a task of the shuffle holds, up to Ray's gibibyte: as little as leaves some ten thousand objects to keep account of,
    # one for every task and bucket.
    about = count * 16_384 * (57 if near else 2) * 41
    ray.data.DataContext.get_current().shuffle_input_batch_bytes = min(1 << 30, max(4 << 20, about * buckets // 50_000))
    units = ray.data.from_items([{"unit": unit} for unit in range(count)], override_num_blocks=count)

    def lines(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        tables = [(int(unit), np.load(io.BytesIO(storage.read_bytes(plan.hashes_uri(unit))))) for unit in batch["unit"]]
        parts = [dedup.emit(table, unit, plan.checks_keys, exact, near) for unit, table in tables]
        joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        return joined | {"bucket": (joined["join"] >> np.uint64(40)) % np.uint64(buckets)}

    def pairs(group: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return dedup.meet(group, plan.config.distance)

    work: Any = lines
    shuffled = units.map_batches(work, batch_size=None).groupby("bucket", num_partitions=buckets)
    meet: Any = pairs
    found = list(shuffled.map_groups(meet, batch_format="numpy").iter_batches(batch_size=None, batch_format="numpy"))
    found = [batch for batch in found if "first" in batch]
    if not found:
        return {}
    return dedup.decide({name: np.concatenate([batch[name] for batch in found]) for name in found[0]})


def remove_duplicates(plan: Plan, gone: dict[int, tuple[int, int, int]]) -> None:
    """Writes the affected units again without those rows, from their own shards."""
    wanted: dict[int, set[int]] = {}
    for row in gone.keys() | {first for first, _, _ in gone.values()}:
        wanted.setdefault(row >> 32, set()).add(row & 0xFFFFFFFF)
    keys = {(unit << 32) | row: key for unit, rows in wanted.items() for row, key in _keys(plan, unit, rows)}
    orders: dict[int, dict[int, tuple[str, int, int]]] = {}
    for row, (first, kind, apart) in gone.items():
        orders.setdefault(row >> 32, {})[row & 0xFFFFFFFF] = (keys[first], kind, apart)
    jobs = [(unit, plan, order) for unit, order in sorted(orders.items()) if not storage.exists(plan.kept_uri(unit))]
    list(_ray_map(_keep, jobs, lambda: None))


def _places(plan: Plan, unit: int) -> list[tuple[str, int]]:
    """(split, row in its shards) of every row of a unit, in the order in which they were read."""
    table, names = np.load(io.BytesIO(storage.read_bytes(plan.hashes_uri(unit)))), list(plan.splits)
    counts = [0] * len(names)
    places = []
    for split in table["split"].tolist():
        places.append((names[split], counts[split]))
        counts[split] += 1
    return places


def _keys(plan: Plan, unit: int, rows: set[int]) -> Iterator[tuple[int, str]]:
    receipt, places = storage.read_json(plan.receipt_uri(unit)), _places(plan, unit)
    keys = {
        name: [key for head in plan.written(receipt["splits"][name], name).heads() for key in head.keys]
        for name in plan.splits
    }
    for row in rows:
        split, place = places[row]
        yield row, keys[split][place]


def _keep(job: tuple[int, Plan, dict[int, tuple[str, int, int]]]) -> None:
    """Copies the rows of a unit that stay, and says in a new receipt which went."""
    unit, plan, gone = job
    receipt, places = storage.read_json(plan.receipt_uri(unit)), _places(plan, unit)
    leaving = {places[row]: why for row, why in gone.items()}
    for name in plan.splits:
        dataset = plan.written(receipt["splits"][name], name)
        place = 0
        with plan.writer(name, unit, "k") as writer:
            for i in range(len(dataset.row_groups)):
                for key, *rest in dataset.read_row_group(i).rows():
                    why = leaving.get((name, place))
                    place += 1
                    if why is None:
                        writer.write(key, *rest)
                    elif why[1] == 0:
                        source = plan.sources[plan.units[unit].source].uri
                        receipt["rejects"][name].append([key, source, "duplicate key", ""])
                    else:
                        reason = "exact" if why[1] == 1 else "near"
                        record = {"key": key, "reason": reason, "set": "", "match": why[0], "distance": why[2]}
                        receipt["duplicates"][name].append(record)
        # mean and deviation stay those measured before the duplicates went
        kept = writer.receipt.to_dict() | {"pixels": receipt["splits"][name]["pixels"]}
        receipt["splits"][name] = kept
    storage.write_bytes(plan.kept_uri(unit), json.dumps(receipt).encode())


def _report(plan: Plan, split: str, records: list[dict[str, Any]]) -> None:
    """duplicates.parquet, and a contact sheet of some pairs with an evaluation set."""
    uri = plan.split_uri(split)
    storage.write_bytes(storage.join(uri, dedup.DUPLICATES), dedup.report_table(records))
    shown = [record for record in records if "thumbnail" in record]
    shown = sorted(shown, key=lambda record: -record["distance"])[:24]  # the least certain ones first
    pairs = []
    for record in shown:
        other = dedup.find_picture(record["set"], record["match"], plan.config.max_pixels)
        mine = decode(base64.b64decode(record["thumbnail"])).copy()
        if other is not None:
            pairs.append((mine, other, f"{record['distance']} bits: {record['key'][-20:]} | {record['match'][-20:]}"))
    if pairs:
        storage.write_bytes(storage.join(uri, dedup.PAIRS), dedup.pair_sheet(pairs))


# ---------------------------------------------------------------- mixing


def wants_mixing(plan: Plan, receipts: Sequence[dict[str, Any]]) -> bool:
    if not plan.config.shuffle or plan.config.mix == "never" or all(source.listed for source in plan.sources):
        return False
    return plan.config.mix == "always" or (not plan.labels.multilabel and mix.sorted_by_class(receipts))


def mix_units(plan: Plan, receipts: Sequence[dict[str, Any]], quiet: bool = True) -> list[dict[str, Any]]:
    """Shuffles the rows of all units: the receipts of the shards that take the place of theirs, {split: receipt}."""
    if not quiet:
        print("prepare: mixing the archives over all shards", flush=True)
    dealt = list(_ray_map(mix.scatter, [(unit, plan, receipt) for unit, receipt in enumerate(receipts)], lambda: None))
    jobs = []
    for bucket in map(str, range(plan.buckets)):
        parts = {split: [part[split][bucket] for part in dealt if bucket in part[split]] for split in plan.splits}
        jobs.append((int(bucket), plan, parts))
    return list(_ray_map(mix.gather, jobs, lambda: None))


# ---------------------------------------------------------------- the end


def finish(
    plan: Plan, receipts: Sequence[dict[str, Any]], mixed: Sequence[dict[str, Any]] | None = None
) -> dict[str, Manifest]:
    """Receipts of units -> manifests; `mixed` are those of the shards that took the place of the units' own.

    Raises UserError when more was refused than `max_reject_fraction` allows.
    """
    inputs = sum(sum(receipt["inputs"].values()) for receipt in receipts)
    refused = [row for receipt in receipts for rows in receipt["rejects"].values() for row in rows]
    if inputs and len(refused) > plan.config.max_reject_fraction * inputs:
        reasons: dict[str, int] = {}
        for row in refused:
            reasons[row[2]] = reasons.get(row[2], 0) + 1
        table = shards.rejects_table(Reject(*row) for row in refused)
        where = storage.join(plan.config.output, shards.REJECTS)
        storage.write_bytes(where, table)
        raise UserError(
            f"{len(refused):,} of {inputs:,} inputs were refused, more than --max-reject-fraction "
            f"{plan.config.max_reject_fraction:g}: {'; '.join(f'{n:,} {reason}' for reason, n in sorted(reasons.items()))} "
            f"(such as {refused[0][0]}; all in {where}). Mend them, or allow more: finished work is kept"
        )
    manifests = {}
    for name in plan.splits:
        duplicates = [record for receipt in receipts for record in receipt["duplicates"][name]]
        if plan.config.deduplicate != "off" or plan.config.decontaminate:
            _report(plan, name, duplicates)
        written = [Receipt.from_dict(receipt["splits"][name]) for receipt in receipts]
        if mixed is not None:  # mean and deviation were measured by the units
            written = [Receipt(pixels=receipt.pixels) for receipt in written]
            written += [Receipt.from_dict(receipt[name]) for receipt in mixed]
        manifests[name] = shards.finish_dataset(
            plan.split_uri(name),
            written,
            encoding=plan.config.encoding,
            image=plan.image,
            classes=plan.labels.classes,
            multilabel=plan.labels.multilabel,
            rejects=[Reject(*row) for receipt in receipts for row in receipt["rejects"][name]],
            duplicates=len(duplicates),
            inputs=sum(receipt["inputs"][name] for receipt in receipts),
            config=identity(plan.config),
            input_fingerprint=plan.input_fingerprint,
        )
    _tidy(plan, manifests)
    return manifests


def _receipts(plan: Plan) -> list[dict[str, Any]]:
    kept = {file.path for file in storage.list_files(plan.work) if file.path.startswith("kept-")}
    units = range(len(plan.units))
    uris = [plan.kept_uri(u) if f"kept-{u:05d}.json" in kept else plan.receipt_uri(u) for u in units]
    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(storage.read_json, uris))


def _tidy(plan: Plan, manifests: dict[str, Manifest]) -> None:
    """Removes receipts, and what a killed task left: shards that no receipt names and half-written files."""
    for name, manifest in manifests.items():
        known = {shard.name for shard in manifest.shards}
        for file in storage.list_files(plan.split_uri(name), recursive=False):
            if file.path.startswith((".part-", "part-")) and file.path not in known:
                storage.remove(file.uri)
    if "" not in manifests:
        storage.remove(storage.join(plan.config.output, shards.REJECTS))  # of an attempt with too many
    storage.remove(plan.work, recursive=True)


def write_digits(folder: str) -> str:
    """Scikit-learn's digits as `folder/<digit>/NNNN.png`, 8x8 grey; written once."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    names = [f"{label}/{i:04d}.png" for i, label in enumerate(digits.target)]
    if not storage.exists(storage.join(folder, names[-1])):
        for image, name in zip(digits.images, names, strict=True):
            pixels = np.minimum(image * 16, 255).astype(np.uint8)  # 17 levels of grey
            storage.write_bytes(storage.join(folder, name), cv2.imencode(".png", pixels)[1].tobytes())
    return folder
