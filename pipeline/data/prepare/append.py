"""`prepare --append`: adds new sources as the next revision of a finished dataset. The shards of the dataset are
unchanged; the new images are written to new shards, and new classes follow the old ones, so old labels stay valid. A
source that is already in the dataset keeps its keys, and inputs with existing keys are skipped, so a growing folder can
be given again. The keys of a new source begin with its name. With --deduplicate, the new images are also compared with
the images of the dataset as they are stored.
"""

import dataclasses
import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline import config as configuration
from pipeline import storage
from pipeline.data import sources
from pipeline.data.duplicates.evaluation import EvaluationIndex
from pipeline.data.duplicates.report import DUPLICATES, by_reason
from pipeline.data.format import MANIFEST, REJECTS, Manifest
from pipeline.data.format.dataset import open_dataset
from pipeline.data.format.deleted import read_deleted
from pipeline.data.format.verify import key_hash, read_report
from pipeline.data.prepare.change import APPEND, begin, refuse_unfinished
from pipeline.data.prepare.checks import parse_splits
from pipeline.data.prepare.config import FROM_SOURCE, WORK, PrepareConfig, identity
from pipeline.data.sources import Labels
from pipeline.errors import UserError, plural

logger = logging.getLogger(__name__)
SAME = ("encoding", "size", "small", "quality", "patch_size", "fit", "splits", "unlabelled", "deduplicate")
"""Settings that all revisions of a dataset have in common."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Append:
    """The information about the dataset that the tasks of an append need."""

    revision: int
    """The number of the new revision."""
    bases: dict[str, str]
    """{split: address of the revision to which the append adds}."""
    known: dict[str, str]
    """{source in the dataset: prefix of its keys}."""
    keys: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    """{split: sorted hashes of the keys of its rows, uint64}."""
    deleted: np.ndarray = dataclasses.field(default_factory=lambda: np.empty(0, np.uint64))
    """Sorted hashes of the keys that were deleted from any split, uint64."""
    left_out: np.ndarray = dataclasses.field(default_factory=lambda: np.empty(0, np.uint64))
    """Sorted hashes of the keys in the reports of rejects and duplicates, uint64."""
    index: EvaluationIndex | None = None
    """The images of the dataset, if new images are compared with them."""

    def has_key(self, split: str, key: str) -> bool:
        return _contains(self.keys[split], key)

    def is_deleted(self, key: str) -> bool:
        """Whether a deletion has removed the row with this key, from any split."""
        return _contains(self.deleted, key)

    def is_left_out(self, key: str) -> bool:
        """Whether the dataset lists the key as a reject or a duplicate."""
        return _contains(self.left_out, key)


def _contains(hashes: np.ndarray, key: str) -> bool:
    wanted = np.uint64(key_hash(key))
    at = int(np.searchsorted(hashes, wanted))
    return at < len(hashes) and bool(hashes[at] == wanted)


def find_datasets(config: PrepareConfig) -> dict[str, str]:
    """{split: address} of the finished datasets at the output. Raises UserError if there are none."""
    names = list(parse_splits(config.splits))
    if config.splits == FROM_SOURCE:
        files = storage.list_files(config.output)
        names = sorted(f.path.partition("/")[0] for f in files if f.path.endswith(f"/{MANIFEST}"))
    found = {name: storage.join(config.output, name) if name else config.output for name in names}
    for uri in found.values():
        if not storage.exists(storage.join(uri, MANIFEST)):
            raise UserError(
                f"--append: {uri} has no finished dataset; prepare it first without --append, with the same --splits"
            )
    if not found:
        raise UserError(f"--append: {config.output} has no finished dataset; prepare it first without --append")
    return found


def find_bases(config: PrepareConfig, datasets: dict[str, str]) -> Append:
    """The number of the new revision, and the revisions to which the append adds; the same when a stopped append
    continues. Raises UserError if the datasets were prepared with other settings or have unfinished work."""
    where = storage.join(config.output, WORK, "plan.json")
    mark = storage.read_record(where) if storage.exists(where) else None
    refuse_unfinished(uri for name, uri in datasets.items() if name)
    # The plan of another command has no number; claim_output refuses it.
    planned = None if mark is None else mark.get(APPEND, 0)
    revision, bases = begin(config.output, datasets.values(), planned)
    manifests = [bases[uri] for uri in datasets.values()]
    for uri, base in bases.items():
        _check_settings(uri, base, config)
    known: dict[str, str] = {}
    for manifest in manifests:
        made_of = manifest.config["source"]
        known |= zip(made_of, sources.key_prefixes(made_of), strict=True)
        for entry in manifest.history:
            known |= entry.get("prefixes", {})
    addresses = {name: f"{uri}@{bases[uri].revision}" for name, uri in datasets.items()}
    return Append(revision=revision, bases=addresses, known=known)


def _check_settings(uri: str, base: Manifest, config: PrepareConfig) -> None:
    if "source" not in base.config:
        raise UserError(f"--append: {uri} was not prepared by `jobs/prepare.py --source`, so its settings are unknown")
    old, new = identity(PrepareConfig()) | base.config, configuration.to_dict(identity(config))
    other = [
        f"--{key.replace('_', '-')} {_text(old[key])} (now {_text(new[key])})" for key in SAME if old[key] != new[key]
    ]
    if other:
        raise UserError(f"--append: {uri} was prepared with {', '.join(other)}; give the same settings")
    if missing := [one for one in old["decontaminate"] if one not in new["decontaminate"]]:
        raise UserError(
            f"--append: {uri} has no images of {', '.join(missing)}; add --decontaminate {' '.join(missing)}, so that this "
            "stays true"
        )
    if config.descriptor:
        raise UserError("--append: --descriptor does not compare new images with those of the dataset; remove it")


def _text(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def finished_before(append: Append, input_fingerprint: str) -> dict[str, Manifest] | None:
    """The manifests, if the newest revision is the result of an append of the same input."""
    found = {name: open_dataset(uri).manifest for name, uri in append.bases.items()}
    last = [manifest.history[-1] if manifest.history else {} for manifest in found.values()]
    wanted = {
        "kind": APPEND,
        "input_fingerprint": input_fingerprint,
        "temporary": 0,
    }  # failed downloads are retried
    same = all(wanted.items() <= entry.items() for entry in last)
    return found if same else None


def join_labels(append: Append, labels: Labels, splits: Sequence[str]) -> Labels:
    """The labels of the new sources, as indices of the dataset's classes followed by the new classes."""
    unknown = [name for name in splits if name not in append.bases]
    if unknown:
        raise UserError(f"--append: the source has the split {unknown[0]!r}, which the dataset does not have")
    manifests = [open_dataset(uri).manifest for uri in append.bases.values()]
    if any(manifest.multilabel != labels.multilabel for manifest in manifests) and not labels.unlabelled:
        several, one = ("dataset", "source") if manifests[0].multilabel else ("source", "dataset")
        raise UserError(f"--append: the {several} has several labels per image, the {one} has one")
    old = max((manifest.classes for manifest in manifests), key=len)
    known = set(old)
    classes = [*old, *(name for name in labels.classes if name not in known)]
    if new := classes[len(old) :]:
        logger.info("prepare: %s, such as %s", plural(len(new), "new class"), ", ".join(new[:5]))
    place = {name: i for i, name in enumerate(classes)}
    index = {name: place[labels.classes[i]] for name, i in labels.index.items()}
    return dataclasses.replace(labels, classes=tuple(classes), index=index)


