"""From raw archives to one dataset per split: OUTPUT/<task>/<split>/, ordinary datasets that any loader opens.

First every data set is verified and listed (one Ray Data row each), which fixes the splits; then its images are read (one row for
a part of an archive). A task that gets a row reads the archive and writes shards itself; only counts and keys come back. What
is finished is not done again.
"""

import functools
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import cv2
import numpy as np

from pipeline import storage
from pipeline.config import fingerprint
from pipeline.data import images
from pipeline.data.format.shards import Dataset, Manifest, Receipt, Reject, ShardWriter, finish_dataset, open_dataset
from pipeline.errors import UserError
from pipeline.vtab import archives, copies, tasks
from pipeline.vtab import datasets as readers
from pipeline.vtab.datasets import Listing, Member, Source
from pipeline.vtab.splits import PARTS, check, needed, take, tfds_order
from pipeline.vtab.tasks import Task

VTAB_1K = ("train800", "val200", "train800val200", "test")
SMALL = (
    "train800",
    "val200",
    "train800val200",
)  # held in memory while an archive streams by, written in official order
SLICE = 1024  # images of a random-access archive that are one unit of work
MAX_PIXELS = 200_000_000
TFDS_SPLITS = ("train", "validation", "test")  # sources are numbered in this order, so train800 comes before val200
WORK = ".work"  # receipts of finished units


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """One row to be: its key in the dataset, its label, and the member of which source (a number in the plan)."""

    key: str
    label: int
    source: int
    member: Member


@dataclass(kw_only=True, slots=True)
class Plan:
    """All rows of one task, in official order, and where their images lie."""

    task: str
    output: str
    identity: dict[str, Any]  # what the rows are made from; written to every manifest
    strict: bool  # an image that is missing from its archive is an error, not a reject
    sources: list[Source] = field(default_factory=list)
    examples: dict[str, list[Example]] = field(default_factory=dict)


# ---------------------------------------------------------------- the command


def prepare(
    names: Sequence[str],
    raw: str,
    output: str,
    *,
    splits: Sequence[str] = VTAB_1K,
    download: bool = False,
    verify: bool = True,
    quiet: bool = False,
    connect: Callable[[], None] = lambda: None,
) -> dict[str, dict[str, dict[str, Any]]]:
    """Builds `splits` of the tasks `names` from the archives under `raw`: {task: {split: counts}}.

    `verify=False` takes archives as they are: no checksums, no official counts, and images that are missing become rejects.
    `connect` joins Ray once the request has been found sound. Raises UserError, for every task that has a problem at once:
    missing files (naming them and where they come from), truncated or wrong archives, an output that holds something else.
    """
    raw, output = storage.normalise(raw), storage.normalise(output)
    for split in splits:
        check(split)
    requests = [Request(task=name, raw=raw, output=output, splits=tuple(splits), verify=verify) for name in names]
    results = {request.task: _finished(request) for request in requests}
    todo = [request for request in requests if results[request.task] is None]
    if todo:
        _check_files(todo, raw, download, quiet)
        connect()
        say = (lambda text: None) if quiet else (lambda text: print(f"vtab: {text}", flush=True))
        plans, problems = [], []
        for plan, problem in _ray_map(_inspect, _by_dataset(todo)):
            plans += plan
            problems += problem
        units = [unit for plan in plans for unit in cut(plan)]
        say(
            f"{len(plans)} tasks, {sum(len(e) for p in plans for e in p.examples.values()):,} images, {len(units)} units"
        )
        failed: set[str] = set()
        for i, (task, problem) in enumerate(_ray_map(_process, units), 1):
            if problem and task not in failed:  # the other units of an incomplete archive say the same
                failed.add(task)
                problems.append(problem)
            say(f"unit {i} of {len(units)}: {task}{' failed' if problem else ''}")
        for plan in plans:
            if plan.task not in failed:
                try:
                    results[plan.task] = finish(plan)
                except UserError as error:
                    problems.append(f"{plan.task}: {error}")
        if problems:
            say(f"finished:\n{table(_done(results))}\n")
            raise UserError("\n".join(dict.fromkeys(problems)))
    return _done(results)


