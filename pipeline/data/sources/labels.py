"""Converts label names to class indices: the class list of all sources together, and `--label-map`."""

import ast
import json
import logging
import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.data.codecs import Refused
from pipeline.data.sources.columns import SYNSET
from pipeline.data.sources.items import Source
from pipeline.data.sources.rows import decode_text, read_data
from pipeline.data.sources.words import LIKELY_MISSING
from pipeline.errors import UserError, plural

logger = logging.getLogger(__name__)
INTEGER = re.compile(r"-?[0-9]{1,18}")
MAX_INDEX = 1_000_000  # smaller integers are class indices; larger integers are class names


@dataclass(frozen=True, kw_only=True, slots=True)
class Labels:
    """The list of classes and the class index of every label name."""

    classes: tuple[str, ...]
    index: dict[str, int]
    multilabel: bool
    unlabelled: bool = False

    def encode(self, names: Sequence[str] | None) -> int | list[int]:
        """The class index of one input, or a sorted list of indices for multi-label data; -1 for unlabelled data.

        Raises Refused for an input without a label, or with a label that is not a class.
        """
        if self.unlabelled:
            return -1
        if names is None or (not names and not self.multilabel) or (list(names) == ["-1"] and "-1" not in self.index):
            raise Refused("no label")  # Hugging Face writes -1 for a missing label
        try:
            indices = [self.index[name] for name in names]
        except KeyError as error:
            raise Refused("unknown label", str(error.args[0])) from error
        if self.multilabel:
            return sorted(set(indices))
        if len(indices) > 1:
            raise Refused("unknown label", f"{plural(len(indices), 'label')} where one is expected")
        return indices[0]


def read_label_map(uri: str | None) -> list[str] | dict[str, str] | None:
    """Reads `--label-map`: a text file or JSON list of class names in index order, or a JSON object {name: new name}.

    Raises UserError for other content.
    """
    if uri is None:
        return None
    text = decode_text(read_data(uri), uri)
    value: Any
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise UserError(f"{uri}: JSON nested too deeply for class names") from error
    except ValueError:
        value = _python_literal(text) or [line.strip() for line in text.splitlines() if line.strip()]
        if (
            isinstance(value, list) and value and all(isinstance(line, str) and SYNSET.match(line) for line in value)
        ):  # "n01440764 tench, Tinca tinca"
            value = [line.split()[0] for line in value]
    if isinstance(value, dict):
        value = _indexed(value)
    if isinstance(value, dict) and all(isinstance(name, str) for name in value.values()):
        return value
    if isinstance(value, list) and all(isinstance(name, str) for name in value):
        if len(set(value)) != len(value):
            repeated = min(name for name, count in Counter(value).items() if count > 1)
            raise UserError(f"{uri}: the class list repeats {repeated!r}")
        return value
    raise UserError(f"{uri}: expected class names, one per line, or a JSON list, or a JSON object of name: new name")


def same_numbers(known: Collection[str], names: Collection[str]) -> dict[str, str]:
    """{spelling: name of `known`} of numbers with another number of leading zeros: 7 for the class 007. The spellings are
    those in `names`, and the plain number. Numbers that `known` has in several spellings are left out."""
    padded: dict[int, str | None] = {}
    for name in known:
        if INTEGER.fullmatch(name):
            padded[int(name)] = name if int(name) not in padded else None
    if not any(name is not None and name != str(number) for number, name in padded.items()):
        plain = {name for name in names if INTEGER.fullmatch(name) and name != str(int(name))}
        return {name: found for name in plain if (found := padded.get(int(name))) is not None}
    spellings = {name for name in names if INTEGER.fullmatch(name)} | {str(number) for number in padded}
    return {name: found for name in spellings if (found := padded.get(int(name))) is not None}


def _warn_about_similar(uri: str, classes: Sequence[str]) -> None:
    """Warns about classes that differ in case or in leading zeros alone. Single letters do so on purpose."""
    found: dict[str, str] = {}
    for name in classes:
        plain = str(int(name)) if INTEGER.fullmatch(name) else name.casefold()
        other = found.setdefault(plain, name)
        number = INTEGER.fullmatch(name)
        if other != name and (number or len(name) > 1):
            what = "leading zeros" if number else "case"
            logger.warning(
                "%s: the classes %r and %r differ in %s alone; --label-map with a JSON object of all names and their new names joins "
                "them", uri, other, name, what,
            )  # fmt: skip
            return


