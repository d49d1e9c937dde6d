"""The MLflow run of a preparation: configuration, progress, datasets and rejects.

The run is started in the background while Ray starts and the first images are read. A continued preparation continues
the run in `_work/run.json`. The dataset does not contain the run id, so that the same input gives the same bytes;
training runs find the run of their data by its fingerprint."""

import io
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import fields
from typing import Any

import pyarrow.csv
import pyarrow.parquet as pq

from pipeline import config as configuration
from pipeline import storage
from pipeline.address import data_name
from pipeline.data.duplicates.report import PAIRS
from pipeline.data.format import REJECTS, Manifest
from pipeline.revision_names import report_name
from pipeline.tracking import Run, names, start_run
from pipeline.tracking.description import Description

EVERY = 10.0  # seconds between two progress records
MAX_REJECTS = 10_000  # maximum rows of rejects.parquet in the table of the MLflow run


AS_DOWNLOADED = "as downloaded"
OF_IMAGES = frozenset(
    (
        *("size", "small", "quality", "patch_size", "fit", "splits", "class_level", "label_map", "label_column"),
        *("decontaminate", "deduplicate", "distance", "unlabelled", "licence"),
        *("row_group_bytes", "shard_bytes", "shuffle_archives"),
    )
)
"""Settings of prepared images, which a download does not use; those of descriptors begin with `descriptor`."""


def _without_unused(config: Any) -> dict[str, Any]:
    """The settings to log. A download keeps the images as they are, so it has no encoding or size."""
    values = configuration.to_dict(config)
    if not config.download_only:
        return values
    kept = {key: v for key, v in values.items() if key not in OF_IMAGES and not key.startswith("descriptor")}
    return kept | {"encoding": AS_DOWNLOADED}


def _purpose(config: Any) -> str:
    sources = ", ".join(config.source)
    if config.download_only:
        return f"Downloads of {sources}: the files as they are, in WebDataset archives."
    return f"Images of {sources} as {config.encoding} shards at {config.size} px."


class PrepareRecord:
    """Context manager around a preparation. An exception marks the run as failed or killed.

    server: tracking URI. config: a dataclass. work: folder of receipts. An unreachable server does not delay the
    preparation (pipeline.tracking); `finish` raises UserError if the server rejected the login."""

    def __init__(self, server: str, config: Any, work: str, input_fingerprint: str) -> None:
        self._where = storage.join(work, "run.json")
        self._newest: dict[str, float] = {}
        self._entered = self._logged = time.monotonic()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="tracking")
        self._started: Future[Run] = self._pool.submit(self._start, server, config, input_fingerprint)

    def _start(self, server: str, config: Any, input_fingerprint: str) -> Run:
        known = storage.read_record(self._where, ["run_id"])["run_id"] if storage.exists(self._where) else None
        run = start_run(
            names.PREPARE,
            data_name(config.output),
            config=_without_unused(config),
            about=Description(
                what=_purpose(config),
                data=(f"output {config.output}",),
            ),
            tags={f"{names.DATA_FINGERPRINT}.input": input_fingerprint},
            run_id=known,
            tracking_uri=server,
        )
        if run.id != known:
            storage.write_json(self._where, {"run_id": run.id})
        return run

    def progress(self, inputs: int, rejects: int) -> None:
        """Logs the progress of this attempt every ten seconds. Keeps the newest values until the run has started."""
        now = time.monotonic()
        rate = inputs / max(now - self._entered, 1e-9)
        self._newest = {names.INPUTS: inputs, names.REJECTS: rejects, names.PREPARED_PER_SECOND: rate}
        if now - self._logged >= EVERY and self._started.done() and not self._started.exception():
            self._logged = now
            self._started.result().log(self._newest, step=inputs)

    def wait(self) -> None:
        """Waits until the run has started. Afterwards the folder of receipts may be removed."""
        self._started.result()

    def finish(self, datasets: Mapping[str, tuple[str, Manifest]]) -> None:
        """Logs the results. datasets: {split: (uri, manifest)}."""
        run = self._started.result()
        manifests = [manifest for _, manifest in datasets.values()]
        reasons: dict[str, int] = {}
        for manifest in manifests:
            for reason, count in manifest.rejects.items():
                reasons[reason] = reasons.get(reason, 0) + count
        totals = self._newest | {
            names.INPUTS: sum(manifest.inputs for manifest in manifests),
            names.ROWS: sum(manifest.rows for manifest in manifests),
            names.REJECTS: sum(reasons.values()),
            names.DUPLICATES: sum(manifest.duplicates for manifest in manifests),
            names.BYTES: sum(shard.bytes for manifest in manifests for shard in manifest.shards),
        }
        totals |= {names.REJECTED + reason: count for reason, count in reasons.items()}
        run.log(totals, step=int(totals[names.INPUTS]))
        for split, (uri, manifest) in datasets.items():
            role = split or "dataset"
            about = {f.name: getattr(manifest, f.name) for f in fields(manifest)}
            about["shards"] = len(manifest.shards)  # the list of shards may be long and is in the dataset
            run.log_dataset(uri, about, role=role, made=True)
            if manifest.rejects:
                table = pq.read_table(
                    io.BytesIO(storage.read_bytes(storage.join(uri, report_name(REJECTS, manifest.revision))))
                )
                sink = io.BytesIO()
                pyarrow.csv.write_csv(table.slice(0, MAX_REJECTS), sink)
                run.log_text(sink.getvalue().decode(), f"rejects/{role}.csv")
            if storage.exists(sheet := storage.join(uri, report_name(PAIRS, manifest.revision))):
                run.log_bytes(storage.read_bytes(sheet), f"duplicates/{role}.png")

    def log_counts(self, inputs: int, rows: int, rejects: Mapping[str, int], size: int) -> None:
        """Logs the results of downloads. rejects: by reason. size: bytes of the archives."""
        totals: dict[str, float] = {names.INPUTS: inputs, names.ROWS: rows, names.BYTES: size}
        totals |= {names.REJECTS: sum(rejects.values())}
        totals |= {names.REJECTED + reason: count for reason, count in rejects.items()}
        self._started.result().log(self._newest | totals, step=inputs)

    def __enter__(self) -> "PrepareRecord":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._pool.shutdown(wait=True)
        if self._started.exception():
            return
        run = self._started.result()
        if kind is not None and self._newest:  # it may have failed before the run started
            run.log(self._newest, step=int(self._newest[names.INPUTS]))
        run.__exit__(kind, error, trace)
