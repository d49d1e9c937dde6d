#!/usr/bin/env python3
"""Starts the MLflow tracking server with PostgreSQL for runs, S3 (or a folder) for artifacts, and password
authentication.

    pip install -c constraints.txt -r infra/mlflow/requirements.txt      # into any environment
    python infra/mlflow/serve.py --data ~/mlflow --artifacts s3://bucket/mlflow

On a machine without containers it creates and starts a PostgreSQL cluster (Debian package `postgresql`; on a socket in
--data, without a network port) and an admin account with a random password. In containers (compose.yaml,
kubernetes.yaml) it uses the existing database in MLFLOW_DATABASE. Secrets come from the environment or from files that
only the owner can read, never from arguments.

    MLFLOW_DATABASE              postgresql://user:password@host/mlflow (and a database mlflow_auth on the same server)
    MLFLOW_AUTH_ADMIN_PASSWORD   initial password of "admin"; otherwise in <data>/admin-password
    AWS_ENDPOINT_URL, AWS_*      the object store of --artifacts; clients do not need them: the server proxies artifacts

    python infra/mlflow/serve.py --check http://mlflow:5000     # exit 0 if clients at that address are accepted

The check sends an API request to the real host name, because /health returns 200 even if all clients are rejected (403
for a host that is missing in --allowed-hosts)."""

import argparse
import base64
import contextlib
import glob
import importlib.util
import json
import os
import pwd
import secrets
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="mlflow-server", help="folder for the database, accounts and local artifacts")
    parser.add_argument("--artifacts", help="s3://bucket/prefix or a folder (default: <data>/artifacts)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (0.0.0.0 in containers)")
    parser.add_argument("--port", type=int, default=5000)
    parser.add_argument(
        "--allowed-hosts",
        default="localhost,localhost:*,127.0.0.1,127.0.0.1:*",
        help="host names that clients use, with and without port; others are rejected with 403",
    )
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--check", metavar="URL", help="check a running server and exit")
    options = parser.parse_args()
    if options.check:
        return check(options.check)
    missing = [name for name in ("mlflow", "psycopg", "flask_wtf") if importlib.util.find_spec(name) is None]
    if missing:
        return fail(f"missing packages: {', '.join(missing)}; pip install -c constraints.txt -r {requirements()}")

    data = os.path.abspath(os.path.expanduser(options.data))
    os.makedirs(data, exist_ok=True)
    database = os.environ.pop("MLFLOW_DATABASE", "")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # runs the `finally` below
    postgres = None
    try:
        if not database:
            postgres = Postgres(os.path.join(data, "postgres"))
            postgres.start()
            database = postgres.uri
        return serve(options, data, database)
    except (RuntimeError, OSError) as error:
        return fail(str(error))
    except KeyboardInterrupt:
        return 130
    finally:
        if postgres:
            postgres.stop()


def fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2


def requirements() -> str:
    return os.path.join(os.path.dirname(os.path.abspath(__file__)), "requirements.txt")


class Postgres:
    """A PostgreSQL cluster in a folder, on a Unix socket in it, run by an ordinary user (PostgreSQL refuses to run as
    root)."""

    def __init__(self, folder: str):
        self.folder = folder
        self.data = os.path.join(folder, "data")
        found = [shutil.which("pg_ctl"), *sorted(glob.glob("/usr/lib/postgresql/*/bin/pg_ctl"), reverse=True)]
        binaries = [
            os.path.dirname(path) for path in found if path and os.path.exists(os.path.dirname(path) + "/initdb")
        ]
        if not binaries:
            raise RuntimeError("PostgreSQL not found (apt-get install postgresql), and MLFLOW_DATABASE is not set")
        self.binaries = binaries[0]
        self.user = None
        if os.geteuid() == 0:
            names = {entry.pw_name for entry in pwd.getpwall()}
            self.user = "postgres" if "postgres" in names else "nobody"

    @property
    def uri(self) -> str:
        return f"postgresql://mlflow@/mlflow?host={self.folder}"

    def run(self, program: str, *arguments: str) -> None:
        command = [os.path.join(self.binaries, program), *arguments]
        with open(
            f"{self.folder}/output", "w+"
        ) as output:  # a file, because the database server would keep a pipe open
            done = subprocess.run(command, user=self.user, cwd="/", stdout=output, stderr=subprocess.STDOUT)
            output.seek(0)
            if done.returncode:
                raise RuntimeError(f"{program} failed: {output.read().strip()} (see {self.folder}/log)")

    def start(self) -> None:
        os.makedirs(self.folder, mode=0o700, exist_ok=True)
        if self.user:
            shutil.chown(self.folder, self.user)
        if not os.path.exists(os.path.join(self.data, "PG_VERSION")):
            self.run("initdb", "-D", self.data, "-U", "mlflow", "--auth=trust", "--encoding=UTF8", "--locale=C")
        # "trust" is safe: the only access is a socket in a folder that only the owner can open.
        settings = f"-c listen_addresses= -c unix_socket_directories={self.folder}"
        self.run("pg_ctl", "-D", self.data, "-l", f"{self.folder}/log", "-o", settings, "-w", "-t", "60", "start")
        import psycopg

        with contextlib.closing(psycopg.connect(host=self.folder, user="mlflow", dbname="postgres")) as connection:
            connection.autocommit = True  # "create database" cannot run in a transaction
            cursor = connection.cursor()
            cursor.execute("select datname from pg_database")
            for name in {"mlflow", "mlflow_auth"} - {row[0] for row in cursor.fetchall()}:
                cursor.execute(f"create database {name}")

    def stop(self) -> None:
        with contextlib.suppress(RuntimeError):
            self.run("pg_ctl", "-D", self.data, "-m", "fast", "-w", "-t", "30", "stop")


