"""The plan of a preparation: slices of the sources, and the claim of the output folder.

The plan depends only on the input and the configuration, not on the cluster, so that any number of workers writes the
same shards."""

import dataclasses
import hashlib
import io
import json
import logging
import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import config as configuration
from pipeline import outputs, storage
from pipeline.data import sources
from pipeline.data.duplicates.evaluation import EvaluationIndex
from pipeline.data.format import MANIFEST, Dataset, Manifest, Receipt, Schema, ShardWriter, open_dataset
from pipeline.data.prepare.append import Append, join_labels
from pipeline.data.prepare.change import APPEND, DELETE
from pipeline.data.prepare.checks import parse_splits, resolve_splits
from pipeline.data.prepare.config import FROM_SOURCE, LISTINGS, WORK, PrepareConfig, identity
from pipeline.data.sources import Labels, Source
from pipeline.data.sources.split_columns import split_of_others
from pipeline.errors import UserError, plural
from pipeline.revision_names import shard_prefix
from pipeline.workqueue import Receipts

logger = logging.getLogger(__name__)


class SourceSlice(NamedTuple):
    """Consecutive fragments of one source: the unit of work of the first phase."""

    source: int  # position in the plan's sources
    first: int  # first fragment
    fragments: int  # number of fragments
    size: int  # bytes of input
    limit: int = -1  # maximum number of items; -1: all
    again: int = -1  # the slice whose temporary failures it reads again (retry.py); -1: none


@dataclass(frozen=True, kw_only=True, slots=True)
class PreparePlan:
    """The plan that every task receives. Tasks read the fragments of their slice from storage, because the listing of a
    corpus may exceed the memory of a machine."""

    config: PrepareConfig
    sources: list[Source]
    labels: Labels
    splits: dict[
        str, float
    ]  # name -> fraction; {"": 1.0} without splits; fractions 0 when the source determines the splits
    slices: list[SourceSlice]
    input_fingerprint: str
    work: str  # URI of the folder of receipts
    evaluation: EvaluationIndex | None = None  # images to remove
    evaluation_parts: Sequence[tuple[str, Any]] = ()  # (set, part) whose descriptors are compared
    append: Append | None = None  # the dataset that is added to

    @property
    def image(self) -> dict[str, Any]:
        c = self.config
        if c.encoding == "jpeg":
            return {"size": c.size, "quality": c.quality}
        return {"height": c.size, "width": c.size, "patch_size": c.patch_size, "channels": 3, "fit": c.fit}

    @property
    def source_decides(self) -> bool:
        """Whether the source determines the splits."""
        return not any(self.splits.values())

    @property
    def split_of_others(self) -> str | None:
        """The split of the images without one, if the source determines the splits; None: they are rejected."""
        named = {split for source in self.sources for split in source.splits}
        return split_of_others(named) if self.source_decides and "" in named else None

    @property
    def receipts(self) -> Receipts:
        return Receipts(self.work)

    def split_uri(self, split: str) -> str:
        return storage.join(self.config.output, split) if split else self.config.output

    def fragments_uri(self, number: int) -> str:
        while self.slices[number].again >= 0:
            number = self.slices[number].again
        return storage.join(self.work, f"fragments-{number:05d}.arrow")

    def hashes_uri(self, number: int) -> str:
        return storage.join(self.work, f"hashes-{number:05d}.npy")

    def writer(self, split: str, number: int, mark: str = "", **sizes: int) -> ShardWriter:
        """A writer of `part-<number><mark>-NNNN.parquet`; `sizes` replace the configured sizes of shards and row
        groups."""
        sizes = {"row_group_bytes": self.config.row_group_bytes, "shard_bytes": self.config.shard_bytes} | sizes
        return ShardWriter(
            self.split_uri(split),
            f"{shard_prefix(self.append.revision) if self.append else ''}{number:05d}{mark}",
            self.schema,
            row_group_bytes=sizes["row_group_bytes"],
            shard_bytes=sizes["shard_bytes"],
        )

    @property
    def schema(self) -> Schema:
        """The row schema of the datasets."""
        return Schema(
            encoding=self.config.encoding,
            image=self.image,
            classes=self.labels.classes,
            multilabel=self.labels.multilabel,
        )

    def open_rows(self, receipt: dict[str, Any], split: str) -> Dataset:
        """The rows of a writer of `split`, as a dataset."""
        written = Receipt.from_dict(receipt)
        manifest = Manifest(
            encoding=self.config.encoding,
            image=self.image,
            multilabel=self.labels.multilabel,
            rows=written.rows,
            inputs=written.rows,
            fingerprint="",
            classes=list(self.labels.classes),
            shards=written.shards,
        )
        return Dataset(self.split_uri(split), manifest)

    @property
    def finds_equal_keys(self) -> bool:
        """Whether keys of different slices can be equal. Keys of listed files are unique paths. Downloads may add slices."""
        several = len(self.slices) > 1 or any(source.downloads for source in self.sources)
        return several and not all(source.one_image_per_fragment for source in self.sources)

    @property
    def finds_near_duplicates(self) -> bool:
        """Whether the corpus is searched for near duplicates."""
        return self.config.deduplicate in ("near", "report")

    @property
    def finds_duplicates_of_rows(self) -> bool:
        """Whether the corpus is searched for duplicates after its slices are written."""
        return self.finds_equal_keys or self.config.deduplicate != "off" or self.config.descriptor is not None


