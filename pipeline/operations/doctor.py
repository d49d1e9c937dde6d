"""What would stop a job an hour after its launch, looked for before it.

    for finding in examine(config): ...       # everything; jobs/doctor.py prints it
    preflight(address, tracking_uri)          # what costs milliseconds; every job calls it first

A check is a function that returns findings: ok, warning (it works, but not as it should) or error (it will not work), with
the remedy. Checks of a node run on every node of the cluster that is there; nodes that an autoscaler adds later are not.
"""

import base64
import configparser
import contextlib
import dataclasses
import json
import os
import shutil
import socket
import ssl
import stat
import sys
import threading
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from pipeline import cluster, storage
from pipeline.errors import UserError

if TYPE_CHECKING:
    from pipeline.training.config import PretrainConfig

PART = 5 << 20  # the smallest part of a multipart upload that S3 accepts
SHARED_MEMORY = 2 << 30  # Ray's object store and NCCL share it; containers have 64 MB unless told otherwise
# What `ray start --head` listens on, and the range that it gives to workers (ray start --help).
PORTS = {6379: "Ray's control store", 8265: "Ray's dashboard and job server", 10001: "Ray's client server"}
WORKER_PORTS = range(10002, 20000)


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """What one check saw. `where` names the node, when it is not this machine."""

    check: str
    status: Literal["ok", "warning", "error"]
    message: str
    remedy: str = ""
    where: str = ""


def ok(check: str, message: str) -> Finding:
    return Finding(check=check, status="ok", message=message)


def warning(check: str, message: str, remedy: str) -> Finding:
    return Finding(check=check, status="warning", message=message, remedy=remedy)


def error(check: str, message: str, remedy: str) -> Finding:
    return Finding(check=check, status="error", message=message, remedy=remedy)


def refused(check: str, cause: UserError) -> Finding:
    """A UserError as a finding: what follows its semicolon is the remedy."""
    message, _, remedy = str(cause).partition("; ")
    return error(check, message, remedy)


# ---------------------------------------------------------------- all of it


def examine(config: "PretrainConfig") -> list[Finding]:
    """Every check that applies to a pre-training run with this config. Joins the cluster at `config.runtime.address`, if any."""
    from pipeline.tracking import resolve_tracking_uri

    runtime = config.runtime
    runtime = replace(runtime, data=storage.normalise(runtime.data), output=storage.normalise(runtime.output))
    config = replace(config, runtime=runtime)
    remote = bool(config.runtime.address) or cluster.submitted()
    findings = [authentication(config.runtime.address), token_file(), run_name(config)]
    try:
        uri = resolve_tracking_uri(config.runtime.tracking_uri)
    except UserError as cause:
        findings.append(refused("tracking server", cause))
        uri = ""
    needed = {"CPU": config.runtime.cpus_per_worker, **({"GPU": 1.0} if config.runtime.gpus else {})}
    on_node = NodeChecks(
        tracking_uri=uri,
        data=config.runtime.data,
        output=config.runtime.output,
        gpus=config.runtime.gpus,
        compile=config.engine.compile,
    )
    if remote:
        try:
            cluster.configure(config.runtime.address)
            cluster.connect()
        except UserError as cause:
            return [*findings, refused("cluster", cause)]
        findings += [
            *places(config, uri),
            cpu_budget(config.runtime.workers, needed, cluster.room(needed)),
            *everywhere(on_node),
        ]
    else:
        findings += [own_budget(config), ports(), *on_node()]
    order = {"error": 0, "warning": 1, "ok": 2}
    return sorted(findings, key=lambda finding: order[finding.status])


def table(findings: Sequence[Finding]) -> str:
    """The findings for people, the worst first."""
    lines = []
    for finding in findings:
        where = f"  [{finding.where}]" if finding.where else ""
        lines.append(f"{finding.status:8s}{finding.check:18s}{finding.message}{where}")
        if finding.remedy:
            lines.append(f"{'':26s}-> {finding.remedy}")
    counts = [
        f"{sum(finding.status == status for finding in findings)} {status}" for status in ("error", "warning", "ok")
    ]
    return "\n".join([*lines, f"doctor: {', '.join(counts)}"])


