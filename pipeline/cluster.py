"""Connects to Ray: a submitted job, an existing cluster, or an embedded Ray.

- Inside `ray job submit`, RAY_ADDRESS and the working directory come from the job, and `ray.init()` joins its cluster.
- `--address auto|host:port` joins an existing cluster and sends this project to its workers.
- Otherwise an embedded Ray is started on this machine. It ends with the process."""

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

from pipeline import host_memory, ray_state, ray_watch, stops
from pipeline.credentials import forwarded
from pipeline.errors import NotStarted, NotStartedInTime, UserError

logger = logging.getLogger(__name__)

# Workers run the project from here (embedded Ray), or from the package that Ray sends (cluster).
PROJECT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

# Non-secret settings that workers need but do not inherit from a remote driver. Credentials are excluded: nodes have
# their own (instance role, Kubernetes secret), and the dashboard shows runtime_env.
FORWARDED = (
    "AWS_ENDPOINT_URL",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "AWS_REQUEST_CHECKSUM_CALCULATION",
    "AWS_RESPONSE_CHECKSUM_VALIDATION",
    "AZURE_STORAGE_ACCOUNT_NAME",
    "GOOGLE_CLOUD_PROJECT",
    "HF_ENDPOINT",
    "STORAGE_EMULATOR_HOST",
    "MLFLOW_TRACKING_URI",
    "TORCH_EXTENSIONS_DIR",
    "VIT_STORE_PATIENCE",
)
STOP_RECORDS = 20
"""Seconds that a stopped job needs after saving its step, to send the reason to MLflow."""
MEMORY_REMEDY = "run fewer processes in parallel"
OUT_OF_MEMORY_RETRIES = "5"
"""Retries of a task whose node ran out of host memory, with growing pauses; by default Ray retries forever."""
EMBEDDED_STARTS = 3
"""Attempts to start an embedded Ray whose processes do not start in time."""
STOPS = {signal.SIGTERM, signal.SIGHUP}
"""Signals that stop a job. SIGINT is not listed, because Ray does not pass it to its processes."""
EXCLUDES = [".git", ".venv*", "runs", "mlruns", "mlflow.db*", "**/__pycache__", "docs", "tests/benchmarks/results"]


