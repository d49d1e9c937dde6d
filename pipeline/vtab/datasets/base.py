"""The description of a VTAB data set, and functions that several data sets use."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.errors import UserError
from pipeline.vtab.containers import Tree

Member = str | int  # the name of a member, or the row number in an array
Labels = Sequence[int] | np.ndarray


@dataclass(frozen=True, kw_only=True, slots=True)
class OfficialFile:
    """A file that the owners of a data set distribute, with the size and SHA-256 that TFDS recorded from their servers.
    manual: another source, or instructions if every URL needs an account. instead: accepted alternative names: the
    unpacked archive, or the same data in another container. within: (archive, member) of a zip that is distributed
    today and contains the file.
    """

    name: str
    bytes: int | None = None
    sha256: str | None = None
    url: str | None = None
    manual: str | None = None
    instead: tuple[str, ...] = ()
    within: tuple[str, str] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class FoundFile:
    """The location of a required file. prefix: prefix of the member names if the archive is unpacked. nested: the
    member of the zip `uri` that is the file. packed: whether the file is the original archive.
    """

    file: OfficialFile
    uri: str
    prefix: str = ""
    nested: str = ""
    packed: bool = True

    @property
    def tree(self) -> Tree:
        return Tree(self.uri, self.prefix, self.nested)


@dataclass(frozen=True, kw_only=True, slots=True)
class ArchiveFile:
    """A container of images, and how to read it.

    read(file, members) yields (member, image file) of the requested members, in any order, and skips missing ones.
    part: the part of a container with several parts, such as the array of a split. random_access: whether members can
    be read individually without reading the others.
    """

    uri: str
    read: Callable[["ArchiveFile", Sequence[Member]], Iterator[tuple[Member, bytes]]]
    prefix: str = ""
    nested: str = ""
    part: str = ""
    random_access: bool = False

    @property
    def tree(self) -> Tree:
        return Tree(self.uri, self.prefix, self.nested)


@dataclass(frozen=True, kw_only=True, slots=True)
class Listing:
    """Examples of one TFDS split whose images are in one file: keys in TFDS's form,
    and labels for each task of the data set."""

    split: str
    file: ArchiveFile
    keys: Sequence[Any]
    members: Sequence[Member]
    labels: Mapping[str, Labels]


@dataclass(frozen=True, kw_only=True, slots=True)
class DataSet:
    """A data set with its TFDS name. files: the official files. classes: for every task the class names, in label
    order. index(files) lists all examples; files: {official name: location of the file}.
    """

    name: str
    files: tuple[OfficialFile, ...]
    classes: Mapping[str, Sequence[str]]
    index: Callable[[Mapping[str, FoundFile]], list[Listing]]


def label_of(classes: Sequence[str], name: str, where: str) -> int:
    """The label of the class `name`. Raises UserError with the location `where` for an unknown class."""
    if name not in classes:
        raise UserError(f"{where}: {name!r} is not one of the {len(classes)} classes")
    return classes.index(name)


# ---------------------------------------------------------------- archives of image files


def read_tree(file: ArchiveFile, members: Sequence[Member]) -> Iterator[tuple[Member, bytes]]:
    """Reads image files unchanged."""
    yield from file.tree.read(str(member) for member in members)


def image_files(found: FoundFile) -> ArchiveFile:
    """A folder, zip or tar of image files."""
    return ArchiveFile(
        uri=found.uri,
        prefix=found.prefix,
        nested=found.nested,
        read=read_tree,
        random_access=found.tree.random_access,
    )


def list_class_folders(
    found: FoundFile, task: str, classes: Sequence[str], class_of: Callable[[str, str], str]
) -> list[Listing]:
    """Lists a tree of <folder>/<file>.jpg, all in the split 'train'. `class_of(folder,
    file)` returns the class. Keys: <class>_<file>."""
    members = [name for name in found.tree.names() if name.lower().endswith((".jpg", ".jpeg"))]
    parts = [member.split("/")[-2:] for member in members]
    if any(len(part) < 2 for part in parts):
        raise UserError(f"{found.uri}: images outside the class folders")
    names = [class_of(*part) for part in parts]
    labels = [label_of(classes, name, f"{found.uri}: {member}") for name, member in zip(names, members, strict=True)]
    keys = [f"{name}_{file}" for name, (_, file) in zip(names, parts, strict=True)]
    return [Listing(split="train", file=image_files(found), keys=keys, members=members, labels={task: labels})]
