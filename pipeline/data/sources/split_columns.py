"""Finds the column of the splits in tables, Parquet files and samples, and reads its values."""

import functools
import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from pipeline.data.sources.columns import as_text, is_flag, is_missing, is_one, named_column, normalised_name
from pipeline.data.sources.words import (
    CAPTION_COLUMNS,
    FILE_COLUMNS,
    HELD_OUT,
    LABEL_COLUMNS,
    LIKELY_SPLIT_COLUMNS,
    SPLIT_COLUMNS,
    SPLIT_WORDS,
    SPLITS,
    TRAIN,
    split_of_name,
)
from pipeline.errors import UserError

logger = logging.getLogger(__name__)

FILLERS = frozenset(
    [
        "is",
        "in",
        "for",
        "to",
        "use",
        "used",
        "image",
        "img",
        "picture",
        "set",
        "data",
        "dataset",
        "sample",
        "row",
        "flag",
        "split",
        "the",
    ]
)
WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
VALIDATION = frozenset({"val", "valid", "validation", "dev"})
MAX_SPLIT_NAMES = 16  # in a column that only its values show to be one of splits
OTHER_KINDS = frozenset({*LABEL_COLUMNS, *FILE_COLUMNS, *CAPTION_COLUMNS})
HELD_OUT_ALONE = "train"
"""The split of the images that have none, if all splits of a source are held out."""


class SeveralFlags(UserError):
    """Several columns, such as is_train and is_test, say which images belong to a split."""

    columns: tuple[str, ...] = ()


def split_column(
    names: Sequence[str],
    wanted: str | None,
    values: Callable[[str], Iterable[Any]],
    texts: Iterable[str] | None = None,
    label: str | None = None,
) -> str | None:
    """The split column: the one that the user named, one of a known name, or one whose values are splits.

    values: returns the values of a column; called for columns whose names do not decide. texts: the columns that may
    have splits under any name (default: all). label: the columns of labels that the user named. Raises UserError if
    several columns, or a column that may be a class, say which images belong to a split."""
    found = named_column(names, SPLIT_COLUMNS, wanted, "--split-column")
    if found is not None:
        return found
    labels = {part.strip() for part in (label or "").split(",")} | {label}
    names = [name for name in names if name not in labels]
    likely = [name for name in names if is_likely(name)]
    for name in likely:
        kinds = [as_text(value).strip() for value in values(name) if not is_missing(value)]
        enough = len(set(kinds)) > 1 or not is_doubtful(name)
        if kinds and enough and all(map(split_of_name, kinds)):
            return name
    flags = [name for name in names if split_of_flag(name) and _are_flags(values(name))]
    flags = [name for name in flags if not _means_usable(name, values(name))]
    if flags:
        return _flag_column(flags, names, values)
    for name in names if texts is None else texts:
        if name in names and name not in likely and normalised_name(name) not in OTHER_KINDS:
            kinds = [as_text(value).strip().lower() for value in values(name) if not is_missing(value)]
            if 1 < len(set(kinds)) <= MAX_SPLIT_NAMES and SPLITS.issuperset(kinds):
                return name
    return None


@functools.lru_cache(100_000)
def is_likely(name: str) -> bool:
    """Whether a column probably holds splits: usage, Data Split, image_set, train_val_test, tvt."""
    words = _words(name)
    return (
        normalised_name(name) in LIKELY_SPLIT_COLUMNS
        or not SPLIT_WORDS.isdisjoint(words)
        or sum(word in SPLITS for word in words) > 1
    )


def is_doubtful(name: str) -> bool:
    """Whether a likely column may also hold something else, such as the type of an object."""
    return normalised_name(name) in LIKELY_SPLIT_COLUMNS and SPLIT_WORDS.isdisjoint(_words(name))


@functools.lru_cache(100_000)
def split_of_flag(name: str) -> str | None:
    """The split that 1 means in a column such as is_valid, testFlag or training: train, val or test; None for others."""
    words = [word for word in _words(name) if word not in FILLERS]
    if len(words) != 1 or words[0] not in SPLITS:
        return None
    return "train" if words[0] in TRAIN else "val" if words[0] in VALIDATION else "test"