def private(path: str, text: str) -> None:
    """Writes a file that only its owner can read."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(text)


def kept_secret(path: str, variable: str) -> str:
    """A secret from the environment, or from a file, which is created with a random secret."""
    if given := os.environ.get(variable):
        return given
    if not os.path.exists(path):
        private(path, secrets.token_urlsafe(24))
    with open(path) as file:
        return file.read().strip()


def serve(options: argparse.Namespace, data: str, database: str) -> int:
    base, _, query = database.partition("?")
    accounts = os.path.join(data, "accounts.ini")
    private(
        accounts,
        "[mlflow]\ndefault_permission = EDIT\nadmin_username = admin\n"
        f"database_uri = {base}_auth{'?' if query else ''}{query}\n"
        "authorization_function = authorization:authenticate\n"
        "grant_default_workspace_access = true\nauth_cache_ttl_seconds = 60\n",
    )
    artifacts = options.artifacts or os.path.join(data, "artifacts")
    environment = {
        **{name: value for name, value in os.environ.items() if value or not name.startswith("AWS_")},
        "PYTHONPATH": os.pathsep.join(
            [os.path.dirname(os.path.abspath(__file__)), *filter(None, [os.environ.get("PYTHONPATH")])]
        ),
        "MLFLOW_BACKEND_STORE_URI": database,
        "MLFLOW_ARTIFACTS_DESTINATION": artifacts,
        "MLFLOW_AUTH_CONFIG_PATH": accounts,
        "MLFLOW_AUTH_ADMIN_PASSWORD": kept_secret(os.path.join(data, "admin-password"), "MLFLOW_AUTH_ADMIN_PASSWORD"),
        "MLFLOW_FLASK_SERVER_SECRET_KEY": kept_secret(
            os.path.join(data, "session-key"), "MLFLOW_FLASK_SERVER_SECRET_KEY"
        ),
        "MLFLOW_SERVER_ALLOWED_HOSTS": options.allowed_hosts,
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "AWS_REQUEST_CHECKSUM_CALCULATION": os.environ.get("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required"),
        "AWS_RESPONSE_CHECKSUM_VALIDATION": os.environ.get("AWS_RESPONSE_CHECKSUM_VALIDATION", "when_required"),
    }
    if endpoint := os.environ.get("AWS_ENDPOINT_URL"):
        environment.setdefault("MLFLOW_S3_ENDPOINT_URL", endpoint)
    command = [sys.executable, "-m", "mlflow", "server", "--app-name", "basic-auth", "--serve-artifacts"]
    command += ["--host", options.host, "--port", str(options.port), "--workers", str(options.workers)]
    server = subprocess.Popen(command, env=environment, start_new_session=True)
    try:
        address = f"http://{'127.0.0.1' if options.host == '0.0.0.0' else options.host}:{options.port}"
        while server.poll() is None and not healthy(address):
            time.sleep(0.5)
        if server.poll() is None:
            print(
                f"mlflow: {address}, artifacts in {artifacts}\nmlflow: on clients: export MLFLOW_TRACKING_URI={address} "
                f'MLFLOW_TRACKING_USERNAME=admin MLFLOW_TRACKING_PASSWORD="$(cat {data}/admin-password)"',
                flush=True,
            )
        return server.wait()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGTERM)
        try:
            server.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)


def healthy(address: str) -> bool:
    try:
        return urllib.request.urlopen(f"{address}/health", timeout=5).status == 200
    except OSError:
        return False


def check(address: str) -> int:
    """Requests the default experiment, with the credentials of MLflow's clients or those in the address."""
    parts = urllib.parse.urlsplit(address)
    address = urllib.parse.urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
    request = urllib.request.Request(f"{address.rstrip('/')}/api/2.0/mlflow/experiments/get?experiment_id=0")
    user = os.environ.get("MLFLOW_TRACKING_USERNAME") or urllib.parse.unquote(parts.username or "admin")
    password = os.environ.get("MLFLOW_TRACKING_PASSWORD") or os.environ.get("MLFLOW_AUTH_ADMIN_PASSWORD", "")
    password = password or urllib.parse.unquote(parts.password or "")
    request.add_header("Authorization", "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode())
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            json.load(answer)["experiment"]
    except urllib.error.HTTPError as error:
        hint = {
            401: "; set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD",
            403: "; this host name is missing in --allowed-hosts, or the account lacks the permission",
        }
        return fail(f"{address} responds with {error.code}{hint.get(error.code, '')}")
    except (OSError, ValueError, KeyError) as error:
        return fail(f"{address} does not respond like an MLflow server: {error}")
    print(f"mlflow: {address} serves")
    return 0


if __name__ == "__main__":
    sys.exit(main())
