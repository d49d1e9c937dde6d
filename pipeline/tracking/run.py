"""Runs, through which the jobs log. Only `start_run` and the end of a run wait for the tracking server.

`start_run` tries to create the run immediately. If the server is unreachable, the run starts with an `offline-…` id.
All records are written to the spool (`pipeline.tracking.spool`), and two background threads deliver them
(`pipeline.tracking.delivery`) in batches and in order as soon as the server responds. Records that are undelivered at
the end stay on disk, and a warning names the command that uploads them: `python -m pipeline.tracking upload`.
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import logging
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import yaml

from pipeline import metrics as live
from pipeline import ray_watch, stops
from pipeline.config import flatten, to_dict
from pipeline.credentials import redacted
from pipeline.errors import UserError, plural
from pipeline.tracking import description, environment, names, server
from pipeline.tracking.delivery import Delivery
from pipeline.tracking.server import first_line, resolve_tracking_uri, run_url
from pipeline.tracking.spool import Queue, Spool, offline_id, spool_root

SEND_EVERY = 1.0  # seconds between two deliveries
RETRY_AT_MOST = 30.0  # maximum seconds between two attempts while the server is unreachable
LAST_DELIVERY = 60.0  # maximum seconds that `finish` waits for the delivery of the remaining records
LAST_DELIVERY_OF_A_STOP = 15.0  # after SIGTERM and Ctrl-C: senders often kill after 30 s
STOPPED: dict[int | str | None, str] = {
    128 + signal.SIGINT: "stopped with Ctrl-C",
    128 + signal.SIGTERM: "stopped with SIGTERM",
    128 + signal.SIGHUP: "stopped because its terminal was closed (SIGHUP)",
}
"""Reasons by exit code."""

logger = logging.getLogger(__name__)


class Run:
    """One MLflow run, open for writing. `start_run` and `attach_run` create it. The log methods return immediately."""

    def __init__(self, spool: Spool, *, fill_gaps: bool, owner: bool):
        self.spool = spool
        self._delivery = Delivery(spool, fill_gaps=fill_gaps)
        self._owner = owner  # only the owner ends the run
        self._nonfinite: dict[str, tuple[int, int]] = {}  # metric: (count, first step)
        self._last: dict[str, tuple[int, float]] = {}  # metric: last point
        self._costs: dict[str, float] = {}  # over all attempts
        self._started = time.monotonic()
        self._finished = False
        self._closing = threading.Event()
        self._wake = threading.Condition()  # wakes the delivery threads
        self._progress = threading.Condition()  # notified by the delivery threads after every attempt
        self._attempts = 0  # number of failed deliveries so far
        self._threads: list[threading.Thread] = []
        self.error = ""  # error of the last failed delivery; empty without one

    @property
    def id(self) -> str:
        """MLflow's run id, or `offline-…` until the server has been reached. Both are
        valid values of `run_id=` later."""
        return self._delivery.run_id or self.spool.header["run_id"] or offline_id(self.spool.id)

    @property
    def uri(self) -> str:
        return self._delivery.uri

    def started(self) -> float:
        """The start time of the run in seconds since the epoch. Asks the server, and raises its errors."""
        self._delivery.resolve()
        return self._delivery.started

    @property
    def url(self) -> str:
        return run_url(self.uri, self._delivery.experiment, self.id)

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        status, reason = status_of(error)
        self.finish(status, reason=reason)

    # -------- what the jobs log

    def log(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """Logs metrics of one step. NaN and infinite values are counted in
        nonfinite/<name> and in a tag, but not stored."""
        values = {names.valid_name(name): float(value) for name, value in metrics.items()}
        # MLflow's charts over another metric (images seen) match points by position, so a repeated point would shift
        # the rest.
        values = {name: value for name, value in values.items() if self._last.get(name) != (step, value)}
        self._last |= {name: (step, value) for name, value in values.items()}
        bad = [name for name, value in values.items() if not math.isfinite(value)]
        for name in bad:
            del values[name]
            count, first = self._nonfinite.get(name, (0, int(step)))
            self._nonfinite[name] = (count + 1, first)
            values[names.NONFINITE + name] = count + 1
        now = int(time.time() * 1000)
        self.spool.metrics.append({"kind": "metrics", "step": int(step), "time": now, "values": values})
        if bad:
            found = (f"{name}: {count} since step {first}" for name, (count, first) in self._nonfinite.items())
            self.set_tags({names.NONFINITE_TAG: "; ".join(found)})

    def log_cost(self, costs: Mapping[str, float]) -> None:
        """Logs the costs of this attempt (names `cost/...`), plus the costs of earlier attempts of the run."""
        totals = {name: value + self._delivery.costs.get(name, 0.0) for name, value in costs.items()}
        self._costs |= totals
        self.log(totals)

    def log_energy(self) -> None:
        """Logs the energy of the GPUs of all nodes, if the server has the values."""
        with contextlib.suppress(Exception):
            metrics = self.metrics().items()
            nodes = [v for name, v in metrics if name.startswith(names.SYSTEM) and name.endswith(names.NODE_ENERGY)]
            if nodes:
                self._costs[names.ENERGY_KWH] = sum(nodes)
                self.log({names.ENERGY_KWH: sum(nodes)})

    def metrics(self) -> dict[str, float]:
        """The newest value of every metric on the server. Raises the errors of the server."""
        return dict(server.client(self.uri).get_run(self._delivery.resolve()).data.metrics)

    def set_tags(self, tags: Mapping[str, Any]) -> None:
        values = _texts(tags)
        if values:
            self.spool.metrics.append({"kind": "tags", "values": values})

    def describe(self, markers: Sequence[str], paragraph: str) -> None:
        """Replaces the paragraph of the description that begins with one of the markers, or adds it."""
        text = redacted(names.valid_value(paragraph))
        self.spool.metrics.append({"kind": "paragraph", "markers": list(markers), "text": text})

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Logs parameters in addition to the configuration that `start_run` logs. Nested parameters are flattened to
        a.b.c.

        Paths and addresses become tags, because they do not affect results.
        """
        values, places = _split_places(flatten(params))
        if values:
            self.spool.metrics.append({"kind": "params", "values": values})
        self.set_tags(places)

    def log_bytes(self, data: bytes, path: str) -> None:
        self.spool.add_artifact(names.valid_path(path), data)

    def log_text(self, text: str, path: str) -> None:
        self.log_bytes(text.encode(), path)

    def log_dict(self, value: Any, path: str) -> None:
        """Logs a JSON artifact, or YAML if `path` ends in .yaml or .yml."""
        yaml_wanted = path.endswith((".yaml", ".yml"))
        self.log_text(yaml.safe_dump(value, sort_keys=False) if yaml_wanted else json.dumps(value, indent=1), path)

    def log_figure(self, figure: Any, path: str) -> None:
        """Logs a matplotlib figure in the format of the path's extension."""
        buffer = io.BytesIO()
        figure.savefig(buffer, format=os.path.splitext(path)[1][1:] or "png", bbox_inches="tight")
        self.log_bytes(buffer.getvalue(), path)

    def log_dataset(
        self, uri: str, manifest: Mapping[str, Any], role: str = "train", made: bool = False, linked: bool = True
    ) -> None:
        """Logs a dataset that the run reads: an MLflow input, fingerprint tags, the manifest, and a link to its prepare
        run.

        made: whether this run is the prepare run of the dataset. Other runs find it by the fingerprint, even if the
        dataset is copied. linked: False omits the manifest and the link, for runs that read dozens of datasets.
        """
        text = json.dumps(manifest, sort_keys=True, default=str)
        digest = str(manifest.get("fingerprint") or hashlib.sha256(text.encode()).hexdigest()[:12])
        rows = manifest.get("rows") or manifest.get("num_rows") or (manifest.get("totals") or {}).get("rows")
        dataset = {
            "name": names.valid_value("/".join(uri.rstrip("/").rsplit("/", 2)[-2:]))[: names.MAX_NAME],
            "digest": digest[:36],
            "source_type": uri.partition("://")[0] if "://" in uri else "local",
            "source": json.dumps({"uri": names.valid_value(uri)}),
            "profile": json.dumps({"num_rows": rows}),
        }
        self.spool.metrics.append({"kind": "dataset", "role": names.valid_value(role), "dataset": dataset})
        self.set_tags({f"{names.DATA_URI}.{role}": uri, f"{names.DATA_FINGERPRINT}.{role}": digest})
        if isinstance(config := manifest.get("config"), Mapping):
            removed = ", ".join(map(str, config.get("decontaminate") or ())) or "none"
            self.set_tags({f"{names.DATA_DECONTAMINATED}.{role}": removed})
        if linked or made:
            self.log_text(text, f"data/{role.replace('/', '_')}-manifest.json")
        if linked and not made:
            self.spool.metrics.append({"kind": "link", "role": "prepare", "digest": digest[:36]})

    def link(self, role: str, run_id: str) -> None:
        """Records that this run uses the output of another run (role: prepare, pretrain,
        transfer), and of that run's sources."""
        self.spool.metrics.append({"kind": "link", "role": role, "run_id": run_id})

    # -------- delivery and end

    def flush(self, timeout: float = 30.0) -> bool:
        """Waits until all records so far are on the server. Returns False if the server is
        unreachable or after `timeout` seconds."""
        deadline, attempts = time.monotonic() + timeout, self._attempts
        while self.spool.pending and self._attempts == attempts and time.monotonic() < deadline:
            with self._wake:
                self._wake.notify_all()
            with self._progress:
                self._progress.wait(0.05)
        return self.spool.pending == 0

    def finish(self, status: str = "FINISHED", timeout: float | None = None, *, reason: str = "") -> bool:
        """Ends the run as FINISHED, FAILED or KILLED and delivers the remaining records. Returns True if the server has
        all records.

        reason: why the run failed or was stopped, for a tag and the description. timeout: maximum seconds of the
        delivery. Undelivered records stay on disk, and a warning gives their number and the command that uploads them.
        """
        if self._finished:
            return True
        self._finished = True
        if timeout is None:
            timeout = LAST_DELIVERY_OF_A_STOP if status == "KILLED" else LAST_DELIVERY
        if self._owner:
            if not self.spool.header["parent_id"]:  # a child run is written after its work, so its owner logs the time
                self.log_cost({names.SECONDS: time.monotonic() - self._started})
            if self.spool.header.get("described"):
                self.describe((description.COST,), description.cost_paragraph(self._costs))
            lost = self.spool.metrics.lost + self.spool.artifacts.lost
            if lost:
                self.set_tags({"lost": f"{plural(lost, 'record')} lost: the buffer was full"})
            end = {"kind": "end", "status": status, "time": int(time.time() * 1000)}
            self.spool.metrics.append(end | {"reason": names.valid_value(redacted(reason))})
        self.flush(timeout)
        self._closing.set()
        with self._wake:
            self._wake.notify_all()
        for thread in self._threads:
            thread.join(timeout=min(RETRY_AT_MOST, timeout))
        return self._close()

    def _close(self) -> bool:
        left, rejected = self.spool.pending, self.spool.rejected
        delivered = self.spool.close()
        lost = self.spool.metrics.lost + self.spool.artifacts.lost
        if lost:
            logger.warning(
                "tracking: %s of run %s lost: the buffer in %s was full", plural(lost, "record"), self.id, spool_root()
            )
        if not delivered:
            logger.warning(
                "tracking: %s of run %s not delivered to %s, %d of them refused (%s); kept in %s. "
                "Upload them with: python -m pipeline.tracking upload",
                plural(left + rejected, "record"),
                self.id,
                redacted(self.uri),
                rejected,
                self.error or "refused",
                self.spool.folder,
            )
        return delivered and not lost

    def _pump(self, queue: Queue, send: Callable[[], bool]) -> None:
        """Delivers one queue until the run is closed. Retries every failure after a delay that doubles each time."""
        delay = 0.0
        while True:
            closing = self._closing.is_set()
            try:
                while send():
                    pass
                delay = 0.0
            except Exception as error:  # training continues despite any failure of the server
                if not delay:
                    logger.warning(
                        "%s: %s; records wait in %s", redacted(self.uri), first_line(error), self.spool.folder
                    )
                delay = min(RETRY_AT_MOST, delay * 2 or SEND_EVERY)
                self.error = first_line(error)
                self._attempts += 1
            live.publish({live.UNDELIVERED: self.spool.pending}, run=self.spool.header["name"])
            with self._progress:
                self._progress.notify_all()
            if closing:
                return
            with self._wake:
                # While the server is unreachable, `flush` must not shorten the delay: wait for the event, not the
                # condition.
                if not delay and not self._closing.is_set():
                    self._wake.wait(SEND_EVERY)
            if delay:
                self._closing.wait(delay)

    def _start(self) -> None:
        for queue, send in (
            (self.spool.metrics, self._delivery.send_metrics),
            (self.spool.artifacts, self._delivery.send_artifacts),
        ):
            thread = threading.Thread(target=self._pump, args=(queue, send), name="tracking", daemon=True)
            thread.start()
            self._threads.append(thread)


