"""What a data set of VTAB states about itself, and what several data sets share."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.errors import UserError
from pipeline.vtab.containers import Tree

Member = str | int  # a member's name, or the row number in an array
Labels = Sequence[int] | np.ndarray


@dataclass(frozen=True, kw_only=True, slots=True)
class OfficialFile:
    """A file that a data set's owners distribute, with size and SHA-256 as TFDS recorded them from the owners' servers.

    manual: where else to get it, or how to when no URL can be fetched without an account.
    instead: names of what may lie there in the file's stead: the archive unpacked, or the same data in another container.
    within: (archive, member) of a zip that is distributed today and contains the file.
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
    """Where a required file lies. prefix: what the members' names begin with when the archive lies there unpacked.

    nested: the member of the zip `uri` that is the file. packed: whether the file is there as its owners made it.
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

    read(file, members) yields (member, image file) of the members asked for, in any order, and leaves out missing ones.
    part: which part of the container is meant, when it holds several (a split's array, for example).
    random_access: whether a slice of the members costs no more than its share of the whole.
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
    """Examples of one TFDS split whose images lie in one file: keys in TFDS's form, and labels for each task of the data set."""

    split: str
    file: ArchiveFile
    keys: Sequence[Any]
    members: Sequence[Member]
    labels: Mapping[str, Labels]


@dataclass(frozen=True, kw_only=True, slots=True)
class DataSet:
    """A data set under TFDS's name.

    files: what its owners distribute. classes: for every task the class names, in label order.
    index(files) lists every example, given {official name: where that file lies}.
    """

    name: str
    files: tuple[OfficialFile, ...]
    classes: Mapping[str, Sequence[str]]
    index: Callable[[Mapping[str, FoundFile]], list[Listing]]


def label_of(classes: Sequence[str], name: str, where: str) -> int:
    """The label of the class `name`. Raises UserError that names `where` it was met."""
    if name not in classes:
        raise UserError(f"{where}: {name!r} is not one of the {len(classes)} classes")
    return classes.index(name)


# ---------------------------------------------------------------- archives of image files


def read_tree(file: ArchiveFile, members: Sequence[Member]) -> Iterator[tuple[Member, bytes]]:
    """Image files as they are."""
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
    """A tree of <folder>/<file>.jpg, all of it in 'train'; `class_of(folder, file)` names the class. Keys: <class>_<file>."""
    members = [name for name in found.tree.names() if name.lower().endswith((".jpg", ".jpeg"))]
    parts = [member.split("/")[-2:] for member in members]
    if any(len(part) < 2 for part in parts):
        raise UserError(f"{found.uri}: images outside the class folders")
    names = [class_of(*part) for part in parts]
    labels = [label_of(classes, name, f"{found.uri}: {member}") for name, member in zip(names, members, strict=True)]
    keys = [f"{name}_{file}" for name, (_, file) in zip(names, parts, strict=True)]
    return [Listing(split="train", file=image_files(found), keys=keys, members=members, labels={task: labels})]
