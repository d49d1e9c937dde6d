"""`--download-only`: the images of lists of URLs as WebDataset archives, for preparing them later.

    <output>/00000.tar           one per slice: KEY.jpg (or .png, ...), KEY.json, and KEY.txt for a caption
    <output>/rejects.parquet     the failed addresses, with the reason
    <output>/downloads.json      counts, and the SHA-256 of each archive; written last
    <output>/_work/              plan and receipts; kept while there are temporary failures

The JSON of a sample has the columns of its row, and `key` (FILE#ROW), `url`, `status` and `sha256`. The archives depend
only on the responses of the servers, not on the number of workers or on interruptions."""

import contextlib
import hashlib
import io
import json
import logging
import os
import tarfile
import tempfile
from collections import Counter
from collections.abc import Callable
from typing import IO, Any

from pipeline import storage
from pipeline.data import codecs
from pipeline.data.downloads.config import is_temporary
from pipeline.data.format import REJECTS, Reject, rejects_table
from pipeline.data.prepare import retry
from pipeline.data.prepare.change import lock_output
from pipeline.data.prepare.checks import check_config
from pipeline.data.prepare.config import PrepareConfig, identity
from pipeline.data.prepare.plan import PreparePlan, claim_output, make_plan, refuse_other_files, slice_name
from pipeline.data.prepare.record import PrepareRecord
from pipeline.data.prepare.run import prepare_slices
from pipeline.data.prepare.worker import items_of_slice
from pipeline.data.sources import Item, urls
from pipeline.data.sources.columns import normalised_name
from pipeline.data.sources.words import CAPTION_COLUMNS
from pipeline.errors import UserError, plural
from pipeline.outputs import check_output

DOWNLOADS = "downloads.json"
VERSION = 1
logger = logging.getLogger(__name__)


def download_images(
    config: PrepareConfig, *, tracking_uri: str | None = None, on_progress: Callable[[int, int], None] | None = None
) -> dict[str, Any]:
    """Downloads the images of lists of URLs into archives. Returns the content of downloads.json.

    A finished download is repeated only for temporary failures. Raises UserError before any work for an invalid
    configuration or source and for an output with other content, and at the end for too many failures."""
    config = check_config(config)
    check_output(config.output)
    finished = _find_finished(config)
    plan = make_plan(config)
    others = [source for source in plan.sources if source.kind != urls.NAME]
    if others:
        raise UserError(f"--download-only: {others[0].uri} is read as {others[0].kind}, not as a list of URLs")
    if finished is not None:
        known = {"config": identity(config), "input_fingerprint": plan.input_fingerprint}
        if any(finished[key] != value for key, value in json.loads(json.dumps(known)).items()):
            raise UserError(f"{config.output}: already contains other downloads; choose another --output or remove it")
        if not storage.exists(plan.work):
            logger.info("prepare: %s is already finished", config.output)
            return finished
    watchers = [on_progress] if on_progress else []
    with lock_output(plan.work):
        plan = claim_output(plan)
        if tracking_uri is None:
            return _finish(retry.run_passes(plan, lambda part: prepare_slices(part, watchers, download_slice)))
        with PrepareRecord(tracking_uri, config, plan.work, plan.input_fingerprint) as record:
            watchers.append(record.progress)
            plan = retry.run_passes(plan, lambda part: prepare_slices(part, watchers, download_slice))
            record.wait()
            result = _finish(plan)
            record.log_counts(result["inputs"], result["downloaded"], result["rejects"], result["bytes"])
    return result


def _find_finished(config: PrepareConfig) -> dict[str, Any] | None:
    """The content of downloads.json. Raises UserError if the output contains other files."""
    where = storage.join(config.output, DOWNLOADS)
    if storage.exists(where):
        value = storage.read_record(where, ["version", "config", "input_fingerprint", "archives"])
        if value["version"] != VERSION:
            raise UserError(f"{where}: version {value['version']}, this program reads {VERSION}")
        return value
    refuse_other_files(config.output)
    return None


# ---------------------------------------------------------------- one slice


def download_slice(number: int, plan: PreparePlan) -> dict[str, Any]:
    """Downloads slice `number` of the plan into an archive. Returns its receipt.

    Raises NotWritten when the temporary folder or the output cannot be written, NotRead when the list has disappeared.
    """
    name = f"{number:05d}.tar"
    try:
        with tempfile.NamedTemporaryFile(prefix="download-", suffix=".tar") as file:
            about = _write_archive(number, plan, file)
            samples = about.pop("samples")
            digest = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
            size = os.path.getsize(file.name)
            if samples:
                _copy(file.name, plan.config.output, name)
    except OSError as error:
        raise storage.not_written(None, error) from error
    written = {"name": name, "samples": samples, "bytes": size, "sha256": digest}
    return about | {"archives": [written] if samples else []}