def status_of(error: BaseException | None) -> tuple[str, str]:
    """(status, reason) of a run whose `with` block ended with this exception. A requested stop is not a failure."""
    if error is None:
        return "FINISHED", ""
    if ended := ray_watch.ended():
        return "FAILED", ended
    if isinstance(error, KeyboardInterrupt | SystemExit):
        code = stops.exit_code(error)
        if code in STOPPED:
            return "KILLED", STOPPED[code]
        return ("FINISHED", "") if code in (None, 0) else ("FAILED", f"exit code {code}")
    return "FAILED", first_line(error)


def _split_places(values: Mapping[str, Any]) -> tuple[dict[str, str], dict[str, str]]:
    """(parameters, tags `place.<key>`) of a flat configuration. Paths, addresses and runs become tags."""
    parameters = {key: value for key, value in values.items() if not names.is_place(key)}
    places = {names.PLACE + key: value for key, value in values.items() if key not in parameters and value is not None}
    return _texts(parameters), _texts(places)


def _texts(values: Mapping[str, Any]) -> dict[str, str]:
    """Tags or parameters with names and values that MLflow accepts, and without passwords."""
    return {names.valid_name(key): redacted(names.valid_value(value)) for key, value in values.items()}


def start_run(
    experiment: str,
    name: str,
    *,
    config: Any = None,
    tags: Mapping[str, Any] | None = None,
    about: description.Description | None = None,
    run_id: str | None = None,
    parent_id: str | None = None,
    tracking_uri: str | None = None,
) -> Run:
    """Starts a run, or continues the run `run_id` without repeating points that it already has.

    config: a dataclass or mapping; it becomes flat parameters, tags (paths and addresses) and the artifact config.yaml.
    about: the description; with it, the name of the run ends in the first digits of its id, and the cost is added at
    the end. The commit, uncommitted changes and the environment are also recorded, except for child runs (`parent_id`).

    Raises UserError if the server rejects the credentials or the host name. If the server is unreachable, no error is
    raised: the run starts with an offline id and is delivered later.
    """
    code = {} if parent_id else environment.code_tags()
    own_tags = _texts(tags or {})
    spool = Spool(
        {
            "uri": resolve_tracking_uri(tracking_uri),
            "experiment": experiment,
            "name": names.valid_value(name),
            "tags": {**_origin(), **code, **own_tags, **({names.NOTE: about.text()} if about else {})},
            "described": about is not None,
            "run_id": run_id,
            "parent_id": parent_id,
            "start_time": int(time.time() * 1000),
        }
    )
    run = Run(spool, fill_gaps=run_id is not None, owner=True)
    plain = to_dict(config) if dataclasses.is_dataclass(config) and not isinstance(config, type) else dict(config or {})
    if run_id:
        values, places = _split_places(flatten(plain))
        spool.metrics.append({"kind": "resume", "params": values})
        run.set_tags({**code, **own_tags, **places})
        if about:
            run.describe((description.COMMAND,), description.command_paragraph())
    else:
        run.log_params(plain)
    if plain:
        run.log_text(redacted(yaml.safe_dump(plain, sort_keys=False)), "config.yaml")
    if not parent_id:
        if diff := environment.code_diff():
            run.log_text(diff, "code/diff.patch")
        run.log_dict(environment.machine(), "environment.json")
    _reach(run, announce=not parent_id)
    run._start()
    return run


