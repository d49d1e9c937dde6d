"""PostgreSQL on loopback with a password, as the image `postgres` starts it: user and database have one name."""

import contextlib
import glob
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.ports import free_port


@contextlib.contextmanager
def postgres(name: str, password: str, script: str = "") -> Iterator[str]:
    """Yields HOST:PORT of a new server. script: SQL that is run once, as from /docker-entrypoint-initdb.d."""
    import psycopg

    found = sorted(glob.glob("/usr/lib/postgresql/*/bin/initdb"))
    if not found:
        pytest.skip("needs PostgreSQL: apt-get install postgresql")
    programs = Path(found[-1]).parent
    folder = Path(tempfile.mkdtemp(prefix="postgres-"))
    user = "postgres" if os.geteuid() == 0 else None  # PostgreSQL refuses to run as root
    (folder / "password").write_text(password)
    for place in (folder, folder / "password"):
        shutil.chown(place, user) if user else None
    port = free_port()

    def run(program: str, *arguments: str) -> None:
        with open(folder / "output", "a") as output:
            command = [str(programs / program), "-D", f"{folder}/data", *arguments]
            done = subprocess.run(command, user=user, cwd="/", stdout=output, stderr=output)
        assert done.returncode == 0, (folder / "output").read_text()

    try:
        run(
            "initdb", "-U", name, "--auth=scram-sha-256", f"--pwfile={folder}/password", "--encoding=UTF8", "--locale=C"
        )
        settings = f"-c listen_addresses=127.0.0.1 -c port={port} -c unix_socket_directories={folder}"
        run("pg_ctl", "-l", f"{folder}/log", "-o", settings, "-w", "-t", "120", "start")
        address = {"host": "127.0.0.1", "port": port, "user": name, "password": password}
        for database, text in (("postgres", f"CREATE DATABASE {name}"), (name, script)):
            with psycopg.connect(**address, dbname=database, autocommit=True) as connection:
                connection.execute(text) if text else None
        yield f"127.0.0.1:{port}"
    finally:
        with contextlib.suppress(AssertionError):
            run("pg_ctl", "-m", "immediate", "-w", "stop")
        shutil.rmtree(folder, ignore_errors=True)