def _done(results: dict[str, dict[str, dict[str, Any]] | None]) -> dict[str, dict[str, dict[str, Any]]]:
    return {name: result for name, result in results.items() if result is not None}


def table(results: dict[str, dict[str, dict[str, Any]]]) -> str:
    """The counts beside the official ones, for people."""
    lines = [f"{'task':<22}{'split':<16}{'images':>9}{'official':>10}{'rejects':>9}"]
    for task, result in results.items():
        for split, counts in result.items():
            mark = " (miniature)" if counts["miniature"] else ""
            lines.append(
                f"{task:<22}{split:<16}{counts['images']:>9,}{counts['official']:>10,}{counts['rejects']:>9,}{mark}"
            )
    return "\n".join(lines)


def open_split(uri: str, split: str) -> Dataset:
    """One split of a prepared task, `uri` being OUTPUT/<task>. Raises UserError when it is not there."""
    check(split)
    where = storage.join(uri, split)
    if not storage.exists(storage.join(where, "manifest.json")):
        raise UserError(
            f"{where}: split {split} is not prepared; run jobs/prepare.py --vtab {storage.normalise(uri).rpartition('/')[2]} "
            f"--raw FOLDER --vtab-splits {split}"
        )
    return open_dataset(where)


def official_count(task: Task, split: str) -> int:
    sizes = dict(zip(("train", "val", "test"), task.counts, strict=True))
    return sum(sizes[pool] if first is None else first for pool, first in PARTS[split])


# ---------------------------------------------------------------- before any work


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
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


def _origin(request: Request) -> tuple[str, str]:
    """Which of the three layouts the data of a task has, and the folder: ("tfds" | "archives" | "lists", URI)."""
    folder = copies.tfds_folder(request.raw, request.entry.dataset)
    if folder is not None:
        return "tfds", folder
    folder = copies.lists_folder(request.raw, request.entry)
    if folder is not None and archives.locate(request.raw, request.entry.dataset)[1]:
        return "lists", folder
    return "archives", request.raw


def _check_files(requests: Sequence[Request], raw: str, download: bool, quiet: bool) -> None:
    """Raises UserError that lists every missing file; with `download` fetches those that can be fetched."""
    missing: dict[str, list[archives.File]] = {}
    for request in requests:
        if _origin(request)[0] == "archives":
            missing[request.entry.dataset] = archives.locate(raw, request.entry.dataset)[1]
    if download:
        for dataset, files in missing.items():
            for file in files:
                if file.url:
                    archives.download(raw, dataset, file, (lambda text: None) if quiet else print)
            missing[dataset] = [file for file in files if not file.url]
    lines = [
        f"  {storage.join(raw, dataset)}/{archives.describe(file)}"
        for dataset, files in missing.items()
        for file in files
    ]
    if lines:
        fetchable = any(file.url for files in missing.values() for file in files)
        hint = "; --download fetches those that have an address" if fetchable and not download else ""
        raise UserError(f"{len(lines)} files are missing{hint}:\n" + "\n".join(lines))


def _identity(request: Request) -> dict[str, Any]:
    """What a task is made from, without reading the archives: layout, and names and sizes of the files."""
    origin, _ = _origin(request)
    files: list[str] = []
    if origin == "archives":
        for place in archives.locate(request.raw, request.entry.dataset)[0]:
            fs, path = storage.filesystem(place.uri)
            files.append(f"{place.file.name} {fs.size(path) if place.packed else 'unpacked'}")
    return {
        "task": request.task,
        "origin": origin,
        "files": files,
        "miniature": archives.is_miniature(request.raw),
        "verified": request.verify,
    }


