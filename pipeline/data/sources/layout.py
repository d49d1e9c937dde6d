"""Finds which levels of folders name the split and the class of an image."""

import functools
import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from urllib.parse import unquote

from pipeline import storage
from pipeline.data.sources.words import HELD_OUT, JUNK, LABEL_COLUMNS, SPLIT_COLUMNS, SPLITS, TRAIN, split_of_name
from pipeline.errors import UserError, plural

logger = logging.getLogger(__name__)

WORDNET = re.compile(r"(n\d{8})(?![0-9])")
# Folders that group files and say nothing about their content: parts and years ...
GROUPING_FOLDERS = re.compile(
    r"(?i)(fold|part|batch|shard|session|set|chunk|group|vol|volume|disc|disk|day|week|month|take|dump|archive)s?[-_ ]?\d+"
    r"|(19|20)\d\d([-_.]?\d\d){0,2}"
)
# ... also with more words, which are the same for all parts: HAM10000_images_part_1, images_001 ...
PART = re.compile(
    r"(?i)(.*[^a-z])?(part|batch|shard|chunk|images?|imgs?|photos?|pictures?|data|frames?|files?)[-_ ]?\d+"
)
# ... and names for images in general.
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
NUMBERED_SPLIT = re.compile(rf"(?i)({'|'.join(sorted(SPLITS))})[-_ ]?\d{{1,2}}")
# Folders of targets that are images, too: of segmentation, detection and depth.
TARGETS = re.compile(
    r"(?i)((seg(mentation)?|instance|semantic)[-_ ]?)?(masks?|annotations?|annots?|labels?|trimaps?|gt|ground[-_ ]?truths?|depths?)"
    r"|segmentation(class|object|s)?|edges|heat[-_ ]?maps?"
)
MAX_STRAY_FRACTION = 0.2  # the largest fraction of images that may lie above the class folders, and so have no label


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """The folder levels of splits and classes. Levels count from 0, the first
    folder below the source; None: no such level."""

    split_level: int | None = None
    class_level: int | None = 0
    class_levels: dict[str, int | None] = field(default_factory=dict)
    """The class level by split, if the splits differ."""
    splits: dict[str, str] = field(default_factory=dict)
    """Folder -> split."""
    split_in_file_name: bool = False
    """Whether the split is part of the file name."""
    class_column: str = ""
    """The column of Hive partitions that are the classes, as in species=cat; empty for plain folder names."""
    one_class: bool = False
    """Whether all folders of the class level have the same name; a WordNet id in the file name is used instead."""
    uncertain: str = ""
    """A warning about an ambiguous choice; empty if the choice was clear."""

    def split(self, path: str) -> str | None:
        if self.split_in_file_name:
            return split_in_name(path)
        if self.split_level is None:
            return None
        folders = folders_of(path)
        return self.splits.get(folders[self.split_level]) if len(folders) > self.split_level else None

    def class_level_of(self, path: str) -> int | None:
        """The class level of the split that a path belongs to."""
        if not self.class_levels:
            return self.class_level
        return self.class_levels.get(self.split(path) or "", self.class_level)

    def class_level_within(self, inside: tuple[str, ...]) -> int | None:
        """The class level of a file in a folder, given as its levels; None if the folder lies above the class folders."""
        level = self.class_level_of("/".join((*inside, "")))
        return level if level is not None and len(inside) > level else None

    def label(self, path: str) -> str | None:
        """The class from the folder name, or the WordNet id at the beginning of the file name."""
        folders, level = folders_of(path), self.class_level_of(path)
        wordnet = WORDNET.match(path.rpartition("/")[2])
        if level is not None and len(folders) > level and not (wordnet and self.one_class):
            return partition_value(folders[level], (self.class_column.lower(), *LABEL_COLUMNS))
        return wordnet[1] if wordnet else None


