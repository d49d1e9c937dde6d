"""Runs: what the jobs log through. Nothing here ever waits for the tracking server longer than `start_run` does.

`start_run` tries to create the run at once. When the server cannot be reached, the run starts all the same under an
`offline-…` id, everything goes to the spool (`pipeline.tracking.spool`), and two background threads deliver it
(`pipeline.tracking.delivery`), in batches and in order, as soon as the server answers. What is still undelivered at the end
stays on disk, and the end says so and how to upload it: `python -m pipeline.tracking upload`.
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
from pipeline.config import flatten, to_dict
from pipeline.credentials import redacted
from pipeline.errors import UserError
from pipeline.tracking import description, environment, names, server
from pipeline.tracking.delivery import Delivery
from pipeline.tracking.server import first_line, resolve_tracking_uri, run_url
from pipeline.tracking.spool import Queue, Spool, offline_id, spool_root

SEND_EVERY = 1.0  # seconds between deliveries while all is well
RETRY_AT_MOST = 30.0  # seconds between attempts while the server is away
LAST_DELIVERY = 60.0  # seconds that `finish` gives the delivery of what is left
LAST_DELIVERY_OF_A_STOP = 15.0  # the same after SIGTERM and Ctrl-C, whose senders wait about 30 seconds
STOPPED: dict[int | str | None, str] = {
    128 + signal.SIGINT: "stopped with Ctrl-C",
    128 + signal.SIGTERM: "stopped with SIGTERM",
    128 + signal.SIGHUP: "stopped because its terminal was closed (SIGHUP)",
}
"""Exit codes that `config.run_job` makes of signals, as reasons."""

logger = logging.getLogger(__name__)


class Run:
    """One MLflow run, open for writing. Made by `start_run` or `attach_run`; every method returns at once."""

    def __init__(self, spool: Spool, *, fill_gaps: bool, owner: bool):
        self.spool = spool
        self._delivery = Delivery(spool, fill_gaps=fill_gaps)
        self._owner = owner  # only the owner ends the run
        self._nonfinite: dict[str, tuple[int, int]] = {}  # metric: (count, first step)
        self._last: dict[str, tuple[int, float]] = {}  # metric: the point logged last
        self._costs: dict[str, float] = {}  # over all attempts, as logged
        self._started = time.monotonic()
        self._finished = False
        self._closing = threading.Event()
        self._wake = threading.Condition()  # towards the pumps: deliver now
        self._progress = threading.Condition()  # from the pumps: something was delivered, or failed
        self._attempts = 0  # deliveries that failed so far
        self._threads: list[threading.Thread] = []
        self.error = ""  # of the last delivery that failed; empty while all is well

    @property
    def id(self) -> str:
        """MLflow's run id, or `offline-…` until the server has been reached; both are good for `run_id=` later."""
        return self._delivery.run_id or self.spool.header["run_id"] or offline_id(self.spool.id)

    @property
    def uri(self) -> str:
        return self._delivery.uri

    def started(self) -> float:
        """When the run began, in epoch seconds. Asks the server, and raises what that raises."""
        self._delivery.resolve()
        return self._delivery.started

    @property
    def url(self) -> str:
        return run_url(self.uri, self._delivery.experiment, self.id)

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        status, reason = _status_of(error)
        self.finish(status, reason=reason)

    # -------- what the jobs log

    def log(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """Metrics of one step. NaN and infinities are counted under nonfinite/<name> and tagged, not stored."""
        values = {names.valid_name(name): float(value) for name, value in metrics.items()}
        # MLflow's charts over another metric (images seen) pair points by position: one twice at a step shifts all after it.
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
        """Costs of this attempt (names `cost/...`); those of earlier attempts of the run are added to them."""
        totals = {name: value + self._delivery.costs.get(name, 0.0) for name, value in costs.items()}
        self._costs |= totals
        self.log(totals)

    def log_energy(self) -> None:
        """The energy that the GPUs of all nodes have used, as far as it could be read and the server has it."""
        with contextlib.suppress(Exception):
            metrics = self.metrics().items()
            nodes = [v for name, v in metrics if name.startswith(names.SYSTEM) and name.endswith(names.NODE_ENERGY)]
            if nodes:
                self._costs[names.ENERGY_KWH] = sum(nodes)
                self.log({names.ENERGY_KWH: sum(nodes)})

    def metrics(self) -> dict[str, float]:
        """The newest value of every metric, as the server has them. Raises what asking it raises."""
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
        """Parameters beyond the configuration that `start_run` logged; nested ones are flattened to a.b.c.

        Paths and addresses become tags: they differ between runs that are the same.
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
        """A JSON artifact, or YAML when `path` ends so."""
        yaml_wanted = path.endswith((".yaml", ".yml"))
        self.log_text(yaml.safe_dump(value, sort_keys=False) if yaml_wanted else json.dumps(value, indent=1), path)

    def log_figure(self, figure: Any, path: str) -> None:
        """A matplotlib figure, in the format that the path's ending names."""
        buffer = io.BytesIO()
        figure.savefig(buffer, format=os.path.splitext(path)[1][1:] or "png", bbox_inches="tight")
        self.log_bytes(buffer.getvalue(), path)

    def log_dataset(
        self, uri: str, manifest: Mapping[str, Any], role: str = "train", made: bool = False, linked: bool = True
    ) -> None:
        """A dataset that the run reads: an MLflow input, fingerprint tags, its manifest, and a link to its prepare run.

        made: the run is that prepare run. Others find it by the fingerprint, wherever the dataset has been copied to.
        linked: False leaves out the manifest and the link, of a run that reads dozens.
        """
        text = json.dumps(manifest, sort_keys=True, default=str)
        digest = str(manifest.get("fingerprint") or hashlib.sha256(text.encode()).hexdigest()[:12])
        rows = manifest.get("rows") or manifest.get("num_rows") or (manifest.get("totals") or {}).get("rows")
        dataset = {
            "name": names.valid_value("/".join(uri.rstrip("/").rsplit("/", 2)[-2:]))[: names.MAX_NAME],
            "digest": digest[:36],
            "source_type": "s3" if uri.startswith("s3://") else "local",
            "source": json.dumps({"uri": names.valid_value(uri)}),
            "profile": json.dumps({"num_rows": rows}),
        }
        self.spool.metrics.append({"kind": "dataset", "role": names.valid_value(role), "dataset": dataset})
        self.set_tags({f"{names.DATA_URI}.{role}": uri, f"{names.DATA_FINGERPRINT}.{role}": digest})
        if linked or made:
            self.log_text(text, f"data/{role.replace('/', '_')}-manifest.json")
        if linked and not made:
            self.spool.metrics.append({"kind": "link", "role": "prepare", "digest": digest[:36]})

    def link(self, role: str, run_id: str) -> None:
        """Lineage: this run was made from that one (role: prepare, pretrain, transfer), whose own sources come along."""
        self.spool.metrics.append({"kind": "link", "role": role, "run_id": run_id})

    # -------- delivery and end

    def flush(self, timeout: float = 30.0) -> bool:
        """Waits until everything logged so far is on the server; False when it is unreachable or the time is up."""
        deadline, attempts = time.monotonic() + timeout, self._attempts
        while self.spool.pending and self._attempts == attempts and time.monotonic() < deadline:
            with self._wake:
                self._wake.notify_all()
            with self._progress:
                self._progress.wait(0.05)
        return self.spool.pending == 0

    def finish(self, status: str = "FINISHED", timeout: float | None = None, *, reason: str = "") -> bool:
        """Ends the run as FINISHED, FAILED or KILLED and delivers what is left; True when the server has everything.

        reason: why it failed or was stopped, for its tag and its description. timeout: seconds for the delivery. What the
        server could not take stays on disk, and a warning says how much and how to upload it.
        """
        if self._finished:
            return True
        self._finished = True
        if timeout is None:
            timeout = LAST_DELIVERY_OF_A_STOP if status == "KILLED" else LAST_DELIVERY
        if self._owner:
            if not self.spool.header["parent_id"]:  # a child is written when its work is done: its owner knows the time
                self.log_cost({names.SECONDS: time.monotonic() - self._started})
            if self.spool.header.get("described"):
                self.describe((description.COST,), description.cost_paragraph(self._costs))
            lost = self.spool.metrics.lost + self.spool.artifacts.lost
            if lost:
                self.set_tags({"lost": f"{lost} records found no room in the buffer"})
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
                "tracking: %d records of run %s were lost: the buffer in %s was full", lost, self.id, spool_root()
            )
        if not delivered:
            logger.warning(
                "tracking: %d records of run %s were not delivered to %s, %d of them refused (%s); they are kept in %s. "
                "Upload them with: python -m pipeline.tracking upload",
                left + rejected,
                self.id,
                redacted(self.uri),
                rejected,
                self.error or "refused",
                self.spool.folder,
            )
        return delivered and not lost

    def _pump(self, queue: Queue, send: Callable[[], bool]) -> None:
        """Delivers one queue until the run is closed. Any failure waits (longer each time) and tries again."""
        delay = 0.0
        while True:
            closing = self._closing.is_set()
            try:
                while send():
                    pass
                delay = 0.0
            except Exception as error:  # whatever happens to the server, training goes on
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
                # While the server is away nobody's flush may hurry us: wait on the event, not on the condition.
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