def _finished(request: Request) -> dict[str, Any] | None:
    """The counts of a task whose splits are all there. Raises UserError when other data lies in their place.

    Archives may be deleted once a task is finished: with nothing left to compare with, its name and splits decide.
    """
    gone = _origin(request)[0] == "archives" and bool(archives.locate(request.raw, request.entry.dataset)[1])
    identity = {"task": request.task} if gone else _identity(request)
    manifests = {}
    for split in request.splits:
        try:
            manifests[split] = open_dataset(storage.join(request.uri, split)).manifest
        except UserError:
            continue
        wanted = {**identity, "split": split}
        there = manifests[split].config.get("vtab") or {}
        if {key: there.get(key) for key in wanted} != wanted:
            raise UserError(
                f"{storage.join(request.uri, split)}: already holds another dataset (made from "
                f"{json.dumps(there)}); choose another --output or remove it"
            )
    if len(manifests) < len(request.splits):
        return None
    return {split: _counts(request, split, manifest) for split, manifest in manifests.items()}


def _counts(request: Request | Plan, split: str, manifest: Manifest) -> dict[str, Any]:
    return {
        "uri": storage.join(request.output, request.task, split),
        "images": manifest.rows,
        "rejects": sum(manifest.rejects.values()),
        "official": official_count(tasks.get(request.task), split),
        "miniature": manifest.config["vtab"]["miniature"],
        "fingerprint": manifest.fingerprint,
    }


# ---------------------------------------------------------------- listing a data set


def _by_dataset(requests: Sequence[Request]) -> list[list[Request]]:
    """Tasks of one data set are listed together: its archives are verified once."""
    groups: dict[str, list[Request]] = {}
    for request in requests:
        groups.setdefault(request.entry.dataset, []).append(request)
    return list(groups.values())


def _inspect(requests: list[Request]) -> tuple[list[Plan], list[str]]:
    """(plans, problems) of the tasks of one data set."""
    listings = functools.cache(lambda: _list_archives(requests[0]))
    plans, problems = [], []
    for request in requests:
        try:
            plans.append(_plan(request, listings))
        except UserError as error:
            problems.append(f"{request.task}: {error}")
    return plans, problems


def _plan(request: Request, listings: Callable[[], list[Listing]]) -> Plan:
    """The rows of every split that is asked for. `listings` reads the archives, which the two other layouts do without."""
    origin, folder = _origin(request)
    plan = Plan(task=request.task, output=request.output, identity=_identity(request), strict=request.verify)
    if origin == "lists":
        for split, listing in copies.lists_index(folder, request.entry, request.splits).items():
            _add(plan, split, list(_examples(plan, listing)))
        return plan
    if origin == "tfds":
        ordered = {
            split: [example for listing in parts for example in _examples(plan, listing)]
            for split, parts in copies.tfds_index(folder, request.entry, request.splits).items()
        }
    else:
        ordered = _order(plan, request, listings())
    if request.verify and not archives.is_miniature(request.raw):
        _check_counts(request, ordered)
    for split in request.splits:
        _add(plan, split, take(request.entry, split, ordered))
    return plan


def _list_archives(request: Request) -> list[Listing]:
    found, _ = archives.locate(request.raw, request.entry.dataset)
    if request.verify:
        archives.verify(request.raw, request.entry.dataset, found)
    return readers.index(request.entry.dataset, found)


def _order(plan: Plan, request: Request, listings: Sequence[Listing]) -> dict[str, list[Example]]:
    """{TFDS split: examples in TFDS order}, of the TFDS splits that are needed."""
    wanted = {name for split in request.splits for name in needed(request.entry, split)}
    ordered = {}
    for name in (split for split in TFDS_SPLITS if split in wanted):
        mine = [listing for listing in listings if listing.split == name]
        rows = {key: row for part in mine for key, row in zip(part.keys, _examples(plan, part), strict=True)}
        if len(rows) < sum(len(part.keys) for part in mine):
            raise UserError(f"{mine[0].source.uri}: examples of '{name}' share a key; not the official archive")
        ordered[name] = [rows[key] for key in tfds_order(name, rows)]
    return ordered


def _examples(plan: Plan, listing: Listing) -> Iterator[Example]:
    if listing.source not in plan.sources:
        plan.sources.append(listing.source)
    number = plan.sources.index(listing.source)
    for key, label, member in zip(listing.keys, listing.labels[plan.task], listing.members, strict=True):
        # numbers are unique within their TFDS split only
        name = f"{listing.split}_{key:05d}" if isinstance(key, int) else key
        yield Example(key=name, label=int(label), source=number, member=member)


