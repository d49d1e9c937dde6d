"""The MLflow server: its address, its client, experiments and runs on it, and its errors."""

import contextlib
import fcntl
import functools
import gc
import logging
import os
import re
import stat
import urllib.parse
from collections.abc import Iterator
from typing import TYPE_CHECKING

from pipeline import storage
from pipeline.credentials import redacted, take_password, with_password
from pipeline.errors import UserError
from pipeline.outputs import check_output
from pipeline.tracking import names
from pipeline.tracking.environment import PROJECT
from pipeline.tracking.views import SHARE, experiment_tags

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment

logger = logging.getLogger(__name__)

SQLITE = "sqlite:///"
SQLITE_HEADER = b"SQLite format 3\0"
DATABASES = ("postgresql", "mysql", "mssql")
INCOMPLETE = ("already exists", "no such table", "no such column", "duplicate column name")
"""Errors of SQLite for tables whose creation was interrupted; MLflow cannot continue it."""
CONNECT_SECONDS = 10  # timeout of the first connection to a database
# Errors after which a record is not sent again. All other errors (connection, 5xx, 401, 403, a locked database) are
# retried.
REFUSALS = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_ALREADY_EXISTS")
NOT_FOUND = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE", "BAD_REQUEST")


class RunUnavailableError(ConnectionError):
    """The run, its experiment or its parent was deleted or does not exist yet, so its records stay in the spool."""


# ---------------------------------------------------------------- the address


def resolve_tracking_uri(explicit: str | None = None) -> str:
    """The address of the server: `explicit`, MLFLOW_TRACKING_URI, or SQLite in the working directory; always absolute.

    Call this function on the driver and pass the result to workers: Ray workers change directory, so a relative SQLite
    path would create one database per worker. A password in the address is moved to the environment
    (`pipeline.credentials`). Raises UserError for an address that no MLflow can have, for a SQLite file that cannot be
    written, and for SQLite in the package folder of a Ray job.
    """
    uri = take_password(explicit or os.environ.get("MLFLOW_TRACKING_URI") or "")
    if not uri:
        folder = os.getcwd()
        if _is_in_package(folder):
            folder = os.path.expanduser("~")
            _warn_of_database(f"{SQLITE}{folder}/mlflow.db")
        return f"{SQLITE}{folder}/mlflow.db"
    if uri.startswith(SQLITE):
        path = os.path.abspath(uri.removeprefix(SQLITE))
        if _is_in_package(path):
            raise UserError(
                f"tracking URI {uri}: {os.path.dirname(path)} is Ray's copy of the project, which Ray deletes; give an "
                "absolute path outside it, or the address of a server"
            )
        _check_database(path)
        return SQLITE + path
    scheme = uri.partition("://")[0]
    if "://" not in uri or scheme == "file":
        raise UserError(f"tracking URI {uri}: MLflow no longer supports folders; use sqlite:///{uri}/mlflow.db")
    if scheme not in ("http", "https", "databricks") and scheme.partition("+")[0] not in DATABASES:
        raise UserError(
            f"tracking URI {redacted(uri)}: MLflow has no store {scheme}://; use http://, https://, sqlite:/// or postgresql://"
        )
    _check_server(uri)
    return uri.rstrip("/")


@functools.cache
def _check_database(path: str) -> None:
    """Raises UserError for a path that cannot be a SQLite database."""
    where = f"tracking URI {SQLITE}{path}"
    try:
        if not os.path.lexists(path):
            check_output(os.path.dirname(path), "tracking-uri")
        elif os.path.isdir(path):
            raise UserError(f"{where}: {path} is a folder; name a file in it, such as mlflow.db")
        elif not stat.S_ISREG(os.stat(path).st_mode):
            raise UserError(f"{where}: {path} is not a regular file; name another one")
        else:
            with open(path, "r+b") as file:
                if file.read(len(SQLITE_HEADER)) not in (b"", SQLITE_HEADER):
                    raise UserError(f"{where}: {path} is not a SQLite database; name another file")
    except OSError as error:
        raise UserError(f"{where}: {path} cannot be written ({error.strerror}); name another file") from error


def _check_server(uri: str) -> None:
    """Raises UserError for an address without a host or with an impossible one."""
    try:
        parts = urllib.parse.urlsplit(uri)
        port, has_host = parts.port, bool(parts.hostname) and not re.search(r"[\s\\]", parts.netloc)
        if parts.scheme in ("http", "https") and not (has_host and port != 0):
            raise ValueError("no valid host name and port")
    except ValueError as error:
        raise UserError(f"tracking URI {redacted(uri)}: {error}; write http://HOST:PORT") from error