def read_keys(append: Append) -> Append:
    """Adds the hashed keys of the dataset, 8 bytes per image, and those of the deleted ones and of the reports."""
    keys, deleted = {}, []
    left_out: set[int] = set()
    for name, uri in append.bases.items():
        dataset = open_dataset(uri)
        found = [key_hash(key) for head in dataset.heads() for key in head.keys]
        keys[name] = np.sort(np.array(found, np.uint64))
        deleted.append(read_deleted(dataset.uri, dataset.manifest))
        for report in (REJECTS, DUPLICATES):
            records = read_report(dataset.uri, report, dataset.manifest.revision)
            left_out.update(key_hash(record["key"]) for record in records)
    return dataclasses.replace(
        append,
        keys=keys,
        deleted=np.unique(np.concatenate(deleted)),
        left_out=np.sort(np.array(list(left_out), np.uint64)),
    )


def history_entry(
    append: Append, config: PrepareConfig, input_fingerprint: str, rows: int, skipped: int, deleted: int
) -> dict[str, Any]:
    """The entry of an append in the manifest's history. prefixes: {source: prefix of its keys}. skipped: inputs whose key
    the split has. skipped_deleted: inputs whose key was deleted."""
    about = {
        "source": list(config.source),
        "prefixes": dict(zip(config.source, sources.key_prefixes(config.source, append.known), strict=True)),
        "labels": config.labels,
        "decontaminate": list(config.decontaminate),
    }
    counts = {"rows": rows, "skipped": skipped, "skipped_deleted": deleted}
    return {"kind": APPEND, **about, "input_fingerprint": input_fingerprint, **counts}


