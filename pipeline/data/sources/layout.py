"""Which folders of a path name its split and its class, found from the folders that hold images."""

import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from urllib.parse import unquote

from pipeline.data.sources.words import HELD_OUT, LABEL_COLUMNS, SPLIT_COLUMNS, SPLITS, TRAIN, split_of_name
from pipeline.errors import UserError

logger = logging.getLogger(__name__)

WORDNET = re.compile(r"(n\d{8})(?![0-9])")
# Folders that group files and say nothing about what the images show: parts and years ...
GROUPING_FOLDERS = re.compile(
    r"(?i)(fold|part|batch|shard|session|set|chunk|group|vol|volume|disc|disk|day|week|month|take|dump|archive)s?[-_ ]?\d+"
    r"|(19|20)\d\d([-_.]?\d\d){0,2}"
)
# ... and what all of the files are.
CONTAINERS = frozenset(
    [
        "data",
        "dataset",
        "datasets",
        "image",
        "images",
        "img",
        "imgs",
        "jpg",
        "jpeg",
        "jpegs",
        "jpegimages",
        "jpg_images",
        "png",
        "pngs",
        "photo",
        "photos",
        "pic",
        "pics",
        "picture",
        "pictures",
        "original",
        "originals",
        "raw",
        "full",
        "thumb",
        "thumbs",
        "thumbnail",
        "thumbnails",
        "small",
        "medium",
        "large",
        "files",
        "frames",
    ]
)
STRAYS = 0.2  # of the images: so many may lie above the folders that name the classes, and go without a label


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Levels count from 0, the first folder below the source; None where there is no such folder."""

    split_level: int | None = None
    class_level: int | None = 0
    class_levels: dict[str, int | None] = field(default_factory=dict)
    """By split, where they differ."""
    splits: dict[str, str] = field(default_factory=dict)
    """Folder -> split."""
    in_names: bool = False
    """Whether the file's name says the split."""
    one_class: bool = False
    """Whether the folders of the class level all have one name: a WordNet id in the file's name says more."""
    uncertain: str = ""
    """What the user should know about the choice; empty when there was none."""

    def split(self, path: str) -> str | None:
        folders = folders_of(path)
        if self.in_names:
            return split_in_name(path)
        if self.split_level is None or len(folders) <= self.split_level:
            return None
        return self.splits.get(folders[self.split_level])

    def label(self, path: str) -> str | None:
        """The class that a folder names, or the WordNet id that the file's name begins with."""
        folders = folders_of(path)
        level = self.class_levels.get(self.split(path) or "", self.class_level)
        wordnet = WORDNET.match(path.rpartition("/")[2])
        if level is not None and len(folders) > level and not (wordnet and self.one_class):
            return partition_value(folders[level], LABEL_COLUMNS)
        return wordnet[1] if wordnet else None


def folders_of(path: str) -> list[str]:
    """The folders of a path; an object store also accepts empty names, which are none."""
    return [part for part in path.split("/")[:-1] if part]


def partition_value(folder: str, columns: Iterable[str]) -> str | None:
    """The value of a Hive partition (label=cat) whose column is one of `columns`; the folder itself when it is no
    partition of theirs; None for Hive's name of a missing value."""
    column, equals, value = folder.partition("=")
    if not equals or column.lower() not in columns:
        return folder
    return None if value == "__HIVE_DEFAULT_PARTITION__" else unquote(value)


def layout_of_source(
    uri: str, folders: Mapping[tuple[str, ...], int], class_level: int | None, *, classes_wanted: bool
) -> Layout:
    """`find_layout` for the source at `uri`: errors and a warning about what is uncertain name it.

    class_level: --class-level, which counts from 1. classes_wanted: False where no folder has to say a class.
    """
    level = None if class_level is None else class_level - 1
    try:
        layout = find_layout(folders, level if classes_wanted else 0)
    except UserError as error:
        raise UserError(f"{uri}: {error}") from error
    if layout.uncertain:
        logger.warning("%s: %s", uri, layout.uncertain)
    return layout