def _copy(path: str, output: str, name: str) -> None:
    try:
        storage.copy_file(path, storage.join(output, name))
    except OSError as error:
        raise storage.not_written(output, error) from error


def _write_archive(number: int, plan: PreparePlan, file: IO[bytes]) -> dict[str, Any]:
    """The receipt of a slice without the archive's entry, and "samples"; `file` is at its start."""
    inputs, samples, rejects, temporary = 0, 0, [], []
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for place, item in items_of_slice(number, plan):
            inputs += 1
            if item.refused:
                rejects.append([item.key, item.source, item.refused.reason, item.refused.detail[:200]])
                temporary += [place] if is_temporary(item.refused.reason) else []
                continue
            _add_sample(archive, f"{number:05d}{samples:05d}", item)
            samples += 1
    file.flush()
    file.seek(0)
    return {"inputs": {"": inputs}, "rejects": {"": rejects}, "temporary": temporary, "samples": samples}


def _add_sample(archive: tarfile.TarFile, name: str, item: Item) -> None:
    assert isinstance(item.image, bytes)
    assert item.row is not None
    extension = codecs.find(item.image).extensions[0]
    digest = hashlib.sha256(item.image).hexdigest()
    about = item.row | {"key": item.key, "url": item.source, "status": "success", "sha256": digest}
    caption = next((item.row[column] for column in item.row if normalised_name(column) in CAPTION_COLUMNS), None)
    members = [(extension, item.image), ("json", json.dumps(about, ensure_ascii=False, default=_plain).encode())]
    if isinstance(caption, str):
        members.append(("txt", caption.encode("utf-8", "backslashreplace")))
    for ending, data in members:
        info = tarfile.TarInfo(f"{name}.{ending}")  # time and owner are 0, so that equal downloads give equal bytes
        info.size = len(data)
        archive.addfile(info, io.BytesIO(data))


def _plain(value: Any) -> Any:
    """Converts values without a JSON type: bytes to hex, others (dates, decimals) to text."""
    return value.hex() if isinstance(value, bytes) else str(value)


# ---------------------------------------------------------------- the end


def _finish(plan: PreparePlan) -> dict[str, Any]:
    """Writes rejects.parquet and downloads.json, and removes the receipts unless there are temporary failures."""
    receipts = retry.without_retried(plan, plan.receipts.read(list(map(slice_name, range(len(plan.slices))))))
    rejects = [Reject(*row) for receipt in receipts for row in receipt["rejects"][""]]
    archives = [archive for receipt in receipts for archive in receipt["archives"]]
    inputs = sum(receipt["inputs"][""] for receipt in receipts)
    reasons = Counter(reject.reason for reject in rejects)
    result = {
        "version": VERSION,
        "inputs": inputs,
        "downloaded": sum(archive["samples"] for archive in archives),
        "bytes": sum(archive["bytes"] for archive in archives),
        "rejects": dict(sorted(reasons.items())),
        "may_pass": sum(count for reason, count in reasons.items() if is_temporary(reason)),
        "input_fingerprint": plan.input_fingerprint,
        "config": identity(plan.config),
        "archives": archives,
    }
    if result["downloaded"] + len(rejects) != inputs:
        raise RuntimeError(
            f"{plan.config.output}: {plural(inputs, 'row')}, but {plural(result['downloaded'], 'image')} + {plural(len(rejects), 'reject')}"
        )
    storage.write_bytes(storage.join(plan.config.output, REJECTS), rejects_table(rejects))
    if len(rejects) > plan.config.max_reject_fraction * inputs:
        raise UserError(
            f"{len(rejects):,} of {plural(inputs, 'download')} failed, more than --max-reject-fraction "
            f"{plan.config.max_reject_fraction:g}: "
            f"{'; '.join(f'{n:,} {reason}' for reason, n in sorted(reasons.items()))} (all in "
            f"{storage.join(plan.config.output, REJECTS)}). Raise the limit, or repeat the command to retry temporary "
            "failures; finished work is kept"
        )
    _tidy(plan, {archive["name"] for archive in archives})
    storage.write_json(storage.join(plan.config.output, DOWNLOADS), result)
    if not retry.pending(plan):
        storage.remove(plan.work, recursive=True)
    return result


def _tidy(plan: PreparePlan, known: set[str]) -> None:
    """Removes the files of killed tasks: archives without a receipt, and partial files."""
    for file in storage.list_files(plan.config.output, recursive=False):
        if file.path.endswith((".tar", ".tmp")) and file.path not in known:
            with contextlib.suppress(FileNotFoundError):
                storage.remove(file.uri)