def _status_of(error: BaseException | None) -> tuple[str, str]:
    """The final status and reason of a run whose `with` block raised this exception; a requested stop is not a failure."""
    if error is None:
        return "FINISHED", ""
    if isinstance(error, KeyboardInterrupt):
        return "KILLED", STOPPED[128 + signal.SIGINT]
    if isinstance(error, SystemExit):  # `config.run_job` makes one of SIGTERM
        if error.code in (None, 0):
            return "FINISHED", ""
        if error.code in STOPPED:
            return "KILLED", STOPPED[error.code]
        return "FAILED", f"exit code {error.code}"
    return "FAILED", first_line(error)


def _split_places(values: Mapping[str, Any]) -> tuple[dict[str, str], dict[str, str]]:
    """(parameters, tags `place.<key>`) of a flat config: what names a path, an address or a run is no parameter."""
    parameters = {key: value for key, value in values.items() if not names.is_place(key)}
    places = {names.PLACE + key: value for key, value in values.items() if key not in parameters and value is not None}
    return _texts(parameters), _texts(places)


def _texts(values: Mapping[str, Any]) -> dict[str, str]:
    """Tags or parameters as MLflow accepts them; an address in them shows no password."""
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
    """Starts a run, or continues `run_id` (its points are not repeated: a step it already has is dropped).

    config: a dataclass or mapping; becomes flat parameters, tags (paths and addresses) and the artifact config.yaml.
    about: the description; with one, the run's name ends in the first digits of its id, and the cost joins at the end.
    The commit, an uncommitted diff and the environment are recorded too, except for children (`parent_id`).
    Raises UserError when the server refuses us (credentials, host name): that needs a person. A server that cannot be
    reached raises nothing: the run starts under an offline id and is delivered later.
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
    """Tags that say who started the run with which program, and in which Ray job."""
    tags = {
        names.USER: environment.user(),
        names.SOURCE_NAME: os.path.basename(sys.argv[0] or "python"),
        names.SOURCE_TYPE: "LOCAL",
    }
    stage = {  # set by pipeline.graph.runner for each of its stages
        names.PIPELINE_NAME: os.environ.get("VIT_PIPELINE"),
        names.PIPELINE_STAGE: os.environ.get("VIT_PIPELINE_STAGE"),
        names.PIPELINE_RUN: os.environ.get("VIT_PIPELINE_RUN"),
    }
    tags |= {name: value for name, value in stage.items() if value}
    job = os.environ.get("RAY_JOB_SUBMISSION_ID") or os.environ.get("RAY_JOB_ID")
    return tags | ({names.RAY_JOB: job} if job else {})


def _reach(run: Run, announce: bool) -> None:
    """Creates or finds the run on the server. Raises UserError when the server refuses us; one that is away is only logged."""
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
                f"MLflow at {where} refuses us: {first_line(error)}; set MLFLOW_TRACKING_USERNAME and "
                "MLFLOW_TRACKING_PASSWORD (or MLFLOW_TRACKING_TOKEN), and start the server with --allowed-hosts naming "
                "the host in this address"
            ) from error
        run.error = first_line(error)
        logger.warning("tracking: %s cannot be reached (%s); recording on disk and delivering later", where, run.error)
    else:
        if announce:
            header = run.spool.header
            logger.info("tracking: %s/%s run %s at %s", header["experiment"], header["name"], run.id, run.url)


def attach_run(run_id: str, tracking_uri: str, *, resume: bool = False) -> Run:
    """Another writer into a run that someone else owns (system metrics of another node): `finish` only delivers.

    resume: steps that the run already has are dropped, as `start_run(run_id=...)` does.
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