def folders_of(path: str) -> tuple[str, ...]:
    """The folders of a path, without the empty names that object stores allow."""
    return _parts(path.rpartition("/")[0])


@functools.lru_cache(1 << 16)  # neighbours in a listing are in the same folder
def _parts(folder: str) -> tuple[str, ...]:
    return tuple(part for part in folder.split("/") if part)


def partition_value(folder: str, columns: Iterable[str]) -> str | None:
    """The value of a Hive partition (label=cat) of one of `columns`; other folder
    names unchanged; None for Hive's missing value."""
    column, equals, value = folder.partition("=")
    if not equals or column.lower() not in columns:
        return folder
    return None if value == "__HIVE_DEFAULT_PARTITION__" else unquote(value)


def layout_of_source(
    uri: str, folders: Mapping[tuple[str, ...], int], class_level: int | None, *, classes_wanted: bool
) -> Layout:
    """`find_layout` for the source at `uri`, which errors and warnings name.

    class_level: the value of --class-level, which counts from 1. classes_wanted: False if no class is taken from
    folders.
    """
    level = None if class_level is None else class_level - 1
    try:
        layout = find_layout(folders, level if classes_wanted else 0)
    except UserError as error:
        raise UserError(f"{uri}: {error}") from error
    if layout.uncertain:
        logger.warning("%s: %s", uri, layout.uncertain)
    return replace(layout, class_column=_class_column(layout, folders))


def _class_column(layout: Layout, folders: Iterable[tuple[str, ...]]) -> str:
    columns = set()
    for inside in folders:
        if (level := layout.class_level_within(inside)) is not None:
            columns.add(inside[level].partition("=")[0] if "=" in inside[level] else "")
    return columns.pop() if len(columns) == 1 else ""


def find_layout(folders: Mapping[tuple[str, ...], int], class_level: int | None = None) -> Layout:
    """The layout of a source. folders: number of images in each folder. class_level: the level of the classes, if
    known.

    Folders that hold everything (photos/images/<class>/) are skipped. Split folders may lie above the classes
    (train/<class>/) or below them (<class>/train/). Raises UserError if two folder levels could name the classes, or if
    a folder could be a split or a class."""
    dirs = dict(sorted(folders.items()))
    level = _first_varying_level(dirs)
    splits = _splits_at(dirs, level)
    if not splits:
        if class_level is None:
            _refuse_ambiguous_split(dirs, level)
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
    if found is None:  # the first folder that may be a class
        deepest = max(dirs, key=lambda inside: len(inside)) if dirs else ()
        found = next((k for k, name in enumerate(deepest) if name.lower() not in CONTAINERS), None)
    below = None if found is None else found + 1
    while below is not None and dirs and _reaches(dirs, below):
        if splits := _splits_at(dirs, below, strict=True):
            return Layout(split_level=below, class_level=found, splits=splits, one_class=one_class, uncertain=uncertain)
        below += 1
    return Layout(class_level=found, one_class=one_class, uncertain=uncertain)


def _levels_of_splits(by_split: dict[str, dict[tuple[str, ...], int]], first: int) -> tuple[dict[str, int | None], str]:
    """(the class level of every split, a warning). A split with folders named like the classes of another split has the
    same classes, even if it has only a few of them."""
    found = {name: _class_level(inside, first) for name, inside in by_split.items()}
    uncertain = next((text for _, text in found.values() if text), "")
    levels = {name: level for name, (level, _) in found.items()}
    known = {d[level] for name, level in levels.items() if level is not None for d in by_split[name] if len(d) > level}
    if not known:  # at most one class in every split
        names = {d[first] if len(d) > first else None for inside in by_split.values() for d in inside}
        alone = next(iter(names)) if len(names) == 1 else None
        return dict.fromkeys(levels, first if alone and alone.lower() not in CONTAINERS else None), uncertain
    for name, inside in by_split.items():
        if levels[name] is None:
            shared = [k for k in range(first, max(map(len, inside))) if {d[k] for d in inside if len(d) > k} & known]
            levels[name] = shared[0] if shared else None
    return levels, uncertain