def _warn_about_missing(sources: Sequence[Source]) -> None:
    """Warns about labels that probably stand for a missing label. The name of a folder is a class on purpose."""
    for source in sources:
        names = () if source.by_folder else source.ordered_names or source.names or ()
        if found := [repr(name) for name in sorted(names) if name.casefold() in LIKELY_MISSING]:
            what = f"label {found[0]} is a class" if len(found) == 1 else f"labels {', '.join(found)} are classes"
            logger.warning(
                "%s: the %s, though such a text often stands for a missing label; --label-map with the list of all other "
                "classes rejects these images", source.uri, what,
            )  # fmt: skip


def _python_literal(text: str) -> list[Any] | dict[str, Any] | None:
    """A list or dictionary in Python syntax, such as {0: 'tench', 1: 'goldfish'}; None for other text."""
    if text.lstrip()[:1] not in ("{", "["):
        return None
    try:
        value = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None
    if isinstance(value, dict):
        return {str(name): new for name, new in value.items()}
    return value if isinstance(value, list) else None


def _indexed(value: dict[str, Any]) -> Any:
    """The class list of an object {index: name}, {index: [synset, name]} or {name:
    index}; other objects are returned unchanged."""
    if not value:
        return value
    if all(isinstance(name, list) and name and isinstance(name[0], str) for name in value.values()):
        value = {index: name[0] for index, name in value.items()}
    if all(type(index) is int for index in value.values()):
        value = {str(index): name for name, index in value.items()}
    if sorted(value) == sorted(map(str, range(len(value)))) and all(isinstance(name, str) for name in value.values()):
        return [value[str(index)] for index in range(len(value))]
    return value


def make_labels(
    sources: Sequence[Source], label_map: list[str] | dict[str, str] | None = None, unlabelled: bool = False
) -> Labels:
    """The classes of all sources together: in the order of the label map, in the order that the sources state, or
    sorted by name. If all names are whole numbers and not folder names, they are indices, and the classes are 0 to the
    largest of them. Raises UserError if there are no classes."""
    if unlabelled:
        return Labels(classes=(), index={}, multilabel=False, unlabelled=True)
    multilabel = any(source.multilabel for source in sources)
    own = {source.ordered_names for source in sources if source.ordered_names}
    names = {name for source in sources for name in source.names or ()}
    if isinstance(label_map, list):
        classes = tuple(label_map)
    elif len(own) == 1 and all(source.ordered_names for source in sources):
        classes = next(iter(own))
    elif names and all(INTEGER.fullmatch(name) for name in names) and not any(s.by_folder for s in sources):
        numbers = sorted(names, key=int)
        if numbers[0] == "-1" and len(numbers) > 2:
            logger.warning(
                "%s: the label -1 means no label; to make it a class, list it in --label-map",
                sources[0].uri,
            )
            numbers = numbers[1:]
        plain = int(numbers[0]) >= 0 and int(numbers[-1]) < MAX_INDEX and all(str(int(n)) == n for n in numbers)
        classes = tuple(str(i) for i in range(int(numbers[-1]) + 1)) if plain else tuple(numbers)
    else:
        classes = tuple(sorted(names))
    if isinstance(label_map, dict):
        classes = tuple(sorted(set(label_map.values())))
        place = {name: i for i, name in enumerate(classes)}
        renamed = {name: place[label_map[old]] for name, old in same_numbers(label_map, names).items()}
        renamed |= {old: place[new] for old, new in label_map.items()}
        return Labels(classes=classes, index=renamed, multilabel=multilabel)
    problem = next((source.problem for source in sources if source.problem), "")
    if not classes and problem:
        raise UserError(f"{problem}; no label was found")
    hint = next((f" ({source.hint})" for source in sources if source.hint), "")
    if not classes:
        raise UserError(
            f"{sources[0].uri}: zero classes{hint}; expected class folders (root/<class>/image.jpg), or labels.csv "
            "next to the images (or --labels FILE), or labelled tar, Parquet or TFRecord files; --unlabelled accepts "
            "images without labels"
        )
    if isinstance(label_map, list) and names and names.isdisjoint(classes) and not any(map(INTEGER.fullmatch, names)):
        raise UserError(
            f"--label-map: none of the labels in {sources[0].uri}, such as {min(names)!r}, is among its "
            f"{plural(len(classes), 'class')}, such as {classes[0]!r}"
        )
    by_number = isinstance(label_map, list) or bool(own)  # the label 7 may mean the class at index 7
    index = {str(i): i for i in range(len(classes))} if by_number else {}
    places = {name: i for i, name in enumerate(classes)}
    if isinstance(label_map, list):
        index |= {name: places[padded] for name, padded in same_numbers(classes, names).items()}
    index |= places
    _warn_about_similar(sources[0].uri, classes)
    if label_map is None:
        _warn_about_missing(sources)
    return Labels(classes=classes, index=index, multilabel=multilabel)