def preflight(address: str | None, tracking_uri: str | None, tracking: bool = True) -> None:
    """The checks that every job starts with, in less than half a second. Raises UserError for what cannot work.

    A tracking server that turns clients away stops nothing (what is logged waits on disk), so that is a warning on stderr.
    Whether --output is free is part of each job's own checks; whether the cluster has room, `cluster.announce` says as soon
    as the job has joined it.
    """
    from pipeline.tracking import resolve_tracking_uri as resolve

    if (found := authentication(address)).status == "error":
        raise UserError(f"{found.message}; {found.remedy}")
    if not tracking:
        return
    uri = resolve(tracking_uri)
    answers: list[Finding] = []
    # In a thread: looking up a name has no time-out. No answer in time means a busy server, which is none of our business.
    asking = threading.Thread(target=lambda: answers.append(tracking_server(uri, patience=0.3)), daemon=True)
    asking.start()
    asking.join(0.4)
    for found in answers:
        if found.status == "error" and "did not answer in" not in found.message:
            print(f"warning: tracking server {found.message}; {found.remedy}", file=sys.stderr, flush=True)


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeChecks:
    """The checks that differ from node to node, in a form that travels there."""

    tracking_uri: str
    data: str
    output: str
    gpus: bool
    compile: bool

    def __call__(self) -> list[Finding]:
        findings = [shared_memory(), compiler(self.compile), build_locks(), devices(self.gpus)]
        if self.tracking_uri:
            findings.append(tracking_server(self.tracking_uri))
        return [*findings, readable(self.data), *writable(self.output)]


def everywhere(check: Callable[[], Sequence[Finding]]) -> list[Finding]:
    """The findings of every node: one line for what all nodes agree on, a line per node for the rest."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = [node for node in ray.nodes() if node["Alive"]]
    # Ray hides the GPUs from a task that asks for none, unless told otherwise.
    environment = {"env_vars": {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}}
    task = ray.remote(num_cpus=0, max_retries=0, runtime_env=environment)(_plain)
    asked = {
        node["NodeManagerAddress"]: task.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        ).remote(check)
        for node in nodes
    }
    by_content: dict[tuple, list[str]] = {}
    for name, reference in asked.items():
        try:
            answers = ray.get(reference, timeout=120)
        except Exception as cause:
            answers = [
                dataclasses.astuple(error("node", f"no answer ({type(cause).__name__})", "look at its Ray logs"))
            ]
        for answer in answers:
            by_content.setdefault(tuple(answer), []).append(name)
    return [
        replace(Finding(**dict(zip(_FIELDS, content, strict=True))), where=_where(names, len(asked)))
        for content, names in by_content.items()
    ]


_FIELDS = [field.name for field in dataclasses.fields(Finding)]


def _plain(check: Callable[[], Sequence[Finding]]) -> list[tuple]:
    return [dataclasses.astuple(finding) for finding in check()]


def _where(names: Sequence[str], count: int) -> str:
    return f"all {count} nodes" if len(names) == count else ", ".join(names)


# ---------------------------------------------------------------- authentication


def authentication(address: str | None) -> Finding:
    """Ray's token authentication, as Ray 2.60 will decide about it for a job that joins `address` (None: its own Ray)."""
    name, mode = "authentication", os.environ.get("RAY_AUTH_MODE", "").lower()
    if mode not in ("", "token", "disabled"):
        return error(name, f"RAY_AUTH_MODE={mode} is no mode of Ray", "export RAY_AUTH_MODE=token")
    if mode == "disabled":
        return warning(
            name,
            "token authentication is off: whoever reaches Ray's ports runs code as you",
            "export RAY_AUTH_MODE=token on every node and where you submit",
        )
    if cluster.submitted():
        return ok(name, "that of the cluster which runs this job")
    if not address:
        return ok(name, "on: Ray gives its own cluster a token")
    if mode == "" and address != "auto":
        return warning(
            name,
            f"RAY_AUTH_MODE is not set: Ray sends no token to {address}, which refuses this job if it asks for one",
            "export RAY_AUTH_MODE=token (or disabled, if the cluster has none)",
        )
    if mode == "token" and not has_token():
        return error(
            name,
            "RAY_AUTH_MODE=token, but there is no token here",
            f"copy the head's token to {token_path()} (chmod 600), or set RAY_AUTH_TOKEN",
        )
    return ok(name, "on, with a token" if has_token() else "as the Ray of this machine")


