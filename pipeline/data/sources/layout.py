"""Which folders of a path name its split and its class."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

TRAIN = frozenset({"train", "training"})
HELD_OUT = frozenset({"val", "valid", "validation", "test", "testing", "dev", "eval"})
SPLITS = TRAIN | HELD_OUT
WORDNET = re.compile(r"(n\d{8})(?![0-9])")
SPLIT_IN_NAME = re.compile(rf"(?i)(?:^|[^a-z])({'|'.join(sorted(SPLITS, key=len, reverse=True))})(?=[^a-z]|$)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Levels count from 0, the first folder below the source; None where there is no such folder."""

    split_level: int | None = None
    class_level: int | None = 0
    class_levels: dict[str, int | None] = field(default_factory=dict)
    """By split, where they differ."""
    splits: tuple[str, ...] = ()

    def split(self, folders: list[str]) -> str | None:
        if self.split_level is None or len(folders) <= self.split_level:
            return None
        name = folders[self.split_level]
        return name if name in self.splits else None

    def label(self, folders: list[str]) -> str | None:
        level = self.class_levels.get(self.split(folders) or "", self.class_level)
        return None if level is None or len(folders) <= level else folders[level]


def folders_of(path: str) -> list[str]:
    """The folders of a path; an object store also accepts empty names, which are none."""
    return [part for part in path.split("/")[:-1] if part]


def find_layout(folders: Iterable[tuple[str, ...]], class_level: int | None = None) -> Layout:
    """The layout of a source whose images lie in `folders`; the user may say the level of the classes.

    Folders that hold everything (photos/images/<class>/) are passed. Split folders may lie above the classes
    (train/<class>/) or below them (<class>/train/).
    """
    dirs = sorted(set(folders))
    level = _past_wrappers(dirs, 0)
    splits = _splits_at(dirs, level)
    if splits:
        by_split = {name: [d for d in dirs if len(d) > level and d[level] == name] for name in splits}
        levels = {name: _class_level(inside, level + 1) for name, inside in by_split.items()}
        if all(value is None for value in levels.values()):  # one class, or none
            names = {d[level + 1] if len(d) > level + 1 else None for d in dirs}
            levels = dict.fromkeys(levels, level + 1) if len(names) == 1 and names != {None} else levels
        if class_level is not None:
            levels = dict.fromkeys(levels, class_level)
        return Layout(split_level=level, class_levels=levels, class_level=None, splits=splits)
    found = _class_level(dirs, 0)
    chosen = class_level if class_level is not None else 0 if found is None else found
    if all(len(d) > chosen + 1 for d in dirs) and (splits := _splits_at(dirs, chosen + 1, strict=True)):
        return Layout(split_level=chosen + 1, class_level=chosen, splits=splits)
    return Layout(class_level=chosen)


def _past_wrappers(dirs: list[tuple[str, ...]], level: int) -> int:
    """The first level at which folders differ, or at which one is a split."""
    start = level
    while dirs and all(len(d) > level + 1 for d in dirs):
        names = {d[level] for d in dirs}
        if len(names) > 1 or any(name.lower() in SPLITS for name in names):
            return level
        level += 1
    names = {d[level] for d in dirs if len(d) > level}
    return level if len(names) > 1 or any(name.lower() in SPLITS for name in names) else start


def _class_level(dirs: list[tuple[str, ...]], level: int) -> int | None:
    """The first level from `level` on at which folders differ; None when there is none."""
    while dirs and all(len(d) > level for d in dirs):
        if len({d[level] for d in dirs}) > 1:
            return level
        level += 1
    return level if len({d[level] for d in dirs if len(d) > level}) > 1 else None


def _splits_at(dirs: list[tuple[str, ...]], level: int, strict: bool = False) -> tuple[str, ...]:
    """The split folders at a level: all folders there are splits, or (unless `strict`) both a training and a held-out one
    are among them."""
    names = {d[level] for d in dirs if len(d) > level}
    found = {name for name in names if name.lower() in SPLITS}
    lower = {name.lower() for name in found}
    if found and (found == names or (not strict and lower & TRAIN and lower & HELD_OUT)):
        return tuple(sorted(found))
    return ()


def splits_of_files(paths: Iterable[str]) -> dict[str, str]:
    """The split that every file's name or folder says (train-00000-of-00003.parquet, val/0001.tar); {} unless all say one."""
    found: dict[str, str] = {}
    for path in paths:
        match = SPLIT_IN_NAME.search(path)
        if match is None:
            return {}
        found[path] = match[1]
    return found
