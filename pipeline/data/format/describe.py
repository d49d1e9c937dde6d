"""Describes a finished dataset: statistics, a contact sheet and a class histogram."""

import io
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from pipeline import storage
from pipeline.data.codecs import decode_stored
from pipeline.data.format.dataset import Dataset, open_dataset
from pipeline.data.patches import unpatchify
from pipeline.errors import UserError, plural
from pipeline.outputs import check_output
from pipeline.units import bytes_text


def describe_dataset(uri: str, out_dir: str, pictures: int = 64) -> dict[str, Any]:
    """Statistics of a dataset, with a readable summary in "text". Writes contact-sheet.png and classes.png to
    `out_dir`."""
    check_output(out_dir)
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
        "revision": manifest.revision,
        "deleted": manifest.deleted,
        "history": manifest.history,
    }
    order = np.argsort(-counts, kind="stable")
    sizes = [f"{dataset.classes[k]} {counts[k]:,}" for k in order]
    extremes = f"most: {', '.join(sizes[:3])}; fewest: {', '.join(sizes[::-1][:3])}"
    refused = "".join(f"\n    {count:,} {reason}" for reason, count in manifest.rejects.items()) or " none"
    deleted = f", {plural(manifest.deleted, 'image')} deleted" if manifest.deleted else ""
    facts["text"] = (
        f"{dataset.uri}\n"
        f"  images      {len(dataset):,} as {dataset.encoding} {_plain(manifest.image)}\n"
        f"  on disk     {bytes_text(size)}, {bytes_text(size / len(dataset))} per image; {plural(len(manifest.shards), 'shard')}, "
        f"{plural(len(dataset.row_groups), 'row group')}\n"
        f"  originals   width {_span(facts['original_width'])}, height {_span(facts['original_height'])} "
        "(smallest / median / largest)\n"
        f"  classes     {len(dataset.classes):,}{', several per image' if dataset.multilabel else ''}: "
        f"{', '.join(sizes) if len(sizes) <= 6 else extremes}\n"
        f"  pixels      mean {_plain(manifest.mean)}, standard deviation {_plain(manifest.std)}\n"
        f"  inputs      {manifest.inputs:,}, duplicates removed {manifest.duplicates:,}, rejects:{refused}\n"
        f"  content     {manifest.fingerprint}, revision {manifest.revision}{deleted}\n"
        f"  pictures    {storage.join(out_dir, 'contact-sheet.png')}, {storage.join(out_dir, 'classes.png')}"
    )
    _write_pictures(dataset, out_dir, pictures, counts)
    return facts


def _write_pictures(dataset: Dataset, out_dir: str, pictures: int, counts: np.ndarray) -> None:
    rng = np.random.Generator(np.random.Philox(0))
    chosen = np.sort(rng.choice(len(dataset), min(pictures, len(dataset)), replace=False))
    samples = dataset.read(chosen)
    titles = [class_names(dataset, row["label"]) for row in samples]
    sheet = contact_sheet([thumbnail(dataset, row["image"]) for row in samples], titles)
    storage.write_bytes(storage.join(out_dir, "contact-sheet.png"), sheet)
    storage.write_bytes(storage.join(out_dir, "classes.png"), _histogram(dataset, counts))


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
        return decode_stored(image).copy()
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
        # Escape dollar signs, which start formulas in matplotlib.
        names: dict[str, Any] = {"rotation": 60, "ha": "right", "fontsize": 7, "parse_math": False}
        axis.set_xticks(range(len(counts)), dataset.classes, **names)
    else:
        axis.fill_between(np.arange(len(counts)), np.sort(counts)[::-1], step="mid", color="#3b6ea5")
        axis.set_xlabel("classes, largest first")
    axis.set_ylabel("images")
    axis.set_title(f"{plural(len(dataset), 'image')} in {plural(len(counts), 'class')}", fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)
    return _png(figure)


def _png(figure: Any) -> bytes:
    sink = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # missing glyphs are drawn as boxes
        figure.savefig(sink, format="png")
    return sink.getvalue()