def token_path() -> str:
    return os.path.expanduser(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token")


def has_token() -> bool:
    if os.environ.get("RAY_AUTH_TOKEN"):
        return True
    return os.path.isfile(token_path()) and os.path.getsize(token_path()) > 0


def token_file() -> Finding:
    """Ray writes the token with the umask it finds: others may read it."""
    path = token_path()
    if os.environ.get("RAY_AUTH_TOKEN") or not os.path.isfile(path):
        return ok("token file", "none needed")
    if stat.S_IMODE(os.stat(path).st_mode) & 0o077:
        return warning("token file", f"{path} can be read by other users of this machine", f"chmod 600 {path}")
    return ok("token file", f"{path}, for its owner only")


# ---------------------------------------------------------------- MLflow


def tracking_server(uri: str, patience: float = 10.0) -> Finding:
    """Asks for data as a client does: /health says 200 even when every client is turned away."""
    name = "tracking server"
    if not uri.startswith(("http://", "https://")):
        return ok(name, f"{uri.partition('://')[0]}, no server")
    parts = urllib.parse.urlsplit(uri)
    shown = f"{parts.scheme}://{parts.hostname}{f':{parts.port}' if parts.port else ''}{parts.path}"
    request = urllib.request.Request(f"{shown.rstrip('/')}/api/2.0/mlflow/experiments/get?experiment_id=0")
    if authorization := _authorization(parts):
        request.add_header("Authorization", authorization)
    context = None
    if parts.scheme == "https":
        context = ssl.create_default_context(cafile=os.environ.get("MLFLOW_TRACKING_SERVER_CERT_PATH") or None)
    if context and os.environ.get("MLFLOW_TRACKING_INSECURE_TLS", "").lower() in ("true", "1"):
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        with urllib.request.urlopen(request, timeout=patience, context=context) as answer:
            json.load(answer)["experiment"]
    except urllib.error.HTTPError as cause:
        remedies = {
            401: "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD",
            403: f"add {parts.netloc.rpartition('@')[2]} to the server's --allowed-hosts, or give the account permission",
        }
        return error(name, f"{shown} answers {cause.code}", remedies.get(cause.code, "look at the server's log"))
    except (OSError, ValueError, KeyError, TypeError) as cause:
        reason = getattr(cause, "reason", cause)
        if isinstance(reason, TimeoutError):
            return error(name, f"{shown} did not answer in {patience:g} s", "start it, or correct MLFLOW_TRACKING_URI")
        return error(
            name, f"{shown} does not answer as MLflow does ({reason})", "start it, or correct MLFLOW_TRACKING_URI"
        )
    return ok(name, f"{shown} serves")


def _authorization(parts: urllib.parse.SplitResult) -> str:
    """The header that MLflow's own client would send."""
    if token := os.environ.get("MLFLOW_TRACKING_TOKEN"):
        return f"Bearer {token}"
    user, password = os.environ.get("MLFLOW_TRACKING_USERNAME"), os.environ.get("MLFLOW_TRACKING_PASSWORD")
    if not (user and password):
        saved = configparser.ConfigParser(interpolation=None)
        with contextlib.suppress(configparser.Error, OSError):
            saved.read(os.path.expanduser("~/.mlflow/credentials"))
        user = user or saved.get("mlflow", "mlflow_tracking_username", fallback=parts.username)
        password = password or saved.get("mlflow", "mlflow_tracking_password", fallback=parts.password)
    if not (user and password):
        return ""
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


# ---------------------------------------------------------------- storage


def readable(uri: str) -> Finding:
    """The dataset's manifest, of which one byte is read."""
    try:
        _reachable(uri)
        storage.read_bytes(storage.join(uri, "manifest.json"), 0, 1)
    except UserError as cause:
        return refused("data", cause)
    except FileNotFoundError:
        return error(
            "data", f"{uri} holds no manifest.json: it is no finished dataset", "run jobs/prepare.py, or correct --data"
        )
    except OSError as cause:
        return error("data", f"{uri}: {cause}", "correct --data, or the rights of its folder")
    return ok("data", f"{uri} can be read")


def writable(uri: str) -> list[Finding]:
    """A probe is written, read back whole and in part, and removed; on S3 also in parts and under a condition."""
    probe = storage.join(uri, f".doctor-{uuid.uuid4().hex}")
    content = os.urandom(1024)
    try:
        _reachable(uri)
        storage.write_bytes(probe, content)
        if storage.read_bytes(probe, 10, 20) != content[10:20]:
            return [
                error("output", f"{uri} returns other bytes than were written", "use a store that serves byte ranges")
            ]
        findings = [ok("output", f"{uri} can be written and read")]
        if storage.is_remote(uri):
            findings += [multipart(probe), checksums()]
        storage.remove(probe)
        if storage.exists(probe):
            findings.append(
                warning("removal", f"{probe} stays: old checkpoints will, too", "allow s3:DeleteObject there")
            )
        elif storage.is_remote(uri):
            findings.append(conditional(probe))
        return findings
    except UserError as cause:
        if "MissingContentLength" in _chain(cause):
            return [error("checksum mode", f"{uri} wants uploads of a stated length, which checksums hide", _CHECKSUMS)]
        return [refused("output", cause)]
    except OSError as cause:
        return [error("output", f"{uri} cannot be written ({cause})", "correct --output, or the rights of its folder")]
    finally:
        with contextlib.suppress(Exception):
            storage.remove(probe)
            if not storage.is_remote(uri):
                os.rmdir(storage.normalise(uri))  # when the probe was all that it held


def _chain(cause: BaseException | None) -> str:
    """What an exception and its causes say; s3fs keeps S3's error code only in the last of them."""
    return f"{cause}: {_chain(cause.__cause__)}" if cause else ""


def multipart(uri: str) -> Finding:
    """Files beyond 50 MB go up in parts."""
    fs, path = storage.filesystem(uri)
    content = os.urandom(2 * PART + 1)
    try:
        with fs.open(path, "wb", block_size=PART) as file:
            file.write(content)
        if fs.cat_file(path) == content:
            return ok("multipart upload", "works")
        reason = "other bytes came back"
    except Exception as cause:
        reason = str(cause)
    return error("multipart upload", f"fails ({reason})", "checkpoints and shards need it: use another store")


def conditional(uri: str) -> Finding:
    """`If-None-Match: *` decides which of several schedulers takes a checkpoint."""
    if storage.create_bytes(uri, b"first") and not storage.create_bytes(uri, b"second"):
        return ok("conditional write", "works")
    return warning(
        "conditional write",
        "the store ignores If-None-Match: several schedulers of jobs/evaluate.py could take the same checkpoint",
        "run one scheduler only",
    )


_CHECKSUMS = "export AWS_REQUEST_CHECKSUM_CALCULATION=when_required AWS_RESPONSE_CHECKSUM_VALIDATION=when_required"


def checksums() -> Finding:
    """The SDK's newer default sends checksummed, chunked bodies, which stores other than AWS answer with 411."""
    mode = os.environ.get("AWS_REQUEST_CHECKSUM_CALCULATION", "")
    if mode != "when_required" and os.environ.get("AWS_ENDPOINT_URL"):
        return warning("checksum mode", f"{mode}: a store other than AWS may refuse uploads", _CHECKSUMS)
    return ok("checksum mode", f"{mode}: every store understands it" if mode == "when_required" else mode)


def _reachable(uri: str) -> None:
    """Raises UserError at once when nothing listens at AWS_ENDPOINT_URL, where the S3 client would try for minutes."""
    endpoint = os.environ.get("AWS_ENDPOINT_URL", "")
    if not storage.is_remote(uri) or not endpoint:
        return
    parts = urllib.parse.urlsplit(endpoint)
    if not parts.hostname:
        raise UserError(f"AWS_ENDPOINT_URL={endpoint} is no address; write http://host:port")
    try:
        socket.create_connection((parts.hostname, parts.port or {"http": 80}.get(parts.scheme, 443)), 5).close()
    except OSError as cause:
        raise UserError(f"nothing answers at AWS_ENDPOINT_URL={endpoint} ({cause}); start it or correct it") from cause


def places(config: "PretrainConfig", tracking: str) -> list[Finding]:
    """Files of this machine that a run on several machines names."""
    import ray

    if len({node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}) < 2:
        return []
    found = {
        "--data": config.runtime.data,
        "--output": config.runtime.output,
        "--validation": config.runtime.validation or "s3://",
    }
    local = [f"{flag} {uri}" for flag, uri in found.items() if not storage.is_remote(uri)]
    host = urllib.parse.urlsplit(tracking).hostname
    if tracking.startswith("sqlite") or host in ("localhost", "127.0.0.1", "::1"):
        local.append(f"the tracking server {tracking}")
    if not local:
        return [ok("places", "every node sees the same data, output and tracking server")]
    return [
        warning(
            "places",
            f"{', '.join(local)}: on a cluster of several machines each has its own",
            "use s3:// and a server's address, or make sure that the folder is shared",
        )
    ]


# ---------------------------------------------------------------- the machine


def shared_memory(folder: str = "/dev/shm") -> Finding:
    from ray._common.utils import get_system_memory

    try:
        size = shutil.disk_usage(folder).total
    except OSError:
        return warning("shared memory", f"there is no {folder}", "Ray will use files in /tmp, which is slow")
    wanted = min(SHARED_MEMORY, int(0.3 * get_system_memory()))
    if size < wanted:
        return warning(
            "shared memory",
            f"{folder} has {size / 1e6:,.0f} MB: Ray's object store moves to disk, and NCCL may fail",
            f"give the container at least --shm-size={wanted >> 20}m, or on Kubernetes an emptyDir with medium: Memory there",
        )
    return ok("shared memory", f"{folder} has {size / 1e9:,.1f} GB")


def compiler(required: bool) -> Finding:
    """torch.compile and DeepSpeed's operators are built with a C++ compiler and ninja, on the worker."""
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")])
    compilers = [os.environ.get("CXX") or "c++", "g++", "clang++"]
    missing = [] if any(shutil.which(program, path=path) for program in compilers) else ["C++ compiler"]
    missing += [] if shutil.which("ninja", path=path) else ["ninja"]
    if not missing:
        return ok("compiler", "C++ and ninja are there")
    found = error if required else warning
    return found(
        "compiler",
        f"no {' and no '.join(missing)}: {'--engine.compile' if required else 'torch.compile'} and DeepSpeed's own operators need it",
        "apt-get install g++ (pip install ninja), or use the image of infra/",
    )


def build_locks() -> Finding:
    """A process that was killed while it built an operator leaves a lock; torch then waits for it for ever, silently."""
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or os.path.expanduser("~/.cache/torch_extensions")
    locks = [os.path.join(folder, "lock") for folder, _, files in os.walk(root) if "lock" in files]
    stale = sorted(set(locks) - _open_files(locks))
    if stale:
        return error(
            "build locks",
            f"{', '.join(stale)}: nobody holds it, and workers would wait for it",
            f"rm {' '.join(stale)}",
        )
    return ok("build locks", "an operator is being built" if locks else "none")


def _open_files(paths: Iterable[str]) -> set[str]:
    """Which of the files some process of ours holds open: whoever builds keeps its lock open."""
    import psutil

    wanted, held = set(paths), set()
    for process in psutil.process_iter() if wanted else ():
        with contextlib.suppress(psutil.Error, OSError):
            held |= {name for name in map(os.readlink, _links(process.pid)) if name in wanted}
    return held


def _links(pid: int) -> list[str]:
    folder = f"/proc/{pid}/fd"
    return [os.path.join(folder, name) for name in os.listdir(folder)]


def ports(wanted: Mapping[int, str] = PORTS, workers: range = WORKER_PORTS) -> Finding:
    """Who listens where `ray start --head` would; an embedded Ray looks for free ports itself."""
    import psutil

    try:
        listening = {c.laddr.port: c.pid for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN}
    except psutil.AccessDenied:  # macOS, to ordinary users
        return ok("ports", "not visible to this user")
    owners = {port: _name(listening[port]) for port in sorted(listening)}
    taken = [f"{port} ({what}) by {owners[port]}" for port, what in wanted.items() if port in owners]
    taken = [text for text in taken if "gcs_server" not in text]
    inside = [f"{port} by {owner}" for port, owner in owners.items() if port in workers and "ray" not in owner]
    if not taken and not inside:
        return ok("ports", "free for `ray start --head`")
    message = "taken: " + ", ".join(taken) if taken else ""
    if inside:
        message += ("; " if message else "") + f"in the range of Ray's workers: {', '.join(inside[:5])}"
    return warning(
        "ports", message, "end it, or give ray start --port, --dashboard-port, --min-worker-port and --max-worker-port"
    )


def _name(pid: int | None) -> str:
    import psutil

    try:
        return psutil.Process(pid).name() if pid else "another user's process"
    except psutil.Error:
        return f"process {pid}"


def devices(wanted: bool) -> Finding:
    """GPUs, and an all-reduce over those of this node through NCCL."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        if wanted and not cluster.submitted():
            return warning(
                "GPUs",
                "none here, and the run wants one per worker",
                "fine for a head; else check nvidia-smi, or --no-gpus",
            )
        return ok("GPUs", "none, and none wanted" if not wanted else "none on this node")
    kinds = ", ".join(sorted({torch.cuda.get_device_name(i) for i in range(count)}))
    try:
        ones = [torch.ones(1024, device=f"cuda:{i}") for i in range(count)]
        torch.cuda.nccl.all_reduce(ones)
        right = all(float(values[0]) == count for values in ones)
    except Exception as cause:
        return error(
            "GPUs",
            f"{count} x {kinds}: NCCL fails ({cause})",
            "run with NCCL_DEBUG=INFO; check the driver and /dev/shm",
        )
    if not right:
        return error(
            "GPUs",
            f"{count} x {kinds}: NCCL adds up wrongly",
            "check the interconnect: nvidia-smi topo -m, NCCL_P2P_DISABLE=1",
        )
    version = ".".join(map(str, torch.cuda.nccl.version()))
    return ok("GPUs", f"{count} x {kinds}, NCCL {version} adds up over all of them")


# ---------------------------------------------------------------- the run


def cpu_budget(workers: int, needed: Mapping[str, float], room: cluster.Room) -> Finding:
    """Whether all workers of a run fit, which is when it starts. What an autoscaler may add, only the autoscaler knows, and
    says when it is asked (`cluster.announce`)."""
    each = " and ".join(f"{amount:g} {name}" for name, amount in needed.items())
    want = f"{workers} workers of {each}"
    if room.free >= workers:
        return ok("room", f"{want} fit now")
    if room.now >= workers:
        return warning(
            "room",
            f"{want}: other jobs leave room for {room.free}",
            "the run waits until they end; `ray job list` shows them",
        )
    return warning(
        "room",
        f"{want}: the nodes that are there have room for {room.now}",
        "the run waits until an autoscaler brings more, within max_workers (maxReplicas) of its node types; to a cluster of "
        "fixed size add nodes (ray start --address), or ask for less",
    )


def own_budget(config: "PretrainConfig") -> Finding:
    """The same on one machine, where an embedded Ray has as many CPUs as the workers ask for."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    want = config.runtime.workers * config.runtime.cpus_per_worker
    if want > cores:
        return warning(
            "room",
            f"{config.runtime.workers} workers of {config.runtime.cpus_per_worker:g} CPU share {cores} cores",
            "fewer --workers or --cpus-per-worker are faster",
        )
    return ok("room", f"{config.runtime.workers} workers of {config.runtime.cpus_per_worker:g} CPU on {cores} cores")


def run_name(config: "PretrainConfig") -> Finding:
    """Whether --output is free, this run's own, or somebody else's."""
    from pipeline.training import run

    try:
        held = run.held_by(run.check_run(config), storage.normalise(config.runtime.output))
    except UserError as cause:
        return refused("run", cause)
    if held is None:
        return ok("run", f"{config.runtime.output} is free")
    return ok("run", f"{config.runtime.output} holds this run, which continues")