def slice_name(number: int) -> str:
    """Name of the receipt of a slice."""
    return f"unit-{number:05d}"


# ---------------------------------------------------------------- sources -> slices


def make_plan(config: PrepareConfig, append: Append | None = None) -> PreparePlan:
    """Scans the sources and divides them into slices. Ray tasks list large sources and scan the archives.

    Raises UserError for a source that is missing, empty, unreadable or ambiguous.
    """
    large = sources.ParallelListing(folder=storage.join(config.output, WORK, LISTINGS))
    with large.used():
        return _scan(config, append, large)


def _scan(config: PrepareConfig, append: Append | None, large: sources.ParallelListing) -> PreparePlan:
    unlabelled = config.unlabelled or config.download_only
    label_map = sources.read_label_map(config.label_map)
    found = sources.discover(
        config.source,
        format=config.format,
        labels=config.labels,
        include=config.include,
        need_names=not unlabelled and not isinstance(label_map, list),
        unit_bytes=config.unit_bytes,
        columns=sources.Columns(file=config.file_column, label=config.label_column, split=config.split_column),
        class_level=config.class_level,
        unlabelled=unlabelled,
        downloads=sources.Downloads(
            config=config.download,
            url_column=config.url_column,
            allow_private=config.allow_private_hosts,
            need_labels=not unlabelled,
            keep_rows=config.download_only,
        ),
        prefixes=sources.key_prefixes(config.source, append.known) if append is not None else None,
        large=large,
    )
    if config.splits == FROM_SOURCE and not unlabelled:
        found = [_without_unlabelled_splits(source) for source in found]
    _check_missing(found, config)
    splits = (
        {"": 1.0}
        if config.download_only
        else resolve_splits(config, sorted({split for source in found for split in source.splits}))
    )
    labels = sources.make_labels(found, label_map, unlabelled)
    fingerprint = fingerprint_input(found, labels)
    if append is not None:
        labels = join_labels(append, labels, list(splits))
    rng = np.random.Generator(np.random.Philox(config.seed))
    if config.shuffle:
        found = [
            dataclasses.replace(s, fragments=sources.shuffled(s.fragments, rng)) if s.one_image_per_fragment else s
            for s in found
        ]
    return PreparePlan(
        config=config,
        sources=found,
        labels=labels,
        splits=splits,
        slices=cut_slices(found, config),
        input_fingerprint=fingerprint,
        work=storage.join(config.output, WORK),
        append=append,
    )


def _check_missing(found: Sequence[Source], config: PrepareConfig) -> None:
    """Raises UserError if more rows of a large label table have no file than the limit of rejects allows. Each becomes a
    reject, and the first pass over many millions of them would take hours before the limit is found to be exceeded."""
    for source in found:
        inputs = source.fragments.num_rows
        if source.missing > config.max_reject_fraction * inputs:
            raise UserError(
                f"{source.uri}: {source.missing:,} rows of the label table have no file, of {inputs:,} inputs, more than "
                f"--max-reject-fraction {config.max_reject_fraction:g} (such as {source.missing_example}); name another "
                "--source or --labels, or set a higher limit"
            )


