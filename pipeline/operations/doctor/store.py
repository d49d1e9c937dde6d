"""Storage checks: reading the data, writing the output, and the features that checkpoints and schedulers need."""

import contextlib
import os
import socket
import tempfile
import urllib.parse
import uuid
from typing import TYPE_CHECKING

from pipeline import address, storage
from pipeline.credentials import redacted
from pipeline.errors import UserError
from pipeline.operations.doctor.finding import CheckResult, error, ok, refused, warning
from pipeline.revision_names import manifest_uri
from pipeline.stores import kind_of

if TYPE_CHECKING:
    from pipeline.training.config import PretrainConfig

IN_PARTS = (16 << 20) + 1  # bytes of a multipart upload with three parts
_CHECKSUMS = "export AWS_REQUEST_CHECKSUM_CALCULATION=when_required AWS_RESPONSE_CHECKSUM_VALIDATION=when_required"


def data_sets(text: str) -> list[str]:
    """The datasets of --data; none for an invalid mixture, which the check of the run reports."""
    try:
        return [storage.normalise(uri) for uri in address.uris(text)]
    except UserError:
        return []


def readable(uri: str) -> CheckResult:
    """Checks access to the dataset by reading one byte of its manifest."""
    try:
        _reachable(uri)
        storage.read_bytes(manifest_uri(uri), 0, 1)
    except UserError as cause:
        return refused("data", cause)
    except FileNotFoundError:
        return error(
            "data",
            f"{uri} has no manifest.json, so it is not a finished dataset",
            "run jobs/prepare.py, or correct --data",
        )
    except OSError as cause:
        return error("data", f"{uri}: {cause}", "correct --data, or the permissions of its folder")
    return ok("data", f"{uri} can be read")


def writable(uri: str) -> list[CheckResult]:
    """Writes a test file, reads it back completely and partially, and removes it. On an object store also tests uploads in
    parts and conditional writes."""
    probe = storage.join(uri, f".doctor-{uuid.uuid4().hex}")
    content = os.urandom(1024)
    try:
        _reachable(uri)
        storage.write_bytes(probe, content)
        if storage.read_bytes(probe, 10, 20) != content[10:20]:
            return [
                error(
                    "output",
                    f"{uri} returns different bytes than were written",
                    "use a store that supports byte ranges",
                )
            ]
        findings = [ok("output", f"{uri} can be written and read")]
        if storage.is_remote(uri):
            findings += [multipart(probe), *([checksums()] if uri.startswith("s3://") else [])]
        storage.remove(probe)
        if storage.exists(probe):
            findings.append(
                warning(
                    "removal",
                    f"{probe} cannot be removed, and neither can old checkpoints",
                    "allow removal there (s3:DeleteObject, storage.objects.delete)",
                )
            )
        elif storage.is_remote(uri):
            findings.append(conditional(probe))
        return findings
    except UserError as cause:
        if "MissingContentLength" in str(cause):
            return [
                error(
                    "checksum mode", f"{uri} requires a Content-Length for uploads, which checksums prevent", _CHECKSUMS
                )
            ]
        return [refused("output", cause)]
    except OSError as cause:
        return [
            error("output", f"{uri} cannot be written ({cause})", "correct --output, or the permissions of its folder")
        ]
    finally:
        with contextlib.suppress(Exception):
            storage.remove(probe)
            if not storage.is_remote(uri):
                os.rmdir(storage.normalise(uri))  # only if it is empty


def multipart(uri: str) -> CheckResult:
    """Checks multipart uploads, which large files need."""
    content = os.urandom(IN_PARTS)
    try:
        with tempfile.NamedTemporaryFile() as file:
            file.write(content)
            file.flush()
            storage.copy_file(file.name, uri)
        if storage.read_bytes(uri) == content:
            return ok("multipart upload", "works")
        reason = "different bytes were read back"
    except (UserError, OSError) as cause:
        reason = str(cause)
    return error("multipart upload", f"fails ({reason})", "checkpoints and shards need it; use another store")


def conditional(uri: str) -> CheckResult:
    """Checks conditional writes ("only if there is no such file"), with which several schedulers claim checkpoints."""
    if storage.create_bytes(uri, b"first") and not storage.create_bytes(uri, b"second"):
        return ok("conditional write", "works")
    return warning(
        "conditional write",
        "the store ignores their condition: several schedulers of jobs/evaluate.py could take the same checkpoint",
        "run one scheduler only",
    )


def checksums() -> CheckResult:
    """Checks the checksum mode. By default the SDK sends chunked bodies with checksums, which some stores reject with
    411."""
    mode = os.environ.get("AWS_REQUEST_CHECKSUM_CALCULATION", "")
    if mode != "when_required" and os.environ.get("AWS_ENDPOINT_URL"):
        return warning("checksum mode", f"{mode}: stores other than AWS may reject uploads", _CHECKSUMS)
    return ok("checksum mode", f"{mode}: supported by every store" if mode == "when_required" else mode)


def _reachable(uri: str) -> None:
    """Raises UserError immediately if the server that the environment names is
    unreachable; otherwise requests would be retried for minutes."""
    if not storage.is_remote(uri):
        return
    kind = kind_of(uri)
    endpoint = kind.endpoint(uri)
    if not endpoint:
        return
    where = f"{kind.ENDPOINT}={redacted(endpoint)}" if kind.ENDPOINT else redacted(endpoint)
    try:
        parts = urllib.parse.urlsplit(endpoint)
        host, port = parts.hostname, parts.port or {"http": 80}.get(parts.scheme, 443)
    except ValueError:  # the port is not a number
        host, port = None, 0
    if not host:
        raise UserError(f"{where} is not a URL; write http://host:port")
    try:
        socket.create_connection((host, port), 5).close()
    except OSError as cause:
        raise UserError(f"no response from {where} ({cause}); start it or correct it") from cause


def places(config: "PretrainConfig", tracking: str) -> list[CheckResult]:
    """Warns about local paths in a run on several machines."""
    import ray

    if len({node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}) < 2:
        return []
    found = {
        "--data": data_sets(config.runtime.data),
        "--output": [config.runtime.output],
        "--validation": [config.runtime.validation or "s3://"],
    }
    local = [f"{flag} {uri}" for flag, uris in found.items() for uri in uris if not storage.is_remote(uri)]
    host = urllib.parse.urlsplit(tracking).hostname
    if tracking.startswith("sqlite") or host in ("localhost", "127.0.0.1", "::1"):
        local.append(f"the tracking server {tracking}")
    if not local:
        return [ok("places", "every node sees the same data, output and tracking server")]
    return [
        warning(
            "places",
            f"{', '.join(local)}: each machine of a cluster has its own",
            "use a store (s3://, gs://) and a server's address, or make sure that the folder is shared",
        )
    ]
