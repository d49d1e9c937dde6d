"""Joining Ray: the one place that decides between embedded Ray, an existing cluster and a submitted job.

- inside `ray job submit`, RAY_ADDRESS and the working directory come from the job: `ray.init()` joins it;
- `--address auto|host:port` joins an existing cluster and ships this project to its workers;
- otherwise an embedded Ray on this machine, which ends with the process.
"""

import importlib.util
import logging
import os
import signal
import stat
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass

from pipeline import ray_state
from pipeline.errors import UserError

logger = logging.getLogger(__name__)

# Worker processes run the project from here (embedded), or from the package that Ray ships (cluster).
PROJECT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

# Non-secret settings that workers need and do not inherit from a remote driver. Credentials are not among them:
# nodes have their own (instance role, Kubernetes secret), and runtime_env is shown in the dashboard.
FORWARDED = (
    "AWS_ENDPOINT_URL",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "AWS_REQUEST_CHECKSUM_CALCULATION",
    "AWS_RESPONSE_CHECKSUM_VALIDATION",
    "MLFLOW_TRACKING_URI",
    "TORCH_EXTENSIONS_DIR",
    "VIT_STORE_PATIENCE",
)
STOP_RECORDS = 20
"""Seconds that a stopped job needs after its step is saved: for MLflow to hear why it ended."""
EXCLUDES = [".git", ".venv*", "runs", "mlruns", "mlflow.db*", "**/__pycache__", "docs", "tests/benchmarks/results"]


def submitted() -> bool:
    """Whether this process is the entrypoint of a Ray job."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def warn_of_short_stop(grace: float) -> None:
    """Warns when `ray job stop` would kill this job before it has saved its step, which may take `grace` seconds."""
    wait = os.environ.get("RAY_JOB_STOP_WAIT_TIME_S", "3")  # of Ray's job supervisor, whose environment a job inherits
    wanted = round(grace) + STOP_RECORDS
    if submitted() and wait.isdigit() and int(wait) < wanted:
        logger.warning(
            "`ray job stop` kills this job after %s s, perhaps before its step is saved: start the head with "
            'RAY_JOB_STOP_WAIT_TIME_S=%d, or submit with --runtime-env-json \'{"env_vars": '
            '{"RAY_JOB_STOP_WAIT_TIME_S": "%d"}}\'',
            wait,
            wanted,
            wanted,
        )


def runtime_env(ship_project: bool) -> dict:
    """Ray runtime_env of our workers; ships the project folder when they run on other machines."""
    env_vars = {name: os.environ[name] for name in FORWARDED if name in os.environ}
    if importlib.util.find_spec("torch") is not None:
        env_vars["PATH"] = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")])  # ninja
    if ship_project:
        return {"working_dir": PROJECT, "excludes": EXCLUDES, "env_vars": env_vars}
    path = [PROJECT, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {"env_vars": {**env_vars, "PYTHONPATH": os.pathsep.join(path)}}


@dataclass(kw_only=True, slots=True)
class Settings:
    """How this process joins Ray."""

    address: str | None = None
    """auto or host:port of a cluster; None: the submitted job's, or an embedded Ray."""
    num_cpus: int | None = None
    """CPUs of an embedded Ray; None: all of the machine."""
    dashboard: bool = True
    """Of an embedded Ray: its start costs some seconds of CPU time, and Ray Train needs it."""


_settings = Settings()


def configure(address: str | None = None, num_cpus: int | None = None, dashboard: bool = True) -> None:
    """Says how `connect` will join Ray. Jobs call it at their start; whatever has work for Ray then calls `connect`."""
    _settings.address, _settings.num_cpus, _settings.dashboard = address, num_cpus, dashboard