def _without_unlabelled_splits(source: Source) -> Source:
    """Drops the splits of a source that have no labels, such as the test set of a competition."""
    if not source.one_image_per_fragment:
        return source  # labels of archives are known only after reading; `finish` drops such splits
    labelled = source.fragments.filter(pc.is_valid(source.fragments["labels"]))["split"]
    named = {split for split in source.splits if split}
    without = named - set(pc.unique(labelled).to_pylist())
    if not without or without == named:
        return source
    gone = pc.is_in(source.fragments["split"], pa.array(sorted(without)))
    for split in sorted(without):
        count = pc.sum(pc.equal(source.fragments["split"], split)).as_py()
        logger.warning(
            "%s: the split %s (%s) has no labels and is skipped; --unlabelled includes it",
            source.uri,
            split,
            plural(count, "file"),
        )
    kept = source.fragments.filter(pc.invert(pc.fill_null(gone, False)))
    return dataclasses.replace(source, fragments=kept, splits=tuple(s for s in source.splits if s not in without))


def fingerprint_input(found: Sequence[Source], labels: Labels) -> str:
    """16 hex characters of all listings (paths, sizes, labels) and the class names."""
    digest = hashlib.sha256()
    for source in found:
        tables = [source.naming.table, *source.naming.tables.values()]
        said = [source.uri, source.kind, *([table.labels, table.splits] for table in tables)]
        digest.update(json.dumps([*said, *([source.stamp] if source.stamp else [])], sort_keys=True).encode())
        fragments = source.fragments
        if not source.one_image_per_fragment:
            fragments = fragments.sort_by([("path", "ascending"), ("start", "ascending")])
        for first in range(0, fragments.num_rows, sources.SPILL_ROWS):
            part = fragments.slice(first, sources.SPILL_ROWS)
            for name in part.column_names:  # column by column, to limit the number of Python objects
                digest.update(json.dumps([name, part[name].to_pylist()]).encode())
    digest.update(json.dumps(labels.classes).encode())
    return digest.hexdigest()[:16]