def find_layout(folders: Mapping[tuple[str, ...], int], class_level: int | None = None) -> Layout:
    """The layout of a source with so many images in each of `folders`; the user may say the level of the classes.

    Folders that hold everything (photos/images/<class>/) are passed. Split folders may lie above the classes
    (train/<class>/) or below them (<class>/train/). Raises UserError when two levels of folders could be the classes,
    or a folder could be a split as well as a class."""
    dirs = dict(sorted(folders.items()))
    level = _past_wrappers(dirs)
    splits = _splits_at(dirs, level)
    if not splits:
        if class_level is None:
            _refuse_half_a_split(dirs, level)
        return _without_splits_above(dirs, class_level)
    by_split: dict[str, dict[tuple[str, ...], int]] = {}
    for inside, count in dirs.items():
        if len(inside) > level and inside[level] in splits:
            by_split.setdefault(splits[inside[level]], {})[inside] = count
    if class_level is not None:
        levels: dict[str, int | None] = dict.fromkeys(by_split, class_level)
        return Layout(split_level=level, class_levels=levels, class_level=None, splits=splits)
    levels, uncertain = _levels_of_splits(by_split, level + 1)
    return Layout(split_level=level, class_levels=levels, class_level=None, splits=splits, uncertain=uncertain)


def _without_splits_above(dirs: dict[tuple[str, ...], int], class_level: int | None) -> Layout:
    found, uncertain = (class_level, "") if class_level is not None else _class_level(dirs, 0)
    one_class = found is None
    if found is None:
        found = 0 if any(dirs) else None
    below = None if found is None else found + 1
    while below is not None and dirs and _reach(dirs, below):
        if splits := _splits_at(dirs, below, strict=True):
            return Layout(split_level=below, class_level=found, splits=splits, one_class=one_class, uncertain=uncertain)
        below += 1
    return Layout(class_level=found, one_class=one_class, uncertain=uncertain)


def _levels_of_splits(by_split: dict[str, dict[tuple[str, ...], int]], first: int) -> tuple[dict[str, int | None], str]:
    """The level of the classes in every split. A split whose folders have the names of another's classes has the same
    classes, however few of them it has."""
    found = {name: _class_level(inside, first) for name, inside in by_split.items()}
    uncertain = next((text for _, text in found.values() if text), "")
    levels = {name: level for name, (level, _) in found.items()}
    known = {d[level] for name, level in levels.items() if level is not None for d in by_split[name] if len(d) > level}
    if not known:  # one class everywhere, or none
        names = {d[first] if len(d) > first else None for inside in by_split.values() for d in inside}
        alone = next(iter(names)) if len(names) == 1 else None
        return dict.fromkeys(levels, first if alone and alone.lower() not in CONTAINERS else None), uncertain
    for name, inside in by_split.items():
        if levels[name] is None:
            shared = [k for k in range(first, max(map(len, inside))) if {d[k] for d in inside if len(d) > k} & known]
            levels[name] = shared[0] if shared else None
    return levels, uncertain


# ---------------------------------------------------------------- splits


def split_in_name(path: str) -> str | None:
    """The split that a file's name says: ILSVRC2012_val_00000001.JPEG, train-00000-of-00003.parquet."""
    found = split_of_name(path.rpartition("/")[2].partition(".")[0])
    return found[0].lower() if found else None


def in_names_say_splits(found: Iterable[str | None]) -> bool:
    """Whether the names of all files say a split (`split_in_name` of each), some of training and some held out."""
    kinds = set(found)
    return None not in kinds and bool(kinds & TRAIN and kinds & HELD_OUT)


def splits_of_files(paths: Iterable[str]) -> dict[str, str]:
    """The split that every file's name or folder says (train-00000-of-00003.parquet, val/0001.tar).

    {} when some say none, unless there is both a training and a held-out one.
    """
    found: dict[str, str] = {}
    unnamed = False
    for path in paths:
        base = path.rpartition("/")[2].partition(".")[0]
        plain = (_plain_split(folder) for folder in folders_of(path))
        named = (match[0] for name in (base, *reversed(folders_of(path))) if (match := split_of_name(name)))
        split = next((split for split in (*plain, *named) if split), None)
        if split:
            found[path] = split
        unnamed |= split is None
    kinds = {split.lower() for split in found.values()}
    return {} if unnamed and not (kinds & TRAIN and kinds & HELD_OUT) else found


def _splits_at(dirs: Mapping[tuple[str, ...], int], level: int, strict: bool = False) -> dict[str, str]:
    """The split folders at a level, {folder: split}: all folders there are splits, or (unless `strict`) both a training
    and a held-out one are among them. A longer name (train_images) counts beside its like (test_images)."""
    names = {d[level] for d in dirs if len(d) > level}
    plain = {name: split for name in names if (split := _plain_split(name))}
    kinds = {split.lower() for split in plain.values()}
    if plain and (plain.keys() == names or (not strict and kinds & TRAIN and kinds & HELD_OUT)):
        return plain
    by_rest: dict[str, dict[str, str]] = {}
    for name in names:
        if match := split_of_name(name):
            by_rest.setdefault(match[1], {})[name] = match[0]
    for rest, found in by_rest.items():
        kinds = {split.lower() for split in found.values()}
        if rest and kinds & TRAIN and kinds & HELD_OUT and len(set(found.values())) == len(found):
            return found
    return {}