def _origin() -> dict[str, str]:
    """Tags with the user, the program and the Ray job that started the run."""
    tags = {
        names.USER: environment.user(),
        names.SOURCE_NAME: os.path.basename(sys.argv[0] or "python"),
        names.SOURCE_TYPE: "LOCAL",
    }
    stage = {  # environment variables that pipeline.graph.runner sets for every stage
        names.PIPELINE_NAME: os.environ.get("VIT_PIPELINE"),
        names.PIPELINE_STAGE: os.environ.get("VIT_PIPELINE_STAGE"),
        names.PIPELINE_RUN: os.environ.get("VIT_PIPELINE_RUN"),
    }
    tags |= {name: value for name, value in stage.items() if value}
    job = os.environ.get("RAY_JOB_SUBMISSION_ID") or os.environ.get("RAY_JOB_ID")
    return tags | ({names.RAY_JOB: job} if job else {})


def _reach(run: Run, announce: bool) -> None:
    """Creates or finds the run on the server. Raises UserError if the server rejects
    the login; an unreachable server is only logged."""
    try:
        run._delivery.resolve()
    except UserError:
        run.spool.discard()
        raise
    except Exception as error:
        where = redacted(run.uri)
        if server.is_unauthorised(error):
            run.spool.discard()
            raise UserError(
                f"MLflow at {where} refused access: {first_line(error)}; set MLFLOW_TRACKING_USERNAME and "
                "MLFLOW_TRACKING_PASSWORD (or MLFLOW_TRACKING_TOKEN), and start the server with --allowed-hosts naming "
                "the host in this address"
            ) from error
        run.error = first_line(error)
        logger.warning(
            "tracking: %s is unreachable (%s); records are kept on disk and delivered later", where, run.error
        )
    else:
        if announce:
            header = run.spool.header
            note = server.note_of_default(header["uri"])
            logger.info("tracking: %s/%s run %s at %s%s", header["experiment"], header["name"], run.id, run.url, note)


def attach_run(run_id: str, tracking_uri: str, *, resume: bool = False) -> Run:
    """Opens an additional writer for a run that another process owns (system metrics of another node). `finish` only
    delivers.

    resume: skip steps that the run already has, as `start_run(run_id=...)` does.
    """
    header: dict[str, Any] = {
        "uri": resolve_tracking_uri(tracking_uri),
        "experiment": "",
        "name": "",
        "tags": {},
        "run_id": run_id,
        "parent_id": None,
        "start_time": 0,
    }
    run = Run(Spool(header), fill_gaps=resume, owner=False)
    run._start()
    return run