def connect() -> None:
    """Joins or starts Ray as configured, once per process, and logs which.

    What tasks and workers print stays in Ray's own logs: the jobs report progress and errors themselves.
    Raises UserError when Ray does not start, or the cluster at `address` cannot be joined.
    """
    import ray

    if ray.is_initialized():
        return
    address, num_cpus = _settings.address, _settings.num_cpus
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "120")
    stop = signal.getsignal(signal.SIGTERM)
    try:
        if submitted():
            ray.init(logging_level=logging.ERROR, log_to_driver=False)
            what = "this job's cluster"
        elif address:
            ray.init(
                address=address,
                runtime_env=runtime_env(ship_project=True),
                logging_level=logging.ERROR,
                log_to_driver=False,
            )
            what = f"the cluster at {address}"
        else:
            os.environ.setdefault("RAY_enable_metrics_collection", "0")  # its exporters would listen to every address
            ray.init(
                address="local",  # never whatever cluster an earlier session left in /tmp
                num_cpus=num_cpus,
                include_dashboard=_settings.dashboard,
                dashboard_host="127.0.0.1",
                runtime_env=runtime_env(ship_project=False),
                logging_level=logging.ERROR,
                log_to_driver=False,
            )
            what = "embedded Ray"
    except Exception as error:  # Ray raises bare ones, too
        if not address and not submitted():
            first = next(iter(str(error).splitlines()), type(error).__name__)
            raise UserError(
                f"Ray does not start on this machine: {first}; is it very busy, or its memory or disk full? Its logs are in "
                "/tmp/ray/session_latest/logs"
            ) from error
        raise UserError(
            f"cannot join Ray at {address or 'this job'}: {error}; check the address, and export RAY_AUTH_MODE=token "
            "with the cluster's token when it uses token authentication"
        ) from error
    if callable(stop) and threading.current_thread() is threading.main_thread():
        # Ray has put its own in place of the job's, which ends with the honest code.
        signal.signal(signal.SIGTERM, stop)
    protect_token()
    if address or submitted():
        announce({"CPU": 1})  # a head without CPUs, and nobody to bring others, would wait in silence
    resources = ray.cluster_resources()
    logger.info("ray: %s, %g CPUs, %g GPUs", what, resources.get("CPU", 0), resources.get("GPU", 0))


def protect_token() -> None:
    """Ray writes the cluster's token with the umask it finds; whoever reads it runs code here."""
    path = os.path.expanduser("~/.ray/auth_token")
    if os.path.isfile(path) and os.stat(path).st_uid == os.getuid() and stat.S_IMODE(os.stat(path).st_mode) & 0o077:
        os.chmod(path, 0o600)


# ---------------------------------------------------------------- room


@dataclass(frozen=True, kw_only=True, slots=True)
class Room:
    """How many bundles of resources the joined cluster holds: beside other jobs, and on all of its nodes."""

    free: int
    now: int


def room(bundle: Mapping[str, float]) -> Room:
    """Room for bundles, each of which has to fit on one node, on the nodes that there are."""
    import ray

    nodes = [node for node in ray.nodes() if node["Alive"]]
    available = ray_state.available_resources_per_node()
    return Room(
        free=sum(_fit(available.get(node["NodeID"], {}), bundle) for node in nodes),
        now=sum(_fit(node["Resources"], bundle) for node in nodes),
    )


def _fit(resources: Mapping[str, float], bundle: Mapping[str, float]) -> int:
    return min((int(resources.get(name, 0) / amount + 1e-6) for name, amount in bundle.items() if amount), default=0)


def announce(bundle: Mapping[str, float], count: int = 1) -> None:
    """Says on stderr what a job will wait for before it starts: other jobs, or nodes; and, as soon as the autoscaler knows it,
    that these nodes will never come."""
    here = room(bundle)
    want = f"{count} x ({', '.join(f'{amount:g} {name}' for name, amount in bundle.items())})"
    if here.free >= count:
        return
    if here.now >= count:
        logger.warning("waiting for %s: other jobs leave room for %d", want, here.free)
        return
    logger.warning(
        "waiting for %s: the cluster has room for %d; the job starts when an autoscaler, or you, add more",
        want,
        here.now,
    )
    threading.Thread(target=_watch_for_never, args=(dict(bundle), count, want), daemon=True).start()


def _watch_for_never(bundle: dict[str, float], count: int, want: str) -> None:
    """Until there is room, asks the autoscaler (v2) whether it has given the request up; says so once."""
    try:
        while room(bundle).now < count:
            if infeasible(bundle):
                logger.warning(
                    "waiting for %s: the autoscaler can never add them. Raise max_workers of a node type that has them (or "
                    "maxReplicas), or stop this job and ask for less",
                    want,
                )
                return
            time.sleep(2)
    except Exception:  # the job ended, and Ray with it
        return


def infeasible(bundle: Mapping[str, float]) -> bool:
    """Whether a request with such a bundle is among those that the autoscaler says it can never serve."""
    return any(
        all(abs(request.get(name, 0) - amount) < 1e-6 for name, amount in bundle.items())
        for request in ray_state.infeasible_requests()
    )
