"""Buckets, moto, and a real object store for tests: OpenStack Swift with its S3 interface, as processes of this user on loopback.

    apt-get install --no-install-recommends swift-proxy swift-account swift-container swift-object memcached
    with swift(folder) as endpoint: ...         # AWS_ENDPOINT_URL; ACCESS_KEY and SECRET_KEY are its credentials

One device, one replica, SQLite for accounts and containers, a file with extended attributes for each object: everything a
cluster of it does but replication. Signatures are checked, uploads in parts are real large objects.
"""

import contextlib
import getpass
import http.client
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import boto3

from pipeline import storage
from tests.ports import free_port

ACCESS_KEY, SECRET_KEY = "test:tester", "testing-secret"

PROXY = """
[DEFAULT]
bind_ip = 127.0.0.1
bind_port = {port}
swift_dir = {folder}
user = {user}
workers = 2
log_level = WARNING
[pipeline:main]
pipeline = catch_errors gatekeeper healthcheck cache bulk s3api tempauth slo dlo proxy-server
[app:proxy-server]
use = egg:swift#proxy
account_autocreate = true
[filter:catch_errors]
use = egg:swift#catch_errors
[filter:gatekeeper]
use = egg:swift#gatekeeper
[filter:healthcheck]
use = egg:swift#healthcheck
[filter:cache]
use = egg:swift#memcache
memcache_servers = 127.0.0.1:{memcached}
[filter:bulk]
use = egg:swift#bulk
[filter:s3api]
use = egg:swift#s3api
s3_acl = false
location = us-east-1
min_segment_size = 1
[filter:tempauth]
use = egg:swift#tempauth
user_test_tester = testing-secret .admin
[filter:slo]
use = egg:swift#slo
[filter:dlo]
use = egg:swift#dlo
"""

STORAGE = """
[DEFAULT]
bind_ip = 127.0.0.1
bind_port = {port}
swift_dir = {folder}
devices = {folder}/devices
mount_check = false
user = {user}
workers = 2
log_level = WARNING
[pipeline:main]
pipeline = {kind}-server
[app:{kind}-server]
use = egg:swift#{kind}
"""


def make_bucket(name: str) -> None:
    """A bucket in the store that the AWS_* environment names."""
    boto3.client("s3").create_bucket(Bucket=name)


def copy_folder(source: str | os.PathLike, target: str | os.PathLike) -> None:
    """Copies the files under a folder or prefix to another one."""
    for file in storage.list_files(source):
        storage.copy_file(file.uri, storage.join(target, file.path))


@contextlib.contextmanager
def moto() -> Iterator[str]:
    """Yields the endpoint of a moto_server process, a fake of AWS in memory to which real clients speak real HTTP."""
    while True:  # another process may take the port before moto does
        port = free_port()
        command = [Path(sys.executable).with_name("moto_server"), "-H", "127.0.0.1", "-p", str(port)]
        server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        endpoint = f"http://127.0.0.1:{port}"
        if _serves(endpoint, server):
            break
    try:
        yield endpoint
    finally:
        server.kill()
        server.wait()


def _serves(endpoint: str, server: subprocess.Popen, seconds: float = 300) -> bool:
    """Whether moto answers before it ends, which it does when its port is taken."""
    deadline = time.monotonic() + seconds
    while server.poll() is None:
        assert time.monotonic() < deadline, f"{server.args} does not answer"
        with contextlib.suppress(OSError, http.client.HTTPException):
            urllib.request.urlopen(f"{endpoint}/moto-api/", timeout=5).close()  # another server has no such page
            return True
        time.sleep(0.1)
    return False


ADMIN = {"region_name": "us-east-1", "aws_access_key_id": "a", "aws_secret_access_key": "b"}


def policy_for_moto(policy: Path, bucket: str) -> str:
    """A policy of infra/iam as moto can enforce it. In two things moto is not AWS: it refuses whatever has a condition on
    prefixes, and wants the right to delete several objects at once on the bucket itself."""
    document = json.loads(policy.read_text())
    for statement in document["Statement"]:
        statement.pop("Condition", None)
    delete = {"Effect": "Allow", "Action": "s3:DeleteObject", "Resource": f"arn:aws:s3:::{bucket}"}
    return json.dumps(document | {"Statement": [*document["Statement"], delete]})


def restricted_user(endpoint: str, policy: Path, bucket: str = "bucket") -> dict[str, str]:
    """The AWS_ environment of a user with exactly the rights of a policy; moto checks all requests from now on."""
    iam = boto3.client("iam", endpoint_url=endpoint, **ADMIN)
    iam.create_user(UserName=policy.stem)
    iam.put_user_policy(UserName=policy.stem, PolicyName=policy.stem, PolicyDocument=policy_for_moto(policy, bucket))
    key = iam.create_access_key(UserName=policy.stem)["AccessKey"]
    headers = {"Content-Type": "text/plain"}
    urllib.request.urlopen(urllib.request.Request(f"{endpoint}/moto-api/reset-auth", b"0", headers)).close()
    environment = {"AWS_ENDPOINT_URL": endpoint, "AWS_DEFAULT_REGION": "us-east-1"}
    return environment | {"AWS_ACCESS_KEY_ID": key["AccessKeyId"], "AWS_SECRET_ACCESS_KEY": key["SecretAccessKey"]}


@contextlib.contextmanager
def swift(folder: Path) -> Iterator[str]:
    """Yields the address of a new, empty store that keeps its data under `folder`."""
    if not shutil.which("swift-ring-builder"):
        raise RuntimeError(f"Swift is not installed: {__doc__.splitlines()[2].strip()}")
    ports = dict(zip(("proxy", "account", "container", "object", "memcached"), _free_ports(5), strict=True))
    (folder / "devices" / "disk").mkdir(parents=True)
    values = {"folder": folder, "user": getpass.getuser(), "memcached": ports["memcached"]}
    (folder / "proxy.conf").write_text(PROXY.format(port=ports["proxy"], **values))
    for kind in ("account", "container", "object"):
        (folder / f"{kind}.conf").write_text(STORAGE.format(port=ports[kind], kind=kind, **values))
        ring = ["swift-ring-builder", str(folder / f"{kind}.builder")]
        place = f"r1z1-127.0.0.1:{ports[kind]}/disk"
        for step in (["create", "4", "1", "1"], ["add", place, "1"], ["rebalance"]):
            subprocess.run([*ring, *step], check=True, capture_output=True)
    memcached = ["memcached", "-l", "127.0.0.1", "-p", str(ports["memcached"]), "-u", getpass.getuser()]
    commands = [
        [f"swift-{kind}-server", str(folder / f"{kind}.conf")] for kind in ("account", "container", "object", "proxy")
    ]
    with open(folder / "swift.log", "wb") as log:
        processes = [
            subprocess.Popen(c, stdout=log, stderr=log, start_new_session=True) for c in (memcached, *commands)
        ]
    endpoint = f"http://127.0.0.1:{ports['proxy']}"
    try:
        for _ in range(300):
            with contextlib.suppress(OSError, urllib.error.URLError):
                urllib.request.urlopen(f"{endpoint}/healthcheck", timeout=1).close()
                break
            ended = [process.args for process in processes if process.poll() is not None]
            assert not ended, f"{ended} ended at start: {(folder / 'swift.log').read_text()[-2000:]}"
            time.sleep(0.2)
        yield endpoint
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, 15)
            process.wait(20)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


if __name__ == "__main__":
    with swift(Path(sys.argv[1])) as address:
        print(address, flush=True)
        time.sleep(float(sys.argv[2]))
