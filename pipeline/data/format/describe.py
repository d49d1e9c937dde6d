"""Looking at a finished dataset: is it what its manifest says, and what is in it?"""

import hashlib
import io
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.data.format import shards
from pipeline.data.format.shards import Dataset, open_dataset
from pipeline.data.loading.augment import decode
from pipeline.data.loading.patches import unpatchify
from pipeline.errors import UserError

CHUNK = 16 << 20


# ---------------------------------------------------------------- verify


def verify(uri: str, threads: int = 4) -> list[str]:
    """What is wrong with a dataset, one line each; empty when all is well.

    Reads everything once: sizes and SHA-256 of every shard, schema and row groups against each footer, unique keys, labels
    within the classes, all totals of the manifest, and files that the manifest does not know. Raises UserError when there is
    no dataset at `uri`.
    """
    dataset = open_dataset(uri)
    manifest = dataset.manifest
    problems: list[str] = []
    with ThreadPoolExecutor(threads) as pool:
        for found in pool.map(lambda i: _verify_shard(dataset, i), range(len(manifest.shards))):
            problems.extend(found)
    known = {shard.name for shard in manifest.shards} | {shards.MANIFEST, shards.REJECTS, "duplicates.parquet"}
    for file in storage.list_files(dataset.uri, recursive=False):
        if file.path not in known and file.path.endswith(".parquet"):
            problems.append(f"{file.path}: not in the manifest")
    totals = {
        "rows": (manifest.rows, sum(shard.rows for shard in manifest.shards)),
        "inputs": (manifest.inputs, manifest.rows + sum(manifest.rejects.values()) + manifest.duplicates),
    }
    for name, (stated, found_) in totals.items():
        if stated != found_:
            problems.append(f"{shards.MANIFEST}: {name} is {stated}, its parts add up to {found_}")
    problems.extend(_verify_rejects(dataset))
    if not problems:  # keys and labels are only worth reading from shards that are what they should be
        problems.extend(_verify_rows(dataset))
    return problems


def _verify_shard(dataset: Dataset, i: int) -> Iterator[str]:
    shard, uri = dataset.manifest.shards[i], dataset.shard_uri(i)
    digest, size = hashlib.sha256(), 0
    try:
        with storage.open_file(uri) as file:
            while chunk := file.read(CHUNK):
                digest.update(chunk)
                size += len(chunk)
            if size != shard.bytes:
                yield f"{shard.name}: {size:,} bytes, the manifest says {shard.bytes:,}"
            elif digest.hexdigest() != shard.sha256:
                yield f"{shard.name}: the checksum differs from the manifest's: the content has changed"
            file.seek(0)
            parquet = pq.ParquetFile(file, pre_buffer=False)
            expected = shards.schema(dataset.encoding, dataset.manifest.image, dataset.classes, dataset.multilabel)
            if not parquet.schema_arrow.equals(expected):
                yield f"{shard.name}: the schema is not that of {dataset.encoding} shards"
            groups = [parquet.metadata.row_group(g).num_rows for g in range(parquet.num_row_groups)]
            if groups != [group[0] for group in shard.row_groups]:
                yield f"{shard.name}: {len(groups)} row groups of {sum(groups)} rows, the manifest says {shard.rows} rows"
    except FileNotFoundError:
        yield f"{shard.name}: missing"
    except (pa.ArrowException, OSError) as error:
        yield f"{shard.name}: not a readable Parquet file ({error})"


def _verify_rejects(dataset: Dataset) -> Iterator[str]:
    try:
        table = pq.read_table(io.BytesIO(storage.read_bytes(storage.join(dataset.uri, shards.REJECTS))))
        reasons = table["reason"].value_counts().to_pylist()
        counts = {entry["values"]: entry["counts"] for entry in reasons}
        if counts != dataset.manifest.rejects:
            yield f"{shards.REJECTS}: {counts}, the manifest says {dataset.manifest.rejects}"
    except FileNotFoundError:
        yield f"{shards.REJECTS}: missing"
    except (pa.ArrowException, KeyError) as error:
        yield f"{shards.REJECTS}: not readable ({error})"


def _verify_rows(dataset: Dataset) -> Iterator[str]:
    keys = np.empty(len(dataset), np.uint64)  # 64-bit hashes: 300 million keys in 2.4 GB
    counts = np.zeros(len(dataset.classes) + 1, np.int64)  # the last one counts unlabelled rows
    row = 0
    for head in dataset.heads():
        for key in head.keys:
            keys[row] = key_hash(key)
            row += 1
        labels = np.concatenate([np.array(k, np.int64) for k in head.labels]) if dataset.multilabel else head.labels
        if len(labels) and not -1 <= labels.min() <= labels.max() < len(dataset.classes):
            yield f"row {row}: a label outside the {len(dataset.classes)} classes"
            return
        counts += np.bincount(np.where(labels < 0, len(dataset.classes), labels), minlength=len(counts))
    keys.sort()
    repeated = int((keys[1:] == keys[:-1]).sum())
    if repeated:
        yield f"{repeated} keys are not unique"
    if counts[:-1].tolist() != dataset.manifest.class_counts:
        yield f"{shards.MANIFEST}: class counts differ from the rows"