Records = list[dict[str, Any]]
"""Rows of a report."""


def reports_without(base: Manifest, uri: str, again: Iterable[str]) -> tuple[Manifest, Records, Records]:
    """(manifest, rejects, duplicates) of the dataset without the entries of inputs that were read again, which have a
    row or a new entry now. again: their keys."""
    left, gone = Counter(again), dict[str, Records]()
    kept = dict[str, Records]()
    for name in (REJECTS, DUPLICATES):
        kept[name], gone[name] = [], []
        for record in read_report(uri, name, base.revision):
            is_again = left[record["key"]] > 0
            left[record["key"]] -= is_again
            (gone if is_again else kept)[name].append(record)
    changed = dataclasses.replace(
        base,
        inputs=base.inputs - sum(map(len, gone.values())),
        duplicates=base.duplicates - len(gone[DUPLICATES]),
        rejects=dict(Counter(base.rejects) - Counter(record["reason"] for record in gone[REJECTS])),
        duplicates_by_reason=dict(Counter(base.duplicates_by_reason) - Counter(by_reason(gone[DUPLICATES]))),
    )
    return changed, kept[REJECTS], kept[DUPLICATES]


def joined(before: Manifest, new: Manifest) -> dict[str, Any]:
    """The fields of a manifest that an append changes. Mean and standard deviation
    are averages weighted by the numbers of images."""
    counts = [a + b for a, b in zip([*before.class_counts, *[0] * len(new.classes)], new.class_counts, strict=False)]
    summed = {
        name: dict(sorted((Counter(getattr(before, name)) + Counter(getattr(new, name))).items()))
        for name in ("rejects", "duplicates_by_reason", "reported_by_reason")
    }
    mean, std = before.mean, before.std
    if not (before.mean and before.std):
        mean, std = new.mean, new.std
    elif new.mean and new.std:
        w = new.rows / max(before.rows + new.rows, 1)
        means = np.array([before.mean, new.mean])
        squares = np.array([before.std, new.std]) ** 2 + means**2
        mixed, square = (1 - w) * means[0] + w * means[1], (1 - w) * squares[0] + w * squares[1]
        mean = [round(float(m), 6) for m in mixed]
        std = [round(float(s), 6) for s in np.sqrt(np.maximum(0, square - mixed**2))]
    return {
        "rows": before.rows + new.rows,
        "inputs": before.inputs + new.inputs,
        "duplicates": before.duplicates + new.duplicates,
        **summed,
        "mean": mean,
        "std": std,
        "classes": new.classes,
        "class_counts": counts,
        "shards": [*before.shards, *new.shards],
    }