def cut_slices(found: Sequence[Source], config: PrepareConfig) -> list[SourceSlice]:
    """Slices of about 1/32 of the corpus, at most `unit_bytes` and 16,384 files, and at least 8 MB or 256 files."""
    total = sum(pc.sum(source.fragments["size"]).as_py() or 0 for source in found)
    count = sum(source.fragments.num_rows for source in found)
    most_bytes = min(config.unit_bytes, max(8 << 20, total // 32))
    most_files = min(16_384, max(256, math.ceil(count / 32)))
    slices = []
    for i, source in enumerate(found):
        first = 0
        while first < source.fragments.num_rows:
            ends = np.cumsum(source.fragments["size"].slice(first, most_files).to_numpy())
            taken = max(1, int(np.searchsorted(ends, most_bytes, side="right")))
            slices.append(SourceSlice(i, first, taken, int(ends[taken - 1])))
            first += taken
    return slices if config.sample is None else _limit_slices(slices, config.sample)


def _limit_slices(slices: list[SourceSlice], sample: int) -> list[SourceSlice]:
    """Slices with limits that add up to `sample` items, in proportion to their bytes. Slices with limit 0 are
    dropped."""
    weights = np.array([part.size + 1 for part in slices], np.float64)
    ends = np.floor(np.cumsum(weights) / weights.sum() * sample + 1e-9).astype(np.int64)
    limits = np.diff(ends, prepend=0).tolist()
    return [part._replace(limit=limit) for part, limit in zip(slices, limits, strict=True) if limit]


# ---------------------------------------------------------------- the output folder


def find_finished(config: PrepareConfig) -> dict[str, Manifest] | None:
    """The manifests of a finished dataset at the output, by split; None when there is none.

    Raises UserError when the output contains other files.
    """
    done = {}
    splits = list(parse_splits(config.splits))
    if config.splits == FROM_SOURCE:
        folders = storage.list_folders(config.output)
        splits = [f for f in folders if storage.exists(storage.join(config.output, f, MANIFEST))] or splits
        if storage.exists(storage.join(config.output, WORK, "plan.json")):
            return None
    for name in splits:
        uri = storage.join(config.output, name) if name else config.output
        if storage.exists(storage.join(uri, MANIFEST)):
            done[name] = open_dataset(uri).manifest
    if len(done) == len(splits):
        return done
    refuse_other_files(config.output)
    return None


def refuse_other_files(output: str) -> None:
    """Raises UserError if a folder without a finished dataset has files that are not of an unfinished one."""
    if not storage.exists(storage.join(output, WORK, "plan.json")):
        outputs.refuse_other_files(output, lambda path: path.startswith(f"{WORK}/"))


def is_changing(output: str) -> bool:
    """Whether an append or a deletion in this folder was stopped and has to be finished by its own command."""
    where = storage.join(output, WORK, "plan.json")
    return storage.exists(where) and bool({APPEND, DELETE} & storage.read_record(where).keys())


def check_finished(plan: PreparePlan, finished: dict[str, Manifest]) -> None:
    """Raises UserError unless the finished dataset matches the plan."""
    for name, manifest in finished.items():
        known = identity(PrepareConfig()) | manifest.config
        if known == identity(plan.config) and manifest.input_fingerprint == plan.input_fingerprint:
            continue
        old, new = configuration.flatten(manifest.config), configuration.flatten(identity(plan.config))
        changed = [f"{key}: {old.get(key)!r}, now {new.get(key)!r}" for key in _differing(old, new)]
        raise UserError(
            f"{plan.split_uri(name)}: already contains another dataset "
            f"({'; '.join(changed[:3]) or 'the source files have changed'}); choose another --output or remove it"
        )


def claim_output(plan: PreparePlan) -> PreparePlan:
    """Writes the identity of the plan and the fragments of every slice to the folder of receipts.

    Returns the plan without fragments, whose size does not depend on the corpus. Raises UserError when the folder
    belongs to an unfinished dataset of another command or input, or is not writable."""
    where = storage.join(plan.work, "plan.json")
    mark = {"config": identity(plan.config), "input_fingerprint": plan.input_fingerprint, "units": len(plan.slices)}
    if plan.append is not None:
        mark[APPEND] = plan.append.revision
    mark = json.loads(json.dumps(mark))
    before = storage.read_record(where) if storage.exists(where) else mark
    if DELETE in before:
        raise UserError(
            f"{plan.config.output}: has an unfinished deletion; repeat the command that was stopped first, or remove "
            f"{plan.work} to abandon it"
        )
    if before != mark:
        changed = _differing(configuration.flatten(before), configuration.flatten(mark))
        different = ", ".join(key.removeprefix("config.") for key in changed)
        if plan.append is not None:  # the folder has the finished dataset
            raise UserError(
                f"{plan.config.output}: has an unfinished append of another command or input (different: {different}); "
                f"run that command again to finish it, or remove {plan.work} to abandon it"
            )
        raise UserError(
            f"{plan.config.output}: contains an unfinished dataset of another command or input (different: {different}); "
            "run that command again to finish it, remove the folder to start again, or choose another --output"
        )
    try:
        storage.write_json(where, mark)
        _write_fragments(plan)
    except OSError as error:
        raise UserError(
            f"--output {plan.config.output}: cannot be written ({error}); choose another location"
        ) from error
    without = [dataclasses.replace(source, fragments=source.fragments.slice(0, 0)) for source in plan.sources]
    return dataclasses.replace(plan, sources=without)


def _write_fragments(plan: PreparePlan) -> None:
    """Writes the fragments of the slices, several at a time, because a large corpus has tens of thousands of slices."""
    there = {file.path for file in storage.list_files(plan.work, recursive=False)}

    def write(number: int) -> None:
        part, sink = plan.slices[number], io.BytesIO()  # Arrow's own buffers leave 1 kB for each fragment
        with pa.ipc.new_stream(sink, sources.FRAGMENTS) as stream:
            stream.write_table(plan.sources[part.source].fragments.slice(part.first, part.fragments))
        storage.write_bytes(plan.fragments_uri(number), sink.getvalue())

    missing = [i for i in range(len(plan.slices)) if os.path.basename(plan.fragments_uri(i)) not in there]
    with ThreadPoolExecutor(16) as pool:
        for first in range(0, len(missing), 1024):  # an error ends the writing soon
            list(pool.map(write, missing[first : first + 1024]))


def _differing(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    return [key for key in {**old, **new} if old.get(key) != new.get(key)]
