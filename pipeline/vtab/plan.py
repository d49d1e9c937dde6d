"""The plan of a task: the request, the layout of its data, and the rows of all splits. Reads no images."""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from pipeline import storage
from pipeline.errors import Unavailable, UserError, plural
from pipeline.vtab import archives, copies, tasks
from pipeline.vtab.datasets.base import ArchiveFile, Listing, Member
from pipeline.vtab.examples import list_examples
from pipeline.vtab.splits import needed, take, tfds_order
from pipeline.vtab.tasks import Task

TFDS_SPLITS = ("train", "validation", "test")  # order in which archive files are numbered: train800 comes before val200


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """A task to prepare: RAW -> OUTPUT/<task>/<split>. verify: compare checksums and official counts."""

    task: str
    raw: str
    output: str
    splits: tuple[str, ...]
    verify: bool

    @property
    def entry(self) -> Task:
        return tasks.get(self.task)

    @property
    def uri(self) -> str:
        return storage.join(self.output, self.task)


class Example(NamedTuple):
    """One row to be written: its key in the dataset, its label, and the member of an archive file (a number in the
    plan)."""

    key: str
    label: int
    file: int
    member: Member


@dataclass(kw_only=True, slots=True)
class TaskPlan:
    """All rows of one task, in official order, and the archive files with their images. identity: the source of the
    rows, which is written to every manifest. strict: an image that is missing from its archive is an error, not a
    reject. problems: the reason for each split that cannot be prepared."""

    task: str
    output: str
    identity: dict[str, Any]
    strict: bool
    files: list[ArchiveFile] = field(default_factory=list)
    examples: dict[str, list[Example]] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)


# ---------------------------------------------------------------- where the data lie


def find_layout(request: Request) -> tuple[str, str]:
    """The layout of a task's data, and its folder: ("tfds" | "archives" | "lists", URI)."""
    folder = copies.tfds_folder(request.raw, request.entry.dataset)
    if folder is not None:
        return "tfds", folder
    folder = copies.lists_folder(request.raw, request.entry)
    if folder is not None and archives.locate(request.raw, request.entry.dataset)[1]:
        return "lists", folder
    return "archives", request.raw


def identify(request: Request) -> dict[str, Any]:
    """Identifies the source of a task without reading the archives: layout, and names and sizes of the files."""
    layout, _ = find_layout(request)
    files: list[str] = []
    if layout == "archives":
        for found in archives.locate(request.raw, request.entry.dataset)[0]:
            files.append(f"{found.file.name} {storage.file_size(found.uri) if found.packed else 'unpacked'}")
    return {
        "task": request.task,
        "origin": layout,
        "files": files,
        "miniature": archives.is_miniature(request.raw),
        "verified": request.verify,
    }


# ---------------------------------------------------------------- the rows


def by_dataset(requests: Sequence[Request]) -> list[list[Request]]:
    """Groups tasks by data set. The archives of a data set are verified and listed once for all its tasks."""
    groups: dict[str, list[Request]] = {}
    for request in requests:
        groups.setdefault(request.entry.dataset, []).append(request)
    return list(groups.values())


def plan_tasks(requests: Sequence[Request]) -> tuple[list[TaskPlan], dict[str, str]]:
    """(plans, {task: problem}) of the tasks of one data set. Raises Unavailable if the store is away: that is no problem
    of the data."""
    listings = functools.cache(lambda: _list_archives(requests[0]))
    plans, problems = [], {}
    for request in requests:
        try:
            plans.append(_plan(request, listings))
        except Unavailable:
            raise
        except UserError as error:
            problems[request.task] = str(error)
    return plans, problems


def _plan(request: Request, listings: Callable[[], list[Listing]]) -> TaskPlan:
    """The rows of every requested split. `listings` reads the archives; the two other layouts do not need it."""
    layout, folder = find_layout(request)
    plan = TaskPlan(task=request.task, output=request.output, identity=identify(request), strict=request.verify)
    if layout == "lists":
        for split in request.splits:
            try:
                _add(plan, split, list(_examples(plan, copies.list_split(folder, request.entry, split))))
            except Unavailable:
                raise
            except UserError as error:
                plan.problems[split] = str(error)
        return plan
    wanted = {name for split in request.splits for name in needed(request.entry, split)}
    ordered: dict[str, list[Example]] = {}
    problems: dict[str, str] = {}  # {TFDS split: reason}
    for name in (name for name in TFDS_SPLITS if name in wanted):
        try:
            if layout == "tfds":
                parts = copies.list_tfds_split(folder, request.entry, name)
                ordered[name] = [example for listing in parts for example in _examples(plan, listing)]
            else:
                ordered[name] = _order(plan, [listing for listing in listings() if listing.split == name], name)
        except Unavailable:
            raise
        except UserError as error:
            if layout == "archives":  # the archive is damaged or not the official one, so no split is reliable
                raise
            problems[name] = str(error)
    if request.verify and not archives.is_miniature(request.raw):
        _check_counts(request, ordered)
    for split in request.splits:
        problem = next((problems[name] for name in needed(request.entry, split) if name in problems), None)
        if problem:
            plan.problems[split] = problem
        else:
            _add(plan, split, take(request.entry, split, ordered))
    return plan


def _list_archives(request: Request) -> list[Listing]:
    found, _ = archives.locate(request.raw, request.entry.dataset)
    if request.verify:
        archives.verify(request.raw, request.entry.dataset, found)
    return list_examples(request.entry.dataset, found)


def _order(plan: TaskPlan, listings: Sequence[Listing], name: str) -> list[Example]:
    """The examples of the TFDS split `name` in TFDS's order."""
    rows = {key: row for part in listings for key, row in zip(part.keys, _examples(plan, part), strict=True)}
    if len(rows) < sum(len(part.keys) for part in listings):
        raise UserError(f"{listings[0].file.uri}: examples of '{name}' share a key; not the official archive")
    return [rows[key] for key in tfds_order(name, rows)]


def _examples(plan: TaskPlan, listing: Listing) -> Iterator[Example]:
    if listing.file not in plan.files:
        plan.files.append(listing.file)
    number = plan.files.index(listing.file)
    for key, label, member in zip(listing.keys, listing.labels[plan.task], listing.members, strict=True):
        # Numbers are unique within their TFDS split only.
        name = f"{listing.split}_{key:05d}" if isinstance(key, int) else key
        yield Example(key=name, label=int(label), file=number, member=member)


def _add(plan: TaskPlan, split: str, examples: list[Example]) -> None:
    classes = tasks.get(plan.task).num_classes
    wrong = next((e for e in examples if not 0 <= e.label < classes), None)
    if wrong is not None:
        raise UserError(
            f"{plan.files[wrong.file].uri}: {wrong.key} has label {wrong.label} of {plural(classes, 'class')}"
        )
    if examples:
        plan.examples[split] = examples
    else:
        plan.problems[split] = "the data has no images of this split"


def _check_counts(request: Request, ordered: dict[str, list[Example]]) -> None:
    """Raises UserError if the size of a pool is not the official one."""
    for pool, official in zip(("train", "val", "test"), request.entry.counts, strict=True):
        name = getattr(request.entry, pool)[0]
        if name in ordered:
            count = len(take(request.entry, pool, ordered))
            if count != official:
                raise UserError(
                    f"{storage.join(request.raw, request.entry.dataset)}: {count:,} {pool} images, officially "
                    f"{official:,}; files are missing or of another version (--no-verify accepts them)"
                )
