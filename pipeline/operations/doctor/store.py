"""Reading the data and writing the output, with what checkpoints and schedulers need of a store."""

import contextlib
import os
import socket
import tempfile
import urllib.parse
import uuid
from typing import TYPE_CHECKING

from pipeline import storage
from pipeline.credentials import redacted
from pipeline.errors import UserError
from pipeline.operations.doctor.finding import CheckResult, error, ok, refused, warning

if TYPE_CHECKING:
    from pipeline.training.config import PretrainConfig

IN_PARTS = (16 << 20) + 1  # bytes that go up in three parts
_CHECKSUMS = "export AWS_REQUEST_CHECKSUM_CALCULATION=when_required AWS_RESPONSE_CHECKSUM_VALIDATION=when_required"


def readable(uri: str) -> CheckResult:
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


def writable(uri: str) -> list[CheckResult]:
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
        if "MissingContentLength" in str(cause):
            return [error("checksum mode", f"{uri} wants uploads of a stated length, which checksums hide", _CHECKSUMS)]
        return [refused("output", cause)]
    except OSError as cause:
        return [error("output", f"{uri} cannot be written ({cause})", "correct --output, or the rights of its folder")]
    finally:
        with contextlib.suppress(Exception):
            storage.remove(probe)
            if not storage.is_remote(uri):
                os.rmdir(storage.normalise(uri))  # when the probe was all that it held


def multipart(uri: str) -> CheckResult:
    """Large files go up in parts."""
    content = os.urandom(IN_PARTS)
    try:
        with tempfile.NamedTemporaryFile() as file:
            file.write(content)
            file.flush()
            storage.copy_file(file.name, uri)
        if storage.read_bytes(uri) == content:
            return ok("multipart upload", "works")
        reason = "other bytes came back"
    except (UserError, OSError) as cause:
        reason = str(cause)
    return error("multipart upload", f"fails ({reason})", "checkpoints and shards need it: use another store")


def conditional(uri: str) -> CheckResult:
    """`If-None-Match: *` decides which of several schedulers takes a checkpoint."""
    if storage.create_bytes(uri, b"first") and not storage.create_bytes(uri, b"second"):
        return ok("conditional write", "works")
    return warning(
        "conditional write",
        "the store ignores If-None-Match: several schedulers of jobs/evaluate.py could take the same checkpoint",
        "run one scheduler only",
    )


def checksums() -> CheckResult:
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
        raise UserError(f"AWS_ENDPOINT_URL={redacted(endpoint)} is no address; write http://host:port")
    try:
        socket.create_connection((parts.hostname, parts.port or {"http": 80}.get(parts.scheme, 443)), 5).close()
    except OSError as cause:
        raise UserError(
            f"nothing answers at AWS_ENDPOINT_URL={redacted(endpoint)} ({cause}); start it or correct it"
        ) from cause


def places(config: "PretrainConfig", tracking: str) -> list[CheckResult]:
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