def key_hash(key: str) -> int:
    """64 bits that stand for a key."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")


# ---------------------------------------------------------------- describe


def describe(uri: str, out_dir: str, pictures: int = 64) -> dict[str, Any]:
    """Facts about a dataset, with "text" for people; writes contact-sheet.png and classes.png into `out_dir`."""
    dataset = open_dataset(uri)
    manifest = dataset.manifest
    size = sum(shard.bytes for shard in manifest.shards)
    sides = [np.stack([head.widths, head.heights]) for head in dataset.heads()]
    widths, heights = np.concatenate(sides, axis=1)
    counts = np.array(manifest.class_counts)
    facts: dict[str, Any] = {
        "uri": dataset.uri,
        "rows": len(dataset),
        "encoding": dataset.encoding,
        "image": manifest.image,
        "bytes": size,
        "shards": len(manifest.shards),
        "row_groups": len(dataset.row_groups),
        "classes": len(dataset.classes),
        "multilabel": dataset.multilabel,
        "smallest_class": int(counts.min()) if len(counts) else 0,
        "largest_class": int(counts.max()) if len(counts) else 0,
        "original_width": _quantiles(widths),
        "original_height": _quantiles(heights),
        "mean": manifest.mean,
        "std": manifest.std,
        "inputs": manifest.inputs,
        "duplicates": manifest.duplicates,
        "rejects": manifest.rejects,
        "fingerprint": manifest.fingerprint,
    }
    order = np.argsort(-counts, kind="stable")
    largest = ", ".join(f"{dataset.classes[k]} {counts[k]:,}" for k in order[:3])
    smallest = ", ".join(f"{dataset.classes[k]} {counts[k]:,}" for k in order[::-1][:3])
    refused = "".join(f"\n    {count:,} {reason}" for reason, count in manifest.rejects.items()) or " none"
    facts["text"] = (
        f"{dataset.uri}\n"
        f"  images      {len(dataset):,} as {dataset.encoding} {_plain(manifest.image)}\n"
        f"  on disk     {size / 1e9:,.3f} GB, {size / len(dataset) / 1e3:,.1f} kB an image; {len(manifest.shards):,} shards, "
        f"{len(dataset.row_groups):,} row groups\n"
        f"  originals   width {_span(facts['original_width'])}, height {_span(facts['original_height'])} "
        "(smallest / median / largest)\n"
        f"  classes     {len(dataset.classes):,}{', several per image' if dataset.multilabel else ''}; most: {largest}; "
        f"fewest: {smallest}\n"
        f"  pixels      mean {_plain(manifest.mean)}, standard deviation {_plain(manifest.std)}\n"
        f"  inputs      {manifest.inputs:,}, duplicates removed {manifest.duplicates:,}, rejects:{refused}\n"
        f"  content     {manifest.fingerprint}\n"
        f"  pictures    {storage.join(out_dir, 'contact-sheet.png')}, {storage.join(out_dir, 'classes.png')}"
    )
    rng = np.random.Generator(np.random.Philox(0))
    chosen = np.sort(rng.choice(len(dataset), min(pictures, len(dataset)), replace=False))
    samples = dataset.read(chosen)
    titles = [class_names(dataset, row["label"]) for row in samples]
    sheet = contact_sheet([thumbnail(dataset, row["image"]) for row in samples], titles)
    storage.write_bytes(storage.join(out_dir, "contact-sheet.png"), sheet)
    storage.write_bytes(storage.join(out_dir, "classes.png"), _histogram(dataset, counts))
    return facts


def _quantiles(values: np.ndarray) -> dict[str, int]:
    return {"min": int(values.min()), "median": int(np.median(values)), "max": int(values.max())}


def _span(quantiles: dict[str, int]) -> str:
    return " / ".join(str(value) for value in quantiles.values())


def _plain(values: Any) -> str:
    if isinstance(values, dict):
        return ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in values.items())
    return " ".join(f"{value:.3f}" for value in values) if values else "not measured"


def class_names(dataset: Dataset, label: Any) -> str:
    names = [dataset.classes[k] for k in (label if isinstance(label, list) else [label]) if k >= 0]
    return ", ".join(names)


def thumbnail(dataset: Dataset, image: Any) -> np.ndarray:
    """A stored image as RGB pixels."""
    if dataset.encoding == "jpeg":
        return decode(image).copy()
    geometry = dataset.manifest.image
    return unpatchify(image, geometry["height"], geometry["width"], geometry["patch_size"])


def contact_sheet(pictures: Sequence[np.ndarray], titles: Sequence[str], columns: int = 8) -> bytes:
    """Pictures in a grid with a title each, as PNG."""
    from matplotlib.figure import Figure

    if not pictures:
        raise UserError("no pictures to show")
    lines = -(-len(pictures) // columns)
    figure = Figure(figsize=(1.5 * columns, 1.7 * lines), dpi=100, layout="constrained")
    axes = np.atleast_1d(figure.subplots(lines, columns)).ravel()
    for axis in axes:
        axis.axis("off")
    for axis, picture, title in zip(axes, pictures, titles, strict=False):
        axis.imshow(picture, interpolation="nearest")
        axis.set_title(title if len(title) <= 22 else title[:21] + "…", fontsize=7, parse_math=False)
    return _png(figure)


def _histogram(dataset: Dataset, counts: np.ndarray) -> bytes:
    """Images per class: bars by name for few classes, the sorted curve for many."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), dpi=100, layout="constrained")
    axis = figure.subplots()
    if len(counts) <= 60:
        axis.bar(range(len(counts)), counts, color="#3b6ea5")
        # a dollar in a name begins no formula
        names: dict[str, Any] = {"rotation": 60, "ha": "right", "fontsize": 7, "parse_math": False}
        axis.set_xticks(range(len(counts)), dataset.classes, **names)
    else:
        axis.fill_between(np.arange(len(counts)), np.sort(counts)[::-1], step="mid", color="#3b6ea5")
        axis.set_xlabel("classes, largest first")
    axis.set_ylabel("images")
    axis.set_title(f"{len(dataset):,} images in {len(counts):,} classes", fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)
    return _png(figure)


def _png(figure: Any) -> bytes:
    sink = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # an empty box says it as well
        figure.savefig(sink, format="png")
    return sink.getvalue()
