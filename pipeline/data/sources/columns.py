"""Columns of tables and of Parquet, JSON and TFRecord samples: finds the label columns and reads their values."""

import math
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.data.sources.rows import parse_list
from pipeline.data.sources.words import (
    CAPTION_COLUMNS,
    LABEL_COLUMNS,
    MISSING_VALUES,
)
from pipeline.errors import UserError, nearest, shorten

SEPARATORS = re.compile(r"[;|]")  # between several labels in one cell
PLURAL = re.compile(r"(?i)(?:^|[^a-z])(labels|classes|tags|categories|targets)$")
WHOLE_NUMBER = re.compile(r"-?\d+(\.0*)?")
NUMBERS = re.compile(r"\d+(\s+\d+)*")
YES, NO = ("1", "1.0", "true", "yes"), ("0", "0.0", "-1", "-1.0", "false", "no")  # values of one-hot columns
DECIMAL_COMMA, THOUSANDS = re.compile(r"-?\d+(,0{1,2})?"), re.compile(r"-?\d{1,3}(,\d{3})*")
MAX_FLAG_VALUES = len(YES) + len(NO)
SYNSET = re.compile(r"n\d{8}\b")


@dataclass(frozen=True, kw_only=True, slots=True)
class Columns:
    """Columns that the user named, for label tables and for sources whose samples have columns."""

    file: str | None = None
    label: str | None = None
    """One column, or several one-hot columns separated by commas."""
    split: str | None = None


class NoLabelColumn(UserError):
    """A table has file names but no recognised label column."""

    others: tuple[str, ...] = ()
    """Its other columns."""


def named_column(names: Sequence[str], known: Sequence[str], wanted: str | None, flag: str) -> str | None:
    """The column that the user named, or else the first of `known` that is among `names`. Raises UserError if there is
    no column of the name that the user gave."""
    if wanted is not None:
        if wanted not in names:
            raise UserError(f"{flag} {wanted}: no such column{nearest(wanted, names)}; there are: {', '.join(names)}")
        return wanted
    lower = {normalised_name(name): name for name in reversed(names)}
    return next((lower[name] for name in known if name in lower), None)


def normalised_name(name: str) -> str:
    """The name of a column in lower case, with _ in place of blanks and hyphens."""
    return re.sub(r"[\s-]+", "_", name.strip().lower().lstrip("#\ufeff"))


# ---------------------------------------------------------------- labels


def label_values(
    rows: Sequence[dict[Any, Any]], names: Sequence[str], label: str | None, wanted: str | None
) -> tuple[list[list[str] | None], bool] | None:
    """(label names of every row, whether the data is multi-label), from the column `label`, from the one-hot columns
    that the user named, or from one-hot columns among `names`. None if there are no such columns."""
    one_hot = named_one_hot(wanted, names)
    if label:
        return column_labels([row.get(label) for row in rows], label)
    one_hot = one_hot or one_hot_columns(rows, names)
    if not one_hot:
        return None
    values: list[list[str] | None] = [[name for name in one_hot if is_one(row.get(name))] for row in rows]
    return values, any(value is None or len(value) != 1 for value in values)


def named_one_hot(wanted: str | None, names: Sequence[str]) -> list[str]:
    """The one-hot columns that the user named, separated by commas; empty if the user named one column or none."""
    one_hot = [name.strip() for name in wanted.split(",")] if wanted and wanted not in names and "," in wanted else []
    if missing := next((name for name in one_hot if name not in names), None):
        raise UserError(f"--label-column {wanted}: no column {missing}{nearest(missing, names)}")
    return one_hot


def one_hot_columns(rows: Sequence[dict[Any, Any]], names: Sequence[str]) -> list[str]:
    """The columns that hold only 0 and 1, if all columns do, or if there are at
    least three and each row has exactly one 1."""
    flags = [name for name in names if all(is_flag(row.get(name)) for row in rows)]
    if len(flags) == len(names) > 1:
        return flags
    alone = len(flags) > 2 and all(sum(is_one(row.get(name)) for name in flags) == 1 for row in rows)
    return flags if alone else []


def is_flag(value: Any) -> bool:
    return isinstance(value, bool | np.bool_) or str(value).strip().lower() in (*YES, *NO)


def is_one(value: Any) -> bool:
    return str(value).strip().lower() in YES


def column_labels(values: Sequence[Any], name: str) -> tuple[list[list[str] | None], bool]:
    """(label names of every value, whether the data is multi-label) of a column called `name`."""
    if name.lower() == "predictionstring":  # Kaggle's ImageNet: a synset and four coordinates per object
        found = [SYNSET.search(as_text(value)) for value in values]
        return [[match[0]] if match else None for match in found], False
    values = [name_in_object(parse_list(as_text(value) if isinstance(value, bytes) else value)) for value in values]
    for value in values:
        if isinstance(value, dict):
            raise unnamed_object(name, value)
    plural = bool(PLURAL.search(name))
    values = values if plural else _without_commas(values, name)
    lists = any(isinstance(value, list) for value in values)
    multilabel = any(isinstance(value, list) and len(value) != 1 for value in values) or (lists and plural)
    texts = {value for value in values if isinstance(value, str)}
    separator = _separator(texts, plural)
    labels = [label_names(value, separator) for value in values]
    return whole_numbers(labels), multilabel or separator is not None