def _plain_split(folder: str) -> str | None:
    """train, Validation, split=test."""
    column, equals, value = folder.partition("=")
    if equals and column.lower() in SPLIT_COLUMNS:
        return unquote(value)
    return folder if folder.lower() in SPLITS else None


def _refuse_half_a_split(dirs: Mapping[tuple[str, ...], int], level: int) -> None:
    """Raises UserError for a folder `train` with folders in it, beside folders of other names."""
    names = sorted({d[level] for d in dirs if len(d) > level})
    for name in names:
        inside = {d[level + 1] for d in dirs if len(d) > level + 1 and d[level] == name}
        elsewhere = {d[level + 1] for d in dirs if len(d) > level + 1 and d[level] != name}
        if _plain_split(name) and len(inside) > 1 and (not elsewhere or inside & elsewhere):
            others = ", ".join(other for other in names[:4] if other != name)
            raise UserError(
                f"the folder {name}/ may be a split, with the classes {', '.join(sorted(inside)[:3])}, or a class beside "
                f"{others}; --include '{'/'.join(_above(dirs, level, name))}/*' takes it alone, --class-level {level + 1} makes it a class, "
                f"--class-level {level + 2} makes classes of the folders inside"
            )


def _above(dirs: Mapping[tuple[str, ...], int], level: int, name: str) -> tuple[str, ...]:
    return next(d[: level + 1] for d in dirs if len(d) > level and d[level] == name)


# ---------------------------------------------------------------- classes


def _reach(dirs: Mapping[tuple[str, ...], int], level: int) -> bool:
    """Whether nearly all images have a folder at this level."""
    return sum(count for d, count in dirs.items() if len(d) > level) >= (1 - STRAYS) * sum(dirs.values())


def _past_wrappers(dirs: Mapping[tuple[str, ...], int]) -> int:
    """The first level at which folders differ, or at which one is a split; 0 when there is none."""
    level = 0
    while dirs and _reach(dirs, level):
        names = {d[level] for d in dirs if len(d) > level}
        if len(names) > 1 or any(map(_plain_split, names)):
            return level
        level += 1
    return 0


def _class_level(dirs: Mapping[tuple[str, ...], int], first: int) -> tuple[int | None, str]:
    """(the level from `first` on whose folders name the classes, what the user should know about it).

    The level is None when folders differ nowhere. Raises UserError when several levels could be it.
    """
    names: dict[int, set[str]] = {}
    level = first
    while dirs and _reach(dirs, level):
        names[level] = {d[level] for d in dirs if len(d) > level}
        level += 1
    varied = [k for k, found in names.items() if len(found) > 1 and not _splits_at(dirs, k, strict=True)]
    if not varied:
        below = {d[level] for d in dirs if len(d) > level}  # folders that hold only some of the images
        return (level if len(below) > 1 else None), ""
    for test in (_are_labels, _are_wordnet):
        if sure := [k for k in varied if test(names[k])]:
            return sure[0], ""
    plain = [
        k
        for k in varied
        if not all(name.lower() in CONTAINERS or GROUPING_FOLDERS.fullmatch(name) for name in names[k])
    ]
    candidates = plain or varied
    if len(candidates) > 1:
        choices = "; ".join(f"--class-level {k + 1} ({_listed(names[k])})" for k in candidates)
        raise UserError(f"the folders of two levels differ and either could name the classes: choose {choices}")
    chosen = candidates[0]
    uncertain = ""
    if len(varied) > 1:
        other = next(k for k in varied if k != chosen)
        uncertain = (
            f"the classes are the folders at level {chosen + 1} ({_listed(names[chosen])}), not those at level {other + 1} "
            f"({_listed(names[other])}); --class-level {other + 1} makes those the classes"
        )
    return chosen, uncertain


def _are_labels(names: set[str]) -> bool:
    return all("=" in name and name.partition("=")[0].lower() in LABEL_COLUMNS for name in names)


def _are_wordnet(names: set[str]) -> bool:
    return all(WORDNET.fullmatch(name) for name in names)


def _listed(names: set[str]) -> str:
    shown = ", ".join(sorted(names)[:3])
    return f"{len(names)} classes: {shown}{', ...' if len(names) > 3 else ''}"