def is_ray_job() -> bool:
    """Whether this process is the entrypoint of a Ray job."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def warn_of_short_stop(grace: float) -> None:
    """Warns if `ray job stop` would kill this job before it has saved its step, which may take `grace` seconds."""
    wait = os.environ.get("RAY_JOB_STOP_WAIT_TIME_S", "3")  # the job inherits the environment of Ray's job supervisor
    wanted = round(grace) + STOP_RECORDS
    if is_ray_job() and wait.isdigit() and int(wait) < wanted:
        logger.warning(
            "`ray job stop` kills this job after %s s, perhaps before its step is saved: start the head with "
            'RAY_JOB_STOP_WAIT_TIME_S=%d, or submit with --runtime-env-json \'{"env_vars": '
            '{"RAY_JOB_STOP_WAIT_TIME_S": "%d"}}\'',
            wait,
            wanted,
            wanted,
        )


def runtime_env(ship_project: bool) -> dict:
    """The runtime_env of workers. Includes the project folder if they run on other machines."""
    env_vars = forwarded(FORWARDED)
    if importlib.util.find_spec("torch") is not None:
        env_vars["PATH"] = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")])  # ninja
    if ship_project:
        return {"working_dir": PROJECT, "excludes": EXCLUDES, "env_vars": env_vars}
    path = [PROJECT, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {"env_vars": {**env_vars, "PYTHONPATH": os.pathsep.join(path)}}


@dataclass(kw_only=True, slots=True)
class Settings:
    """How this process connects to Ray."""

    address: str | None = None
    """auto, or host:port of a cluster. None: the cluster of the submitted job, or an embedded Ray."""
    num_cpus: int | None = None
    """CPUs of an embedded Ray. None: all CPUs of the machine."""
    dashboard: bool = True
    """Whether an embedded Ray starts its dashboard and two monitors, which take seconds of CPU time; Ray Train needs them."""
    memory_remedy: str = MEMORY_REMEDY
    """What helps this job when a node runs out of host memory."""


_settings = Settings()


def configure(
    address: str | None = None, num_cpus: int | None = None, dashboard: bool = True, memory_remedy: str = ""
) -> None:
    """Sets how `connect` connects to Ray. Jobs call it at their start; code that needs Ray then calls `connect`.

    memory_remedy: advice for the case that a node runs out of host memory. Raises UserError for fewer than one CPU."""
    if num_cpus is not None and num_cpus < 1:
        raise UserError(f"--num-cpus must be at least 1, not {num_cpus}")
    _settings.address, _settings.num_cpus, _settings.dashboard = address, num_cpus, dashboard
    _settings.memory_remedy = memory_remedy or MEMORY_REMEDY


def memory_remedy() -> str:
    """What helps this job when a node runs out of host memory."""
    return _settings.memory_remedy


def connect() -> None:
    """Joins or starts Ray as configured, once per process, and logs the cluster.

    The output of tasks and workers stays in Ray's logs, because the jobs report progress and errors themselves. Raises
    UserError if Ray does not start or the cluster at `address` cannot be joined."""
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
    except NotStartedInTime:
        raise
    except Exception as error:  # Ray also raises plain exceptions
        if not address and not is_ray_job():
            first = next(iter(str(error).splitlines()), type(error).__name__).rstrip(".")
            raise NotStarted(
                f"Ray does not start on this machine: {first}; its logs are in /tmp/ray/session_latest/logs"
            ) from error
        raise UserError(_why_not_joined(address, error)) from error
    protect_token()
    if address or is_ray_job():
        log_waiting({"CPU": 1})  # a head without CPUs and without other nodes would wait silently
    resources = ray.cluster_resources()
    logger.info("ray: %s, %g CPUs, %g GPUs", what, resources.get("CPU", 0), resources.get("GPU", 0))


def _why_not_joined(address: str | None, error: Exception) -> str:
    """One line about a cluster that cannot be joined, with the remedy."""
    given = os.environ.get("RAY_ADDRESS", "auto") if address == "auto" else address or "this job"
    if given.startswith(("http://", "https://")):
        source = " (RAY_ADDRESS)" if address == "auto" else ""
        return (
            f"cannot join Ray at {given}{source}: this is the address of its job server; start the command as a Ray job, "
            "with `ray job submit --working-dir . --` before it and without --address"
        )
    first = next(iter(str(error).splitlines()), type(error).__name__)
    return (
        f"cannot join Ray at {given}: {first}; check the address, and export RAY_AUTH_MODE=token with the cluster's "
        "token when it uses token authentication"
    )


def report_message(message: str) -> None:
    """Logs a message of Ray about its processes as one line."""
    if out_of_memory := host_memory.describe_out_of_memory(message):
        logger.warning("%s; its work is repeated. %s", out_of_memory, _settings.memory_remedy)
    elif "A worker died" in message:
        process = re.search(r"Worker PID: (\d+)", message)
        where = re.search(r"Worker IP address: (\S+)", message)
        logger.warning(
            "process %s on %s ended (killed, crashed, or its node out of memory); its work is repeated",
            process[1] if process else "of a task",
            where[1] if where else "a node",
        )
    else:
        logger.debug("ray: %s", message)


def _join() -> str:
    """Calls `ray.init` according to the settings. Returns a description of the cluster for the log."""
    import ray

    address = _settings.address
    if is_ray_job():
        with _keep_signal_handler():
            ray.init(logging_level=logging.ERROR, log_to_driver=False)
        return "this job's cluster"
    if address:
        with _keep_signal_handler():
            shipped = runtime_env(ship_project=True)
            ray.init(address=address, runtime_env=shipped, logging_level=logging.ERROR, log_to_driver=False)
        return f"the cluster at {address}"
    _start_embedded()
    return "embedded Ray"


def _start_embedded() -> None:
    """Starts Ray on this machine. Starts it again if it was too slow: Ray waits only 30 s for its own processes."""
    import ray

    os.environ.setdefault("RAY_enable_metrics_collection", "0")  # its exporters would listen on all addresses
    for left in reversed(range(EMBEDDED_STARTS)):
        before = psutil.Process().children()  # with what an earlier attempt left
        try:
            with _processes_of_embedded(), _block_stop_signals(), _keep_signal_handler():
                ray.init(
                    address="local",  # ignore clusters of earlier sessions in /tmp
                    num_cpus=_settings.num_cpus,
                    include_dashboard=_settings.dashboard,
                    dashboard_host="127.0.0.1",
                    logging_level=logging.ERROR,
                    log_to_driver=False,
                )
        except Exception as error:  # Ray raises a plain one
            _kill([family for child in _children_since(before) for family in _descent(child)])
            if "timed out" not in str(error):
                raise
            if not left:
                raise NotStartedInTime(
                    "Ray did not start in time: this machine is very busy, or its memory or disk is full; repeat the command "
                    "later. Ray's logs are in /tmp/ray/session_latest/logs"
                ) from error
            logger.warning("Ray did not start in time, perhaps because this machine is very busy; starting it again")
        else:
            _embedded[:] = _children_since(before)
            ray_watch.watch(_embedded)
            return


@contextlib.contextmanager
def _processes_of_embedded() -> Iterator[None]:
    """Sets which processes an embedded Ray has, where they listen, and the variables that workers inherit. With a runtime_env
    instead, Ray would not use the workers that it starts first."""
    with contextlib.ExitStack() as settings:
        settings.enter_context(ray_state.environment(runtime_env(ship_project=False)["env_vars"]))
        settings.enter_context(ray_state.on_loopback())
        if not _settings.dashboard:
            settings.enter_context(ray_state.without_servers())
        yield


def _children_since(before: list[psutil.Process]) -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if child not in before]


_embedded: list[psutil.Process] = []
"""Processes of the embedded Ray that this process started."""


@contextlib.contextmanager
def _keep_signal_handler() -> Iterator[None]:
    """Restores the job's SIGTERM handler, which `ray.init` replaces. It saves and exits with the documented code.

    A SIGTERM meanwhile (a thread that does not block it may take it) reaches Ray's handler, which exits with 15."""
    stop = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except SystemExit as ended:
        if ended.code == signal.SIGTERM:
            raise stops.Stop(128 + signal.SIGTERM) from ended
        raise
    finally:
        if callable(stop) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, stop)