def split_name(value: Any, column: str) -> str | None:
    """The split that a value of the split column stands for. In a column such as is_train, 1 is train and 0 is test; in
    columns such as is_valid and is_test, 0 is train."""
    if is_missing(value):
        return None
    flagged = split_of_flag(column)
    if flagged and is_flag(value):
        return flagged if is_one(value) else "test" if flagged == "train" else "train"
    return as_text(value).strip()


def split_of_flags(cells: Mapping[str, Any]) -> str | None:
    """The split of an image by several flags, such as {"is_train": 0, "is_val": 1}: that of the only 1. If none is 1, and
    all of them are of held-out splits, it is train. None if they are missing, or contradict one another."""
    flags = {name: split_of_flag(name) for name in cells}
    ones = [flags[name] for name, value in cells.items() if not is_missing(value) and is_one(value)]
    if len(ones) == 1:
        return ones[0]
    unknown = ones or "train" in flags.values() or any(map(is_missing, cells.values()))
    return None if unknown else "train"


def split_of_fields(fields: Mapping[str, Any]) -> str | None:
    """The split in the fields of one sample, of which only this sample is known; None if no field says it."""
    plain = {normalised_name(name): name for name in reversed(list(fields))}
    known = next((plain[name] for name in SPLIT_COLUMNS if name in plain), None)
    if known is not None:
        return split_name(fields[known], known) if isinstance(fields[known], str | bytes | int) else None
    flags: dict[str, str] = {}
    for name, value in fields.items():
        if is_likely(name) and not is_doubtful(name) and isinstance(value, str | bytes):
            if as_text(value).strip().lower() in SPLITS:
                return split_name(value, name)
        elif split_of_flag(name) and isinstance(value, str | bytes | int) and is_flag(as_text(value)):
            flags[name] = as_text(value)
    if len(flags) > 1:
        return split_of_flags(flags)
    return next((split_name(value, name) for name, value in flags.items()), None)


def with_unnamed(named: Iterable[str | None]) -> set[str]:
    """The splits, with "" in place of None for inputs without one."""
    return {name or "" for name in named}


@functools.lru_cache(100_000)
def _words(name: str) -> tuple[str, ...]:
    return tuple(word.lower() for word in WORD.findall(name))


def _are_flags(values: Iterable[Any]) -> bool:
    present = [value for value in values if not is_missing(value)]
    return bool(present) and all(map(is_flag, present))


def _means_usable(name: str, values: Iterable[Any]) -> bool:
    """Whether a column such as valid or is_valid is 1 for most images. Then it does not mean validation images, which
    are fewer than the others."""
    flags = [is_one(value) for value in values if not is_missing(value)]
    usable = split_of_flag(name) == "val" and "valid" in _words(name) and 2 * sum(flags) > len(flags)
    if usable:
        logger.warning(
            "the column %s is 1 for most of the images, so it is not taken for the validation split; --split-column %s "
            "reads it as one", name, name,
        )  # fmt: skip
    return usable


def _flag_column(flags: list[str], names: Sequence[str], values: Callable[[str], Iterable[Any]]) -> str:
    """The only one of the columns that flag the images of a split."""
    if len(flags) > 1:
        error = SeveralFlags(
            f"the columns {', '.join(flags)} each say which images belong to a split; name one of them with "
            "--split-column, or write one column split with the name of the split"
        )
        error.columns = tuple(flags)
        raise error
    (flag,) = flags
    if flag.lower() in SPLITS and named_column(names, LABEL_COLUMNS, None, "") is None:
        others = [name for name in names if name != flag and _are_flags(values(name))]
        if len(others) > 1:  # as in Pascal VOC, where train is a class
            raise UserError(
                f"the column {flag} may be a split or one of the classes {', '.join([*others[:3], '...'])}; name the split "
                f"with --split-column {flag}, or the classes with --label-column A,B,..."
            )
    return flag


def split_of_others(named: Iterable[str]) -> str | None:
    """The split of the images without one in a source with the splits `named`; None if it is unknown."""
    found = [name for name in named if name]
    return HELD_OUT_ALONE if found and all(name.lower() in HELD_OUT for name in found) else None