# ---------------------------------------------------------------- splits


def split_folders(names: Iterable[str]) -> dict[str, str]:
    """{folder: split in lower case} of folders side by side, such as Training and test1; empty if they are no splits."""
    found = _splits_at({(name,): 1 for name in names}, 0)
    return {name: split_of_folder(split) for name, split in found.items()}


def visible_folders(uri: str) -> list[str]:
    """The folders directly in a folder, without hidden and system folders."""
    return [name for name in storage.list_folders(uri) if not re.search(JUNK, name)]


def split_of_folder(split: str) -> str:
    """The name of a split in lower case, without a number."""
    return split.lower().rstrip("0123456789_- ")


def split_in_name(path: str) -> str | None:
    """The split in a file name such as ILSVRC2012_val_00000001.JPEG or train-00000-of-00003.parquet."""
    found = split_of_name(path.rpartition("/")[2].partition(".")[0])
    return found[0].lower() if found else None


def file_names_have_splits(found: Mapping[str | None, int]) -> bool:
    """Whether nearly all file names contain a split, some training and some held-out. found: number of names for each
    result of `split_in_name`."""
    without = found.get(None, 0)
    return without <= MAX_STRAY_FRACTION * sum(found.values()) and bool(
        found.keys() & TRAIN and found.keys() & HELD_OUT
    )