def _is_in_package(path: str) -> bool:
    """Whether the path is inside the copy of the project that `ray job submit` unpacks and Ray deletes afterwards."""
    return "/working_dir_files/" in path + "/"


@functools.cache
def _warn_of_database(uri: str) -> None:
    logger.warning(
        "MLFLOW_TRACKING_URI is not set, so MLflow writes to %s on this node; set it to store runs elsewhere",
        uri,
    )


def note_of_default(uri: str) -> str:
    """A remark for a database that was chosen by the working directory, when that is not the project's folder; else
    empty."""
    folder = os.getcwd()
    if os.environ.get("MLFLOW_TRACKING_URI") or uri != f"{SQLITE}{folder}/mlflow.db" or folder == PROJECT:
        return ""
    return f" (of the working directory, as MLFLOW_TRACKING_URI is not set; make ui shows {PROJECT}/mlflow.db)"


def run_url(uri: str, experiment: str, run_id: str) -> str:
    """The address of the run in MLflow's UI."""
    return f"{redacted(uri)}/#/experiments/{experiment}/runs/{run_id}" if uri.startswith("http") else redacted(uri)


# ---------------------------------------------------------------- the client


@functools.lru_cache(maxsize=8)
def client(uri: str) -> "MlflowClient":
    """An MLflow client with short timeouts, because the spool repeats failed requests.

    The first use of a SQLite file creates its tables, which takes seconds; a lock prevents two processes from doing it
    at the same time. Raises ConnectionError for a database that does not respond, UserError if its driver is not
    installed.
    """
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # stdout belongs to the jobs
    from mlflow import MlflowClient

    # exclude MLflow's half a million permanent objects from garbage collection, which would delay training steps
    gc.freeze()
    for name in ("alembic", "mlflow.store.db.utils", "mlflow.pyfunc"):
        logging.getLogger(name).setLevel(logging.WARNING)
    if uri.partition("://")[0].partition("+")[0] in DATABASES:
        _connect_once(uri)
    if not uri.startswith(SQLITE):
        return MlflowClient(mlflow_address(uri))
    path = uri.removeprefix(SQLITE)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    lock_path = os.path.join(os.path.dirname(path), f".{os.path.basename(path)}.lock")
    with storage.open_regular(lock_path, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not os.path.exists(path) or not os.path.getsize(path):
            _create_database(path)
        try:
            made = MlflowClient(mlflow_address(uri))  # changes the tables of an earlier version
            made.get_experiment("0")
        except Exception as error:
            if any(sign in str(error) for sign in INCOMPLETE):
                raise _incomplete(path, error) from error
            raise
    quoted = mlflow_address(uri).removeprefix(SQLITE)
    if quoted != path:  # MLflow also creates the folder of the quoted path
        with contextlib.suppress(OSError):
            os.rmdir(os.path.dirname(quoted))
    return made


def _create_database(path: str) -> None:
    """Creates MLflow's tables in a file of another name, which gets its name when it is complete: where the disk becomes
    full, or the process is killed, MLflow would leave a database that it can neither use nor repair."""
    from mlflow import MlflowClient

    new = f"{path}.incomplete"
    _remove_database(new)  # of a process that was killed: the caller holds the lock
    try:
        MlflowClient(mlflow_address(SQLITE + new)).get_experiment("0")
        os.replace(new, path)
    finally:
        _remove_database(new)


def _remove_database(path: str) -> None:
    """Removes a file of SQLite, and those that SQLite keeps beside it."""
    for suffix in ("", "-journal", "-wal", "-shm"):
        with contextlib.suppress(FileNotFoundError):
            os.remove(path + suffix)


def _incomplete(path: str, error: Exception) -> UserError:
    return UserError(
        f"{path}: MLflow's tables are incomplete, as after a disk that was full when the file was made ({first_line(error)}); "
        "if it has no runs, remove it and repeat the command; otherwise, restore a backup or give another --tracking-uri"
    )


def mlflow_address(uri: str) -> str:
    """The address for MLflow: with the password of a database, and with `%` and `?` in a SQLite path quoted."""
    if uri.startswith(SQLITE):
        return SQLITE + uri.removeprefix(SQLITE).replace("%", "%25").replace("?", "%3F")
    return with_password(uri)


def _connect_once(uri: str) -> None:
    """Tries to connect to the database once, with a timeout; MLflow itself would try for more than a minute."""
    import sqlalchemy

    limit = {"connect_timeout": CONNECT_SECONDS} if uri.startswith(("postgresql", "mysql")) else {}
    try:
        engine = sqlalchemy.create_engine(mlflow_address(uri), connect_args=limit, poolclass=sqlalchemy.NullPool)
        engine.connect().close()
    except ModuleNotFoundError as error:
        raise UserError(
            f"{redacted(uri)}: the package {error.name} is not installed; install it, or write postgresql+psycopg://"
        ) from error
    except sqlalchemy.exc.OperationalError as error:
        raise ConnectionError(redacted(str(error.orig).strip().splitlines()[0])) from error


@contextlib.contextmanager
def global_server(uri: str) -> Iterator[None]:
    """Temporarily makes the server MLflow's global one, which some functions of MLflow use regardless of the client.

    MLflow also writes its global server to MLFLOW_TRACKING_URI, so the variable is restored, too: `resolve_tracking_uri`
    depends on whether the user has set it."""
    import mlflow

    before, variable = mlflow.get_tracking_uri(), os.environ.get("MLFLOW_TRACKING_URI")
    mlflow.set_tracking_uri(mlflow_address(uri))
    try:
        yield
    finally:
        mlflow.set_tracking_uri(before)
        if variable is None:
            os.environ.pop("MLFLOW_TRACKING_URI", None)
        else:
            os.environ["MLFLOW_TRACKING_URI"] = variable


# ---------------------------------------------------------------- experiments and runs


def experiment_id(uri: str, name: str) -> str:
    """The id of the experiment, which is created if it does not exist. With SQLite, artifacts are stored in mlruns/
    next to it.

    Raises UserError if the experiment was deleted.
    """
    mlflow = client(uri)
    found: Experiment | None = mlflow.get_experiment_by_name(name)
    if found is None:
        location = None
        if uri.startswith(SQLITE):
            folder = os.path.dirname(uri.removeprefix(SQLITE))
            location = f"file://{urllib.parse.quote(f'{folder}/mlruns/{name}')}"  # MLflow decodes it
        try:
            made = mlflow.create_experiment(name, artifact_location=location)
            for key, value in experiment_tags(name, made, on_server=uri.startswith("http")).items():
                mlflow.set_experiment_tag(made, key, value)
            return made
        except Exception:  # another process created it first, or the name is invalid, which raises again below
            found = mlflow.get_experiment_by_name(name)
            if found is None:
                raise
    if found.lifecycle_stage == "deleted":
        raise UserError(f'MLflow experiment "{name}" was deleted; restore it or use another name')
    view = {key: value for key, value in experiment_tags(name, found.experiment_id).items() if key.startswith(SHARE)}
    for key, value in view.items():
        if found.tags.get(key) != value:  # written by an earlier version of this program
            mlflow.set_experiment_tag(found.experiment_id, key, value)
    return found.experiment_id


def find_run(uri: str, run_id: str) -> str | None:
    """The server's id of a run, given its id or its offline id; None if the server has no such active run."""
    mlflow = client(uri)
    if run_id.startswith("offline-"):
        experiments = [experiment.experiment_id for experiment in mlflow.search_experiments()]
        found = mlflow.search_runs(experiments, f"tags.{names.SPOOL} = '{run_id}'", max_results=1)
        return found[0].info.run_id if found else None
    return run_id if lifecycle_stage(uri, run_id) == "active" else None


def lifecycle_stage(uri: str, run_id: str) -> str | None:
    """MLflow's stage of a run: active, or deleted, which can be restored; None if the server does not have it."""
    from mlflow.exceptions import MlflowException

    try:
        return client(uri).get_run(run_id).info.lifecycle_stage
    except MlflowException as error:
        if error.error_code in NOT_FOUND:
            return None
        raise


# ---------------------------------------------------------------- errors


def is_unauthorised(error: Exception) -> bool:
    """Whether the server rejects the credentials or the host name, which the user has to correct."""
    code = getattr(error, "error_code", "")
    return (
        code in ("PERMISSION_DENIED", "UNAUTHENTICATED", "CUSTOMER_UNAUTHORIZED")
        or "error code 403" in str(error)
        or "password authentication failed" in str(error)
    )


def first_line(error: BaseException) -> str:
    """The class of the exception and the first line of its message, without passwords."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {redacted(lines[0][:300])}" if lines else type(error).__name__
