"""Validates a `PrepareConfig` and resolves its --splits."""

import dataclasses
import re
from collections.abc import Sequence

from pipeline import storage
from pipeline.data.downloads.config import check_downloads
from pipeline.data.duplicates.hashes import BITS
from pipeline.data.format import MAX_ROW_GROUP_BYTES
from pipeline.data.prepare.builtin import BUILTIN
from pipeline.data.prepare.config import FROM_SOURCE, MERGE, WORK, PrepareConfig
from pipeline.data.sources.split_columns import split_of_others
from pipeline.errors import UserError

MAX_SPLITS = 64  # a column with more values is not a split column


def check_config(config: PrepareConfig) -> PrepareConfig:
    """Validates the config. Returns it with absolute URIs. Raises UserError for invalid values."""
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
    if config.row_group_bytes > MAX_ROW_GROUP_BYTES:
        raise UserError(f"--row-group-bytes {config.row_group_bytes}: at most {MAX_ROW_GROUP_BYTES}")
    if config.quality > 100:
        raise UserError(f"--quality {config.quality}: at most 100")
    if config.class_level is not None and config.class_level < 1:
        raise UserError(f"--class-level {config.class_level}: at least 1")
    if config.sample is not None and config.sample < 1:
        raise UserError(f"--sample {config.sample}: at least 1")
    if not 0 <= config.distance < BITS // 4:
        raise UserError(f"--distance {config.distance}: between 0 and {BITS // 4 - 1} bits")
    if not 0 <= config.max_reject_fraction <= 1:
        raise UserError(f"--max-reject-fraction {config.max_reject_fraction}: between 0 and 1")
    _check_descriptor(config)
    check_downloads(config.download)
    parse_splits(config.splits)
    output = storage.normalise(config.output)
    inputs = tuple(uri if uri in BUILTIN else storage.normalise(uri) for uri in config.source)
    for uri in inputs:
        if output == uri or output.startswith(uri + "/"):
            raise UserError(f"--output {output} is inside --source {uri}; choose a location outside it")
    labels, label_map = (storage.normalise(uri) if uri else None for uri in (config.labels, config.label_map))
    return dataclasses.replace(
        config,
        source=inputs,
        output=output,
        labels=labels,
        label_map=label_map,
        decontaminate=tuple(map(storage.normalise, config.decontaminate)),
        descriptor=storage.normalise(config.descriptor) if config.descriptor else None,
    )


def _check_descriptor(config: PrepareConfig) -> None:
    if config.descriptor is None:
        return
    if config.deduplicate not in ("near", "report") and not config.decontaminate:
        raise UserError("--descriptor: has nothing to compare without --deduplicate near|report or --decontaminate")
    for name in ("descriptor_similarity", "descriptor_accept"):
        value = getattr(config, name)
        if value is not None and not 0 < value <= 1:
            raise UserError(f"--{name.replace('_', '-')} {value}: above 0, at most 1")
    for name in ("descriptor_mean", "descriptor_std"):
        if len(getattr(config, name)) not in (0, 3):
            raise UserError(f"--{name.replace('_', '-')}: three numbers, for red, green and blue")
    if config.descriptor_gpus < 0:
        raise UserError(f"--descriptor-gpus {config.descriptor_gpus}: at least 0")


def parse_splits(splits: Sequence[str]) -> dict[str, float]:
    """("train=0.9", "test=0.1") as fractions of one. Raises UserError unless they add up to 1."""
    if not splits or tuple(splits) in (FROM_SOURCE, MERGE):
        return {"": 1.0}
    fractions: dict[str, float] = {}
    for text in splits:
        name, _, value = text.partition("=")
        try:
            fractions[name] = float(value)
        except ValueError:
            raise UserError(f'--splits {text}: write name=fraction, such as "train=0.9 test=0.1"') from None
        if not name or not all(c.isalnum() or c in "-_" for c in name) or name == WORK or not fractions[name] > 0:
            raise UserError(f"--splits {text}: a plain name and a fraction above 0")
    if len(fractions) != len(splits) or not abs(sum(fractions.values()) - 1) <= 1e-6:
        raise UserError(f"--splits {' '.join(splits)}: different names, and fractions that add up to 1")
    return fractions


def resolve_splits(config: PrepareConfig, found: Sequence[str]) -> dict[str, float]:
    """{split: fraction} of the dataset, given the splits of the sources, with "" if some images have none; fractions are
    0 when the source determines the splits.

    Raises UserError when splits of the source would be merged without --splits merge, or when the source has no splits.
    """
    others = split_of_others(found) if "" in found else None
    unnamed, found = "" in found, [name for name in found if name]
    if config.splits == FROM_SOURCE:
        if not found:
            raise UserError(
                "--splits from-source: the source has no splits (train/ and val/ folders, files named train-..., a split column)"
            )
        odd = [name for name in found if not re.fullmatch(r"[\w-][\w .=-]*", name) or name == WORK]
        if odd or len(found) > MAX_SPLITS:
            raise UserError(
                f"--splits from-source: {f'{odd[0]!r} is not a valid folder name' if odd else f'{len(found)} splits'}; name the "
                "column of the splits with --split-column, or give fractions (train=0.9 val=0.1)"
            )
        return dict.fromkeys([*found, *([others] if others else [])], 0.0)
    if len(found) > 1 and config.splits != MERGE:
        shown = ", ".join(found[:8]) + (", ..." if len(found) > 8 else "")
        raise UserError(
            f"{config.source[0]}: has the splits {shown}, which would become one dataset; --splits from-source keeps "
            f"them separate, --splits merge merges them, --include (or --source with its folder) selects one"
        )
    if found and unnamed and config.splits != MERGE:
        what = f"makes the others the split {others}" if others else "rejects the others"
        raise UserError(
            f"{config.source[0]}: some images belong to the split {found[0]}, the others to none, and all would become one "
            f"dataset; --splits from-source {what}, --splits merge merges them, --include selects some"
        )
    return parse_splits(config.splits)