def splits_of_files(paths: Iterable[str]) -> dict[str, str]:
    """The split of every file, from its name or folder (train-00000-of-00003.parquet, val/0001.tar).

    Empty if some files have no split and no held-out split occurs.
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
    return {} if unnamed and not kinds & HELD_OUT else found


def _splits_at(dirs: Mapping[tuple[str, ...], int], level: int, strict: bool = False) -> dict[str, str]:
    """The split folders at a level, {folder: split}; empty unless all folders at the level are splits or (if not
    `strict`) they include a training and a held-out split. Longer names count in
    pairs such as train_images and test_images."""
    names = {d[level] for d in dirs if len(d) > level}
    plain = {name: split for name in names if (split := _plain_split(name))}
    kinds = {split.lower() for split in plain.values()}
    if plain and (plain.keys() == names or (not strict and kinds & TRAIN and kinds & HELD_OUT)):
        return plain
    numbered = plain | {name: name for name in names - plain.keys() if NUMBERED_SPLIT.fullmatch(name)}
    kinds = {split.rstrip("0123456789_- ").lower() for split in numbered.values()}
    if numbered.keys() == names and kinds & TRAIN and kinds & HELD_OUT:  # train and test1
        return numbered
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
    """The split of a folder named train, Validation or split=test; None for other names."""
    column, equals, value = folder.partition("=")
    if equals and column.lower() in SPLIT_COLUMNS:
        return unquote(value)
    return folder if folder.lower() in SPLITS else None


def _refuse_ambiguous_split(dirs: Mapping[tuple[str, ...], int], level: int) -> None:
    """Raises UserError if a folder such as `train` contains folders and stands next to folders that are not splits."""
    names = sorted({d[level] for d in dirs if len(d) > level})
    for name in names:
        inside = {d[level + 1] for d in dirs if len(d) > level + 1 and d[level] == name}
        elsewhere = {d[level + 1] for d in dirs if len(d) > level + 1 and d[level] != name}
        if _plain_split(name) and len(inside) > 1 and (not elsewhere or inside & elsewhere):
            others = ", ".join(other for other in names[:4] if other != name)
            raise UserError(
                f"the folder {name}/ may be a split, with the classes {', '.join(sorted(inside)[:3])}, or a class like "
                f"{others}; --include '{'/'.join(_above(dirs, level, name))}/*' reads it alone, --class-level "
                f"{level + 1} makes it a class, --class-level {level + 2} uses the folders inside as classes"
            )


def _above(dirs: Mapping[tuple[str, ...], int], level: int, name: str) -> tuple[str, ...]:
    return next(d[: level + 1] for d in dirs if len(d) > level and d[level] == name)


# ---------------------------------------------------------------- classes


def _reaches(dirs: Mapping[tuple[str, ...], int], level: int) -> bool:
    """Whether nearly all images lie in a folder at this level."""
    return sum(count for d, count in dirs.items() if len(d) > level) >= (1 - MAX_STRAY_FRACTION) * sum(dirs.values())


def _first_varying_level(dirs: Mapping[tuple[str, ...], int]) -> int:
    """The first level where folder names differ or a folder is a split; 0 if there is no such level."""
    level = 0
    while dirs and _reaches(dirs, level):
        names = {d[level] for d in dirs if len(d) > level}
        if len(names) > 1 or any(map(_plain_split, names)):
            return level
        level += 1
    return 0


def _class_level(dirs: Mapping[tuple[str, ...], int], first: int) -> tuple[int | None, str]:
    """(the level of the class folders, at least `first`; a warning or "").

    The level is None if folder names differ at no level. Raises UserError if several levels could be the class level.
    """
    names: dict[int, set[str]] = {}
    level = first
    while dirs and _reaches(dirs, level):
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
        and not _are_parts(names[k])
    ]
    candidates = plain or varied
    if not plain and all(_are_parts(names[k]) for k in varied):
        some = sorted(names[varied[0]])
        raise UserError(
            f"the folders {', '.join(some[:3])}{', ...' if len(some) > 3 else ''} look like parts of one collection, not like "
            f"classes; --labels FILE reads labels from a table, --unlabelled reads the images alone, --class-level {varied[0] + 1} "
            "uses the folders as classes"
        )
    if any(map(TARGETS.fullmatch, names[candidates[0]])):
        _refuse_targets(names[candidates[0]], candidates[0])
    if len(candidates) > 1:
        choices = "; ".join(f"--class-level {k + 1} ({_listed(names[k])})" for k in candidates)
        raise UserError(f"two levels of folders could name the classes; choose {choices}")
    chosen = candidates[0]
    uncertain = ""
    if len(varied) > 1:
        other = next(k for k in varied if k != chosen)
        uncertain = (
            f"the classes are the folders at level {chosen + 1} ({_listed(names[chosen])}), not those at level "
            f"{other + 1} ({_listed(names[other])}); --class-level {other + 1} makes those the classes"
        )
    return chosen, uncertain


def _refuse_targets(names: set[str], level: int) -> None:
    """Raises UserError for folders of images beside folders of masks or other targets."""
    images = sorted(name for name in names if name.lower() in CONTAINERS)
    targets = sorted(name for name in names if TARGETS.fullmatch(name))
    if images and len(images) + len(targets) == len(names):
        raise UserError(
            f"the folders {', '.join(images)} and {', '.join(targets)} look like images and their masks or annotations, not "
            f"like classes; --include '*{images[0]}/*' reads the images alone, --class-level {level + 1} uses the folders as "
            "classes"
        )


def _are_parts(names: set[str]) -> bool:
    alike = len({re.sub(r"\d+", "0", name) for name in names}) == 1
    return all(GROUPING_FOLDERS.fullmatch(name) or (alike and PART.fullmatch(name)) for name in names)


def _are_labels(names: set[str]) -> bool:
    return all("=" in name and name.partition("=")[0].lower() in LABEL_COLUMNS for name in names)


def _are_wordnet(names: set[str]) -> bool:
    return all(WORDNET.fullmatch(name) for name in names)


def _listed(names: set[str]) -> str:
    shown = ", ".join(sorted(names)[:3])
    return f"{plural(len(names), 'class')}: {shown}{', ...' if len(names) > 3 else ''}"