@contextlib.contextmanager
def _block_stop_signals() -> Iterator[None]:
    """Blocks SIGTERM and SIGHUP in all processes that are started inside the block, and in their children.

    `timeout`, a closed terminal, systemd and Slurm signal all processes of a job. Ray would then end before the workers
    have saved their step, so only this process handles the signal. SIGKILL still ends the others."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def disconnect() -> None:
    """Disconnects from Ray, and ends an embedded Ray. Does nothing if this process is not connected."""
    ray_watch.release()
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return
    # Ray sends SIGTERM, which its processes block, and waits one second for each.
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
    """Restricts the file of Ray's token to its owner. Ray writes it with the
    current umask, and the token allows running code."""
    path = os.path.expanduser("~/.ray/auth_token")
    if os.path.isfile(path) and os.stat(path).st_uid == os.getuid() and stat.S_IMODE(os.stat(path).st_mode) & 0o077:
        os.chmod(path, 0o600)


# ---------------------------------------------------------------- capacity


@dataclass(frozen=True, kw_only=True, slots=True)
class Capacity:
    """How many bundles of resources fit on the cluster: now, besides other jobs, and in total."""

    free: int
    now: int


def capacity(bundle: Mapping[str, float]) -> Capacity:
    """How many bundles fit on the current nodes. Each bundle must fit on one node."""
    import ray

    nodes = [node for node in ray.nodes() if node["Alive"]]
    available = ray_state.available_resources_per_node()
    return Capacity(
        free=sum(_fit(available.get(node["NodeID"], {}), bundle) for node in nodes),
        now=sum(_fit(node["Resources"], bundle) for node in nodes),
    )


def _fit(resources: Mapping[str, float], bundle: Mapping[str, float]) -> int:
    return min((int(resources.get(name, 0) / amount + 1e-6) for name, amount in bundle.items() if amount), default=0)


def log_waiting(bundle: Mapping[str, float], count: int = 1) -> None:
    """Logs what a job waits for before it starts: other jobs, or nodes. Logs again
    if the autoscaler can never add the nodes."""
    here = capacity(bundle)
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
    threading.Thread(target=_watch_for_infeasible, args=(dict(bundle), count, want), daemon=True).start()


def _watch_for_infeasible(bundle: dict[str, float], count: int, want: str) -> None:
    """Until the request is satisfied, checks whether the autoscaler (v2) has rejected it, and logs that once."""
    try:
        while capacity(bundle).now < count:
            if infeasible(bundle):
                logger.warning(
                    "waiting for %s: the autoscaler can never add them. Raise max_workers of a node type that has them "
                    "(or maxReplicas), or stop this job and request less",
                    want,
                )
                return
            time.sleep(2)
    except Exception:  # the job and Ray have ended
        return


def infeasible(bundle: Mapping[str, float]) -> bool:
    """Whether the autoscaler reports a request with this bundle as infeasible."""
    return any(
        all(abs(request.get(name, 0) - amount) < 1e-6 for name, amount in bundle.items())
        for request in ray_state.infeasible_requests()
    )
