"""Finishes datasets from the receipts of slices: reject limit, reports, manifests, cleanup."""

import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from pipeline import storage
from pipeline.data.downloads.config import is_temporary
from pipeline.data.duplicates.report import DUPLICATES, PAIRS, by_reason, contact_sheet, duplicates_table
from pipeline.data.format import (
    MANIFEST,
    REJECTS,
    Manifest,
    Receipt,
    Reject,
    build_manifest,
    finish_dataset,
    open_dataset,
    rejects_table,
)
from pipeline.data.format.deleted import read_deleted, write_deleted
from pipeline.data.format.manifest import content_fingerprint
from pipeline.data.format.revisions import known_files, publish, revisions, successor
from pipeline.data.prepare.append import history_entry, joined, reports_without
from pipeline.data.prepare.config import identity
from pipeline.data.prepare.plan import PreparePlan, slice_name
from pipeline.data.prepare.remove import deduplicated_name
from pipeline.data.prepare.retry import temporary_keys, without_retried
from pipeline.data.prepare.table_rows import receipt_of_missing
from pipeline.errors import UserError, plural
from pipeline.revision_names import report_name

logger = logging.getLogger(__name__)


def receipt_names(plan: PreparePlan) -> list[str]:
    """The name of the valid receipt of every slice: the one after removal of duplicates, if it exists."""
    finished = plan.receipts.finished()
    names = ((deduplicated_name(n), slice_name(n)) for n in range(len(plan.slices)))
    return [after if after in finished else before for after, before in names]


def finish_datasets(
    plan: PreparePlan, receipts: Sequence[dict[str, Any]], shuffled: Sequence[dict[str, Any]] | None = None
) -> dict[str, Manifest]:
    """Writes reports and manifests, {split: manifest}; removes the receipts.

    shuffled: receipts of the shuffled shards, which replace those of the slices. Raises UserError when more inputs were
    rejected than `max_reject_fraction` allows."""
    receipts = without_retried(plan, receipts)
    if missing := receipt_of_missing(plan, receipts, shuffled):
        receipts = [*receipts, missing]
    without_labels = _splits_without_labels(plan, receipts)
    _check_rejects(plan, receipts, without_labels)
    if plan.append is not None and not any(part["rows"] for receipt in receipts for part in receipt["splits"].values()):
        _check_nothing_new(plan, receipts)
        storage.remove(plan.work, recursive=True)
        return {name: open_dataset(uri).manifest for name, uri in plan.append.bases.items()}
    manifests = {}
    for name in plan.splits:
        if name in without_labels:
            continue
        reported = [record for receipt in receipts for record in receipt.get("reported", {}).get(name, [])]
        duplicates = [record for receipt in receipts for record in receipt["duplicates"][name]]
        if plan.append is None and (plan.config.deduplicate != "off" or plan.config.decontaminate):
            _write_report(plan, name, duplicates + reported)
        written = [Receipt.from_dict(receipt["splits"][name]) for receipt in receipts]
        if shuffled is not None:  # mean and standard deviation are in the receipts of the slices
            written = [Receipt(pixels=receipt.pixels) for receipt in written]
            written += [Receipt.from_dict(receipt[name]) for receipt in shuffled]
        about: dict[str, Any] = {
            "rejects": [Reject(*row) for receipt in receipts for row in receipt["rejects"][name]],
            "duplicates": by_reason(duplicates),
            "reported": by_reason(reported),
            "inputs": sum(receipt["inputs"][name] for receipt in receipts),
            "config": identity(plan.config),
            "input_fingerprint": plan.input_fingerprint,
        }
        new = build_manifest(plan.split_uri(name), written, plan.schema, **about)
        if plan.append is None:
            manifests[name] = finish_dataset(plan.split_uri(name), new, about["rejects"])
        else:
            manifests[name] = _publish(plan, name, new, about["rejects"], duplicates + reported, receipts)
    _warn_about_classes(plan, manifests)
    tidy_output(plan, manifests, keep_work=plan.append is None and _may_go_on(plan, receipts, shuffled is not None))
    return manifests