def _add(plan: Plan, split: str, examples: list[Example]) -> None:
    plan.examples[split] = examples
    classes = tasks.get(plan.task).num_classes
    wrong = next((e for e in examples if not 0 <= e.label < classes), None)
    if wrong is not None:
        raise UserError(f"{plan.sources[wrong.source].uri}: {wrong.key} has label {wrong.label} of {classes} classes")


def _check_counts(request: Request, ordered: dict[str, list[Example]]) -> None:
    for pool, official in zip(("train", "val", "test"), request.entry.counts, strict=True):
        name = getattr(request.entry, pool)[0]
        if name in ordered:
            count = len(take(request.entry, pool, ordered))
            if count != official:
                raise UserError(
                    f"{storage.join(request.raw, request.entry.dataset)}: {count:,} {pool} images, officially {official:,}; "
                    "files are missing or another version (--no-verify takes them as they are)"
                )


# ---------------------------------------------------------------- units of work


@dataclass(frozen=True, kw_only=True, slots=True)
class Unit:
    """A part of an archive: `rows` are, per split, (position in the split, example) of what to take from it."""

    plan_identity: dict[str, Any]
    task: str
    output: str
    strict: bool
    number: int
    source: Source
    rows: dict[str, list[tuple[int, Example]]]

    @property
    def receipt_uri(self) -> str:
        content = {s: [[i, asdict(e)] for i, e in rows] for s, rows in self.rows.items()}
        mark = fingerprint([self.plan_identity, asdict(self.source), content])
        return storage.join(self.output, self.task, WORK, f"{self.number:05d}-{mark}.json")


def cut(plan: Plan) -> list[Unit]:
    """A unit per source; the large splits of a random-access source in slices, in the order of the archive.

    Splits that are finished already are left out.
    """
    units: list[Unit] = []

    def add(source: Source, rows: dict[str, list[tuple[int, Example]]]) -> None:
        units.append(
            Unit(
                plan_identity=plan.identity, task=plan.task, output=plan.output, strict=plan.strict,
                number=len(units), source=source, rows=rows,
            )
        )  # fmt: skip

    todo = {split: examples for split, examples in plan.examples.items() if not _is_done(plan, split)}
    for number, source in enumerate(plan.sources):
        mine = {
            split: [(i, example) for i, example in enumerate(examples) if example.source == number]
            for split, examples in todo.items()
        }
        mine = {split: rows for split, rows in mine.items() if rows}
        large = [split for split in mine if split not in SMALL] if source.random_access else []
        together = {split: rows for split, rows in mine.items() if split not in large}
        if together:
            add(source, together)
        for split in large:
            rows = sorted(mine[split], key=lambda row: row[1].member)
            for first in range(0, len(rows), SLICE):
                add(source, {split: rows[first : first + SLICE]})
    return units


def _is_done(plan: Plan, split: str) -> bool:
    return storage.exists(storage.join(plan.output, plan.task, split, "manifest.json"))


def _process(unit: Unit) -> tuple[str, str | None]:
    """(task, problem): writes the shards of one unit, then its receipt."""
    if not storage.exists(unit.receipt_uri):
        try:
            storage.write_json(unit.receipt_uri, build(unit))
        except UserError as error:
            return unit.task, f"{unit.task}: {error}"
    return unit.task, None