def name_in_object(value: Any) -> Any:
    """The name in an object such as {"id": 3, "name": "cat"}, also of objects in a list; other values unchanged."""
    if isinstance(value, list | tuple):
        return [name_in_object(part) for part in value] if any(isinstance(part, dict) for part in value) else value
    if not isinstance(value, dict):
        return value
    fields = {normalised_name(str(key)): part for key, part in value.items()}
    found = next((fields[key] for key in ("name", *LABEL_COLUMNS) if key in fields), None)
    return found if isinstance(found, str | int) else value


def unnamed_object(column: str, value: Any) -> UserError:
    """The error for a label that is an object without a name."""
    return UserError(
        f"the column {column} has objects without a name, such as {value!s:.80}; write the name of the class in a "
        "column of its own"
    )


def _without_commas(values: list[Any], column: str) -> list[Any]:
    """The values with 2,0 written as 2.0, if all texts are whole numbers with a decimal comma. Raises UserError if they may be
    numbers with separators of thousands, or several numbers."""
    texts = {value.strip() for value in values if isinstance(value, str) and not is_missing(value)}
    if not any("," in text for text in texts):
        return values
    if all(map(DECIMAL_COMMA.fullmatch, texts)):
        return [value.replace(",", ".") if isinstance(value, str) else value for value in values]
    if all(map(THOUSANDS.fullmatch, texts)):
        example = min(text for text in texts if "," in text)
        raise UserError(
            f"the column {column} has labels such as {example!r}, which are one number or several; write numbers without "
            "commas, or several labels with blanks or as a list"
        )
    return values


def _separator(texts: Iterable[str], plural: bool) -> re.Pattern | None:
    """The separator of several labels in one cell, or None.

    ; and | are separators in a column with a plural name. In other columns ; | and commas are separators if the parts
    also occur in other cells. Blanks are separators between numbers.
    """
    texts = {text.strip() for text in texts if not is_missing(text)}
    for pattern in (SEPARATORS, re.compile(",")):
        several = [text for text in texts if pattern.search(text)]
        if not several:
            continue
        if plural and pattern is SEPARATORS:
            return pattern
        parts = {text: {part.strip() for part in pattern.split(text)} for text in texts}
        count: dict[str, int] = {}
        for found in parts.values():
            for part in found:
                count[part] = count.get(part, 0) + 1
        if all(any(count[part] > 1 for part in parts[text]) for text in several):
            return pattern
    if texts and all(NUMBERS.fullmatch(text) for text in texts) and any(" " in text for text in texts):
        return re.compile(r"\s+")
    return None


def whole_numbers(labels: list[list[str] | None]) -> list[list[str] | None]:
    """The labels, with 2.0 written as 2 if all of them are whole numbers: pandas
    turns 2 into 2.0 if a value is missing."""
    texts = [name for names in labels for name in names or ()]
    if any("." in text for text in texts) and all(map(WHOLE_NUMBER.fullmatch, texts)):
        return [names and [str(int(float(text))) for text in names] for names in labels]
    return labels


def label_names(value: Any, separator: re.Pattern | None = None) -> list[str] | None:
    """The names in a raw label (integer, text, bytes or list); None if the label is missing."""
    if isinstance(value, list | tuple | np.ndarray):
        return [name for part in value for name in label_names(part) or ()]
    if separator is not None and value == "":
        return []  # none of the classes
    if is_missing(value):
        return None
    if separator is not None and isinstance(value, str):
        return [part.strip() for part in separator.split(value) if part.strip()]
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return [as_text(value).strip()]


def is_missing(value: Any) -> bool:
    """Whether a value is None, NaN or a text that stands for them."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return True
    return isinstance(value, str | bytes) and as_text(value).strip() in MISSING_VALUES


def as_text(value: Any) -> str:
    return value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else str(value)


def look_like_captions(names: Iterable[str], inputs: int) -> bool:
    """Whether the labels are probably captions: texts of several words, most of which occur once."""
    found = list(names)
    words = sum(len(name.split()) for name in found)
    return inputs > 2 and len(found) > 0.5 * inputs and words >= 3 * len(found)


def captions_error(where: str, names: Iterable[str], inputs: int, flag: str) -> UserError:
    found = sorted(names)
    return UserError(
        f"{where}: its labels look like captions ({len(found):,} different texts for {inputs:,} images, such as "
        f"{found[0][:60]!r}), and captions are not classes; --unlabelled ignores them, {flag} uses them as classes"
    )


def no_label_column(uri: str, names: Sequence[str], values: Mapping[str, Iterable[Any]]) -> NoLabelColumn:
    """The error for a table without a label column. Suggests the column with the fewest distinct values, captions
    excluded. values: those of the columns that may be suggested."""
    distinct = {n: len(set(map(str, values[n]))) for n in values if normalised_name(n) not in CAPTION_COLUMNS}
    guess = min((n for n in distinct if distinct[n] > 1), key=lambda n: distinct[n], default=None)
    flags = [n for n in distinct if 0 < distinct[n] <= MAX_FLAG_VALUES and all(map(is_flag, values[n]))]
    if len(flags) > 1:  # a column for each class
        guess = ",".join(flags)
    advice = f"name it, perhaps with --label-column {shlex.quote(guess)}" if guess else "name it with --label-column"
    listed = shorten((f"{name:.60}" for name in names), 40) or "no other column"
    error = NoLabelColumn(f"{uri}: no label column among: {listed}; {advice}")
    error.others = tuple(names)
    return error