def _check_nothing_new(plan: PreparePlan, receipts: Sequence[dict[str, Any]]) -> None:
    """Logs why an append adds no row. Raises UserError if no input could be used, or if a download failed temporarily
    for the first time."""
    refused = [row for receipt in receipts for rows in receipt["rejects"].values() for row in rows]
    known = {key for receipt in receipts for keys in receipt["again"].values() for key in keys}
    deleted = sum(count for receipt in receipts for count in receipt["deleted"].values())
    skipped = sum(count for receipt in receipts for count in receipt["skipped"].values())
    repeated = sum(len(records) for receipt in receipts for records in receipt["duplicates"].values())
    reasons = _text_of_reasons([row[2] for row in refused])
    about, output = f"{reasons}, such as {refused[0][0]}" if refused else "", plan.config.output
    failed = any(is_temporary(row[2]) and row[0] not in known for row in refused)
    if refused and (failed or not (deleted or skipped or repeated)):
        raise UserError(
            f"--append: no image was added to {output}, because {plural(len(refused), 'input')} could not be used ({about}); repeat "
            f"the command to try again, or remove {plan.work} to abandon the append"
        )
    but = f", except {deleted} that were deleted and stay out" if deleted else ""
    logger.info("prepare: %s already has all of these images%s; there is no new revision", output, but)
    if refused:
        logger.warning("%s: %s could not be used (%s)", output, plural(len(refused), "input"), about)


def _text_of_reasons(reasons: Iterable[str]) -> str:
    return "; ".join(f"{count:,} {reason}" for reason, count in sorted(Counter(reasons).items()))


def _may_go_on(plan: PreparePlan, receipts: Sequence[dict[str, Any]], shuffled: bool) -> bool:
    """Whether repeating the command may add images whose download failed temporarily. Logs a hint."""
    count = sum(1 for receipt in receipts for _ in temporary_keys(receipt))
    if not count:
        return False
    if shuffled or plan.receipts.finished() & set(map(deduplicated_name, range(len(plan.slices)))):
        logger.warning(
            "%s: %s failed temporarily; this dataset cannot be completed later, because its rows were "
            "shuffled or removed after the downloads (--download-only keeps the files)",
            plan.config.output,
            plural(count, "download"),
        )
        return False
    logger.warning(
        "%s: %s failed temporarily; repeat the command to retry",
        plan.config.output,
        plural(count, "download"),
    )
    return True


def _publish(
    plan: PreparePlan,
    split: str,
    new: Manifest,
    rejects: Sequence[Reject],
    records: list[dict[str, Any]],
    receipts: Sequence[dict[str, Any]],
) -> Manifest:
    """Writes the reports of the next revision of a split, then its manifest. new: of what is added."""
    assert plan.append is not None
    base, uri, number = open_dataset(plan.append.bases[split]).manifest, plan.split_uri(split), plan.append.revision
    skipped, deleted = (sum(receipt[what][split] for receipt in receipts) for what in ("skipped", "deleted"))
    entry = history_entry(plan.append, plan.config, plan.input_fingerprint, new.rows, skipped, deleted)
    entry["temporary"] = sum(1 for receipt in receipts for _ in temporary_keys(receipt))
    again = [key for receipt in receipts for key in receipt["again"][split]]
    earlier, refused_before, repeated = reports_without(base, uri, again)
    fields = joined(earlier, new)
    fields["fingerprint"] = content_fingerprint(fields["shards"], fields["classes"])
    manifest = successor(base, number, entry, **fields)
    refused = [Reject(**row) for row in refused_before] + list(rejects)
    storage.write_bytes(storage.join(uri, report_name(REJECTS, number)), rejects_table(refused))
    if repeated or again or plan.config.deduplicate != "off" or plan.config.decontaminate:
        _write_report(plan, split, repeated + records, number)
    if base.deleted:
        write_deleted(uri, number, read_deleted(uri, base))
    publish(uri, manifest)
    text = "prepare: %s@%d: %s added, %d there before, %d deleted before and kept out"
    logger.info(text, uri, number, plural(new.rows, "image"), skipped, deleted)
    return manifest