def build(unit: Unit) -> dict[str, Any]:
    """Reads the unit's images and writes them to the splits they belong to: {split: {"receipt", "rejects"}}.

    Raises UserError for a damaged archive, and for a missing image unless the plan is lenient.
    """
    cv2.setNumThreads(1)
    homes: dict[Any, list[tuple[str, int, Example]]] = {}  # by member: all numbers or all names
    for split, rows in unit.rows.items():
        for position, example in rows:
            homes.setdefault(example.member, []).append((split, position, example))
    classes = tasks.get(unit.task).classes
    writers = {
        split: ShardWriter(
            storage.join(unit.output, unit.task, split),
            f"{unit.number:05d}",
            encoding="jpeg",
            image={},
            classes=classes,
        )
        for split in unit.rows
    }
    held: dict[str, dict[int, tuple]] = {split: {} for split in unit.rows if split in SMALL}
    rejects: dict[str, list[dict[str, str]]] = {split: [] for split in unit.rows}

    def refuse(split: str, example: Example, reason: str) -> None:
        rejects[split].append(
            asdict(Reject(key=example.key, source=f"{unit.source.uri}: {example.member}", reason=reason))
        )

    try:
        for member, data in readers.read(unit.source, sorted(homes)):
            picture = pixels(data)
            for split, position, example in homes.pop(member):
                if picture is None:
                    refuse(split, example, "undecodable")
                    continue
                row = example.key, data, example.label, picture.shape[1], picture.shape[0]
                writers[split].measure(picture)
                if split in held:
                    held[split][position] = row
                else:
                    writers[split].write(*row)
        for split, collected in held.items():
            for position in sorted(collected):
                writers[split].write(*collected[position])
        if homes and unit.strict:
            raise UserError(
                f"{unit.source.uri}: {len(homes):,} or more of the listed images are not in there, such as "
                f"{next(iter(homes))} (--no-verify leaves them out)"
            )
        for split, _, example in (home for missing in homes.values() for home in missing):
            refuse(split, example, "missing")
    except BaseException:
        for writer in writers.values():
            writer.abort()
        raise
    for writer in writers.values():
        writer.close()
    return {
        split: {"receipt": writer.receipt.to_dict(), "rejects": rejects[split]} for split, writer in writers.items()
    }


def pixels(data: bytes) -> np.ndarray | None:
    """uint8 RGB (H,W,3) of an image file that decodes, or None; valid until the next one is decoded.

    The official sets hold JPEGs with faults that every decoder in use forgives, so what OpenCV shows counts as decodable.
    """
    try:
        return images.decode(data, MAX_PIXELS).pixels
    except images.Refused as refused:
        if refused.reason not in ("corrupt", "truncated"):
            return None
    shown = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
    return None if shown is None else np.asarray(shown)


def finish(plan: Plan) -> dict[str, Any]:
    """Writes the manifests of a task whose units are all done, and removes the receipts."""
    units = cut(plan)
    receipts = [storage.read_json(unit.receipt_uri) for unit in units]
    counts = {}
    for split, examples in plan.examples.items():
        uri = storage.join(plan.output, plan.task, split)
        if _is_done(plan, split):
            counts[split] = _counts(plan, split, open_dataset(uri).manifest)
            continue
        parts = [receipt[split] for receipt in receipts if split in receipt]
        manifest = finish_dataset(
            uri,
            [Receipt.from_dict(part["receipt"]) for part in parts],
            encoding="jpeg",
            image={},
            classes=tasks.get(plan.task).classes,
            rejects=[Reject(**reject) for part in parts for reject in part["rejects"]],
            inputs=len(examples),
            config={"vtab": {**plan.identity, "split": split}},
        )
        known = {shard.name for shard in manifest.shards}
        for file in storage.list_files(uri, recursive=False):  # what a killed worker left behind
            if file.path.endswith(".parquet") and file.path.startswith(("part-", "shard-")) and file.path not in known:
                storage.remove(file.uri)
        counts[split] = _counts(plan, split, manifest)
    storage.remove(storage.join(plan.output, plan.task, WORK), recursive=True)
    return counts


# ---------------------------------------------------------------- Ray Data


def _ray_map(function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
    """`map` over Ray Data: a task per item, results as they come."""
    import pickle

    import ray

    if not items:
        return
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)

    def work(row: dict[str, Any]) -> dict[str, Any]:
        return {"result": pickle.dumps(function(pickle.loads(row["item"])))}

    rows = ray.data.from_items([{"item": pickle.dumps(item)} for item in items], override_num_blocks=len(items))
    for row in rows.map(work).iter_rows():
        yield pickle.loads(row["result"])
