"""Executor that runs stages as Ray jobs on a cluster. Each has a name and a log, and can be stopped separately:

ray job list               all stages by pipeline and name (submission id and metadata)
ray job logs --follow ID
ray job stop ID
"""

import contextlib
import json
import logging
import os
import re
import shlex
import time
from typing import Any

from pipeline import cluster, storage
from pipeline.credentials import forwarded
from pipeline.errors import TRY_LATER, Unavailable, UserError
from pipeline.graph.executor import Attempt, Ended, last_error

logger = logging.getLogger(__name__)

PATIENCE = 900.0
"""Seconds to wait for a job server that does not answer. The restart of a head takes minutes."""
GB = 1 << 30
STOP_WAIT = "RAY_JOB_STOP_WAIT_TIME_S"
STOP_SECONDS = "60"
"""Seconds until Ray kills a stopped stage, as on the heads of infra/; Ray's default of 3 is too short to save a step."""


class RayJobs:
    """Executor on a Ray cluster, through its job server."""

    pause = 1.0
    cpus = float("inf")
    gpus = float("inf")

    def __init__(self, address: str | None) -> None:
        """address: http(s)://host:port of the job server; auto, or None inside a submitted job, means RAY_ADDRESS.

        Raises UserError if the server cannot be reached or refuses access, Unavailable if it is restarting.
        """
        from ray.job_submission import JobSubmissionClient  # takes seconds to import

        try:
            if address not in (None, "auto"):  # RAY_ADDRESS takes precedence over the argument
                os.environ["RAY_API_SERVER_ADDRESS"] = address
            logging.getLogger("ray").setLevel(logging.WARNING)  # Ray logs a line for each excluded file
            self._client = JobSubmissionClient()
            self._client.list_jobs()
        except Exception as error:  # Ray raises RuntimeError, ConnectionError and others
            first = _first(error) or type(error).__name__
            kind = Unavailable if _is_restarting(error) else UserError
            raise kind(
                f"no Ray job server at {address or 'this cluster'}: {first}; check the address (http://HEAD:8265), and "
                "export RAY_AUTH_MODE=token with the cluster's token when it uses token authentication"
            ) from error
        self._away_since: float | None = None
        self._uncertain: dict[str, str] = {}
        """{job: error} of submissions without an answer: the server may have accepted them."""
        self._environment: dict[str, Any] | None = None

    def start(self, attempt: Attempt) -> None:
        """Submits an attempt unless a job with its name exists. Ray may place its entry point on any node."""
        if self._environment is None:
            self._environment = _runtime_env()
        environment = {**self._environment}
        environment["env_vars"] = {**environment.get("env_vars", {}), **attempt.environment}
        in_package = "working_dir" in environment
        script = attempt.words[0] if in_package else os.path.join(cluster.PROJECT, attempt.words[0])
        pipeline, _, stage = attempt.title.partition("/")
        try:
            self._client.submit_job(
                entrypoint=shlex.join(["python", script, *attempt.words[1:]]),
                submission_id=attempt.job,
                runtime_env=environment,
                metadata={"name": attempt.title, "job_name": attempt.title, "pipeline": pipeline, "stage": stage},
                # Memory instead of CPUs: a CPU of the entry point would not be available to its own tasks.
                entrypoint_memory=round(attempt.memory * GB),
            )
        except Exception as error:
            if not self._exists(attempt.job):
                if not isinstance(error, OSError) and not _is_restarting(error):
                    raise UserError(f"the cluster does not accept the stage {attempt.title}: {error}") from error
                self._uncertain[attempt.job] = _first(error)

    def _exists(self, job: str) -> bool:
        try:
            self._client.get_job_status(job)
            return True
        except Exception:
            return False

    def look(self, job: str, log: str) -> Ended | None:
        """Returns the end of an attempt; None while it is running or the server does not answer.

        Raises Unavailable if the server does not answer for `PATIENCE` seconds.
        """
        from ray.job_submission import JobStatus

        try:
            info = self._client.get_job_info(job)
        except RuntimeError as error:
            if "does not exist" in str(error) or "status code 404" in str(error):
                if job in self._uncertain:
                    return Ended(code=TRY_LATER, reason=f"the cluster did not accept it: {self._uncertain.pop(job)}")
                return Ended(code=None, reason="the cluster does not know the job; its head was restarted")
            self._is_away(error)
            return None
        except OSError as error:
            self._is_away(error)
            return None
        self._away_since = None
        self._uncertain.pop(job, None)
        if info.status not in (JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.STOPPED):
            return None
        text = self._log(job)
        with contextlib.suppress(UserError, OSError):
            storage.write_bytes(log, text.encode())
        seconds = (info.end_time - info.start_time) / 1000 if info.end_time and info.start_time else None
        if info.status == JobStatus.SUCCEEDED:
            return Ended(code=0, seconds=seconds)
        if info.status == JobStatus.STOPPED:
            return Ended(code=143, reason="stopped", seconds=seconds)
        code = info.driver_exit_code
        reason = last_error(text) if code is not None else _first(info.message)
        return Ended(
            code=None if code in (None, -9, 137) else code, reason=reason or _first(info.message), seconds=seconds
        )

    def _log(self, job: str) -> str:
        try:
            return self._client.get_job_logs(job)
        except Exception as error:  # the node of the entry point is lost, and its log with it
            logger.debug("log of %s: %s", job, error)
            return "the log of this attempt was lost with its node\n"

    def _is_away(self, error: Exception) -> None:
        now = time.monotonic()
        if self._away_since is None:
            self._away_since = now
            logger.warning("the job server does not answer (%s); waiting for it", _first(error))
        if now - self._away_since > PATIENCE:
            raise Unavailable(
                f"the job server has not answered for {PATIENCE / 60:.0f} minutes ({_first(error)}); the same command "
                "continues when it is back"
            )

    def stop(self, job: str) -> None:
        """Asks Ray to stop the job: SIGTERM, and SIGKILL some seconds later."""
        with contextlib.suppress(Exception):
            self._client.stop_job(job)

    def forget(self, job: str) -> None:
        """Does nothing: the cluster keeps a list of its jobs."""


def _is_restarting(error: Exception) -> bool:
    """Whether a proxy reports that the job server is away, or the server that its agent is not ready."""
    return bool(re.search(r"status code 50[234]\b|\b50[234] Server Error|No available agent", str(error)))


def _first(error: Any) -> str:
    return next(iter(str(error or "").strip().splitlines()), "")[:300]


def _runtime_env() -> dict[str, Any]:
    """The runtime environment of the stages: the package of this job, the folder of the project, or (in an image)
    nothing to ship."""
    submitted = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") or "{}").get("runtime_env") or {}
    variables = {
        STOP_WAIT: os.environ.get(STOP_WAIT, STOP_SECONDS),
        **submitted.get("env_vars", {}),
        **forwarded(cluster.FORWARDED),
    }
    if cluster.is_ray_job():
        kept = ("working_dir", "py_modules", "pip", "uv", "conda", "container", "image_uri")
        return {**{key: submitted[key] for key in kept if submitted.get(key)}, "env_vars": variables}
    return {"working_dir": cluster.PROJECT, "excludes": cluster.EXCLUDES, "env_vars": variables}


def is_wanted(address: str | None) -> bool:
    """Whether stages run as Ray jobs: with an address, or if this process is itself a Ray job."""
    return address is not None or cluster.is_ray_job()