def _splits_without_labels(plan: PreparePlan, receipts: Sequence[dict[str, Any]]) -> set[str]:
    """Splits of the source without any label, when other splits have labels."""
    if not plan.source_decides:
        return set()
    found = set()
    for name in plan.splits:
        reasons = {row[2] for receipt in receipts for row in receipt["rejects"][name]}
        if (
            reasons
            and reasons <= {"no label", "no row"}
            and not any(receipt["splits"][name]["rows"] for receipt in receipts)
        ):
            found.add(name)
    if len(found) == len(plan.splits):
        return set()
    for name in sorted(found):
        count = sum(receipt["inputs"][name] for receipt in receipts)
        logger.warning(
            "the split %s (%s) has no labels and is skipped; --unlabelled includes it", name, plural(count, "image")
        )
    return found


def _warn_about_classes(plan: PreparePlan, manifests: dict[str, Manifest]) -> None:
    """Warns about classes without images, and about a dataset with only one class."""
    classes = plan.labels.classes
    if len(classes) == 1 and not plan.labels.multilabel:
        logger.warning(
            "%s: only one class (%s), so a model cannot learn to classify. If the classes are elsewhere, name their location "
            "(--class-level, --label-column, --labels)",
            plan.config.output,
            classes[0],
        )
    for name, manifest in manifests.items():
        empty = [label for label, count in zip(classes, manifest.class_counts, strict=True) if not count]
        if empty and any(manifest.class_counts):
            logger.warning(
                "%s: no images in %d of %s, such as %s%s%s",
                plan.split_uri(name),
                len(empty),
                plural(len(classes), "class"),
                ", ".join(empty[:5]),
                f"; see {REJECTS}" if manifest.rejects else "",
                ""
                if plan.source_decides or len(manifests) == 1
                else "; a larger share of --splits would have more of each",
            )


def _check_rejects(plan: PreparePlan, receipts: Sequence[dict[str, Any]], left_out: set[str]) -> None:
    kept = [name for name in plan.splits if name not in left_out]
    ways = ("inputs", "skipped", "deleted")  # an append skips inputs whose key it knows
    inputs = sum(receipt[way][name] for receipt in receipts for name in kept for way in ways)
    refused = [Reject(*row) for receipt in receipts for name in kept for row in receipt["rejects"][name]]
    if not inputs or len(refused) <= plan.config.max_reject_fraction * inputs:
        return
    reasons = [reject.reason for reject in refused]
    where = storage.join(plan.config.output, report_name(REJECTS, plan.append.revision if plan.append else 1))
    if plan.append or not storage.exists(storage.join(plan.config.output, MANIFEST)):  # else it is part of that dataset
        storage.write_bytes(where, rejects_table(refused))
    hint = " (--allow-private-hosts permits them)" if "private address" in reasons else ""
    raise UserError(
        f"{len(refused):,} of {inputs:,} inputs were rejected, more than --max-reject-fraction "
        f"{plan.config.max_reject_fraction:g}: {_text_of_reasons(reasons)}{hint} (such as {refused[0].key}{f': {refused[0].detail}' if refused[0].detail else ''}; all in {where}). "
        "Repeat the command with a higher limit, which keeps the finished work; or fix the inputs, remove "
        f"{plan.work if plan.append else 'the output'} and start again"
    )


def _write_report(plan: PreparePlan, split: str, records: list[dict[str, Any]], revision: int = 1) -> None:
    """duplicates.parquet, and the contact sheet of the least certain pairs."""
    uri = plan.split_uri(split)
    storage.write_bytes(storage.join(uri, report_name(DUPLICATES, revision)), duplicates_table(records))
    sheet = contact_sheet(records)
    if sheet is not None:
        storage.write_bytes(storage.join(uri, report_name(PAIRS, revision)), sheet)


def tidy_output(plan: PreparePlan, manifests: dict[str, Manifest], keep_work: bool = False) -> None:
    """Removes receipts, unless `keep_work`, and leftovers of killed tasks: shards without a receipt and partial files."""
    for name in manifests:
        known = known_files(revisions(plan.split_uri(name)).values())
        for file in storage.list_files(plan.split_uri(name), recursive=False):
            if file.path.startswith((".part-", "part-")) and file.path not in known:
                storage.remove(file.uri)
    if "" not in manifests:
        name = report_name(REJECTS, plan.append.revision if plan.append else 1)
        storage.remove(storage.join(plan.config.output, name))  # from an attempt with too many rejects
    if not keep_work:
        storage.remove(plan.work, recursive=True)
