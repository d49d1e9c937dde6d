"""Joining Ray: the one place that decides between embedded Ray, an existing cluster and a submitted job.

- inside `ray job submit`, RAY_ADDRESS and the working directory come from the job: `ray.init()` joins it;
- `--address auto|host:port` joins an existing cluster and ships this project to its workers;
- otherwise an embedded Ray on this machine, which ends with the process.
"""

import contextlib
import importlib.util
import logging
import os
import re
import signal
import stat
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import psutil

from pipeline import host_memory, ray_state
from pipeline.errors import NotStarted, UserError

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
    "GOOGLE_CLOUD_PROJECT",
    "STORAGE_EMULATOR_HOST",
    "MLFLOW_TRACKING_URI",
    "TORCH_EXTENSIONS_DIR",
    "VIT_STORE_PATIENCE",
)
STOP_RECORDS = 20
"""Seconds that a stopped job needs after its step is saved: for MLflow to hear why it ended."""
MEMORY_REMEDY = "fewer processes at a time need less"
OUT_OF_MEMORY_RETRIES = "5"
"""Retries of a task whose node ran out of host memory, with growing pauses; by default Ray retries forever."""
STOPS = {signal.SIGTERM, signal.SIGHUP}
"""Signals that ask a job to end. SIGINT is not among them: Ray itself keeps it from its processes."""
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
    memory_remedy: str = MEMORY_REMEDY
    """What helps this job when a node runs out of host memory."""


_settings = Settings()


def configure(
    address: str | None = None, num_cpus: int | None = None, dashboard: bool = True, memory_remedy: str = ""
) -> None:
    """Sets how `connect` joins Ray. Jobs call it at their start; code with work for Ray then calls `connect`.

    memory_remedy: what helps this job when a node runs out of host memory. Raises UserError for fewer CPUs than one."""
    if num_cpus is not None and num_cpus < 1:
        raise UserError(f"--num-cpus must be at least 1, not {num_cpus}")
    _settings.address, _settings.num_cpus, _settings.dashboard = address, num_cpus, dashboard
    _settings.memory_remedy = memory_remedy or MEMORY_REMEDY


def memory_remedy() -> str:
    """What helps this job when a node runs out of host memory."""
    return _settings.memory_remedy


def connect() -> None:
    """Joins or starts Ray as configured, once per process, and logs which.

    What tasks and workers print stays in Ray's own logs: the jobs report progress and errors themselves.
    Raises UserError when Ray does not start, or the cluster at `address` cannot be joined.
    """
    import ray

    if ray.is_initialized():
        return
    address = _settings.address
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "120")
    os.environ.setdefault("RAY_task_oom_retries", OUT_OF_MEMORY_RETRIES)
    ray_state.take_messages(report_message)
    try:
        what = _join()
    except Exception as error:  # Ray raises bare ones, too
        if not address and not submitted():
            first = next(iter(str(error).splitlines()), type(error).__name__)
            raise NotStarted(
                f"Ray does not start on this machine: {first}; is it very busy, or its memory or disk full? Its logs are in "
                "/tmp/ray/session_latest/logs"
            ) from error
        raise UserError(
            f"cannot join Ray at {address or 'this job'}: {error}; check the address, and export RAY_AUTH_MODE=token "
            "with the cluster's token when it uses token authentication"
        ) from error
    protect_token()
    if address or submitted():
        announce({"CPU": 1})  # a head without CPUs, and nobody to bring others, would wait in silence
    resources = ray.cluster_resources()
    logger.info("ray: %s, %g CPUs, %g GPUs", what, resources.get("CPU", 0), resources.get("GPU", 0))


def report_message(message: str) -> None:
    """One line for a message of Ray's about its processes."""
    if out_of_memory := host_memory.describe(message):
        logger.warning("%s; its work is done again. %s", out_of_memory, _settings.memory_remedy)
    elif "A worker died" in message:
        process = re.search(r"Worker PID: (\d+)", message)
        where = re.search(r"Worker IP address: (\S+)", message)
        logger.warning(
            "process %s on %s ended (killed, crashed, or its node out of memory); its work is done again",
            process[1] if process else "of a task",
            where[1] if where else "a node",
        )
    else:
        logger.debug("ray: %s", message)


def _join() -> str:
    """Calls `ray.init` according to the settings. Returns a description of the cluster for the log."""
    import ray

    address = _settings.address
    if submitted():
        with _own_signals():
            ray.init(logging_level=logging.ERROR, log_to_driver=False)
        return "this job's cluster"
    if address:
        with _own_signals():
            shipped = runtime_env(ship_project=True)
            ray.init(address=address, runtime_env=shipped, logging_level=logging.ERROR, log_to_driver=False)
        return f"the cluster at {address}"
    os.environ.setdefault("RAY_enable_metrics_collection", "0")  # its exporters would listen to every address
    before = psutil.Process().children()
    with ray_state.on_loopback(), _block_stop_signals(), _own_signals():
        ray.init(
            address="local",  # never whatever cluster an earlier session left in /tmp
            num_cpus=_settings.num_cpus,
            include_dashboard=_settings.dashboard,
            dashboard_host="127.0.0.1",
            runtime_env=runtime_env(ship_project=False),
            logging_level=logging.ERROR,
            log_to_driver=False,
        )
    _embedded[:] = [child for child in psutil.Process().children() if child not in before]
    return "embedded Ray"


_embedded: list[psutil.Process] = []
"""The processes of the embedded Ray that this process has started."""


@contextlib.contextmanager
def _own_signals() -> Iterator[None]:
    """Restores the job's SIGTERM handler, which `ray.init` replaces: it saves and exits with the documented code."""
    stop = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if callable(stop) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, stop)


@contextlib.contextmanager
def _block_stop_signals() -> Iterator[None]:
    """Blocks SIGTERM and SIGHUP in all processes that are started inside, and in their children.

    `timeout`, a closed terminal, systemd and Slurm signal all processes of a job. Ray would then end before the workers
    have saved their step, so this process alone handles the signal. SIGKILL still ends the others.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def disconnect() -> None:
    """Leaves Ray, and ends an embedded one. Does nothing in a process that has not joined."""
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return
    # Ray sends SIGTERM, which its processes block, and waits a second for each.
    kill = threading.Timer(0.5, _kill, [[family for child in _embedded for family in _descent(child)]])
    kill.daemon = True
    kill.start()
    ray.shutdown()
    kill.join()
    _embedded.clear()


def _descent(process: psutil.Process) -> list[psutil.Process]:
    with contextlib.suppress(psutil.Error):
        return [process, *process.children(recursive=True)]
    return []


def _kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.kill()


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
