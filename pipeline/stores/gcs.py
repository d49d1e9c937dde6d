"""gs:// addresses: Google Cloud Storage, through gcsfs.

Credentials are Google's application default credentials: GOOGLE_APPLICATION_CREDENTIALS, `gcloud auth
application-default login`, or the service account of the machine. Without any, requests are anonymous, which public
buckets allow. STORAGE_EMULATOR_HOST names another server, which is used without credentials.
"""

import base64
import contextlib
import json
import logging
import os
import uuid
from typing import Any

from pipeline.errors import UserError
from pipeline.libraries import import_library
from pipeline.stores import base
from pipeline.stores.base import After, Entry, IncompleteResponse, ObjectStore, check_length, split, split_folder

logging.getLogger("gcsfs").setLevel(
    logging.CRITICAL
)  # it logs every failed attempt as an error; pipeline.retry does that

IN_PARTS = 8 << 20  # files from this size in bytes are uploaded in parts; gcsfs's default is 5 MiB
PAGE = "items(name,size,generation),prefixes,nextPageToken"  # the requested fields of a listing


class GoogleStore(ObjectStore):
    EXAMPLE = "gs://bucket/prefix"
    ENDPOINT = "STORAGE_EMULATOR_HOST"
    SETTINGS = ("STORAGE_EMULATOR_HOST", "GOOGLE_APPLICATION_CREDENTIALS", "GOOGLE_CLOUD_PROJECT")
    ACCESS = (
        "check the roles of the account on the bucket, and GOOGLE_APPLICATION_CREDENTIALS or `gcloud auth "
        "application-default login`"
    )
    REMEDY = "check that the store is up, the bucket's name and STORAGE_EMULATOR_HOST"

    def __init__(self) -> None:
        super().__init__()
        self._fs = _filesystem(base.READ_TIMEOUT, repeats=False)
        self._uploads: Any = None

    @classmethod
    def endpoint(cls, uri: str) -> str:
        host = os.environ.get("STORAGE_EMULATOR_HOST", "").rstrip("/")
        return f"http://{host}" if host and "://" not in host else host

    @classmethod
    def lists_by_name(cls, uri: str) -> bool:
        return True

    def _get(self, uri: str, start: int, end: int | None, exact: bool) -> bytes:
        if not start and end is None:
            return self._fs.cat_file(_path(uri))
        data = self._fs.cat_file(_path(uri), start, end)
        return check_length(data, lambda: self._head(uri).size, start, end, uri if exact else None)

    def _head(self, uri: str) -> Entry:
        found = self._fs.call("GET", "b/{}/o/{}", *split(uri), fields="size,generation", json_out=True)
        return Entry("", int(found["size"]), found["generation"])

    def _page(self, uri: str, recursive: bool, token: Any, limit: int | None) -> tuple[list[Entry], Any]:
        bucket, prefix = split_folder(uri)
        options = {"delimiter": None if recursive else "/", "maxResults": limit}
        # the page of startOffset includes a file with this name, which is removed below
        options |= {"startOffset": prefix + token} if isinstance(token, After) else {"pageToken": token}
        page = self._fs.call("GET", "b/{}/o", bucket, prefix=prefix, fields=PAGE, json_out=True, **options)
        folders = [Entry(name[len(prefix) :].rstrip("/"), 0, "", is_folder=True) for name in page.get("prefixes", ())]
        files = [
            Entry(found["name"][len(prefix) :], int(found["size"]), found["generation"])
            for found in page.get("items", ())
            if not found["name"].endswith("/") and not (isinstance(token, After) and found["name"] == prefix + token)
        ]
        return folders + files, page.get("nextPageToken") or None

    def _put(self, uri: str, data: bytes, new: bool) -> None:
        """new: the store decides (ifGenerationMatch=0). Does not use gcsfs's `pipe_file`, which always uses the same
        multipart separator: a file that contains it would be truncated."""
        bucket, key = split(uri)
        between = uuid.uuid4().hex.encode()
        head = b"--%b\r\nContent-Type: application/json\r\n\r\n%b\r\n--%b\r\n"
        head += b"Content-Type: application/octet-stream\r\n\r\n"
        body = b"".join(
            (head % (between, json.dumps({"name": key}).encode(), between), data, b"\r\n--%b--\r\n" % between)
        )
        import google_crc32c  # here, because machines that only run tests/benchmarks/gpu.py lack it

        found = self._fs.call(
            "POST",
            f"{self._fs.base.replace('/storage/v1/', '/upload/storage/v1/')}b/{{}}/o",
            bucket,
            uploadType="multipart",
            ifGenerationMatch="0" if new else None,
            fields="crc32c",
            headers={"Content-Type": f"multipart/related; boundary={between.decode()}"},
            data=body,
            json_out=True,
        )
        if base64.b64decode(found["crc32c"]) != google_crc32c.Checksum(data).digest():
            raise IncompleteResponse("the store has other bytes than were sent")

    def _put_file(self, uri: str, path: str) -> None:
        if os.path.getsize(path) < IN_PARTS:
            with open(path, "rb") as file:
                self._put(uri, file.read(), new=False)
            return
        with self._lock:
            if self._uploads is None:
                self._uploads = _filesystem(base.PART_TIMEOUT, repeats=True)
        try:
            self._uploads.put_file(path, _path(uri))
        except FileNotFoundError as error:
            # After a failure gcsfs cancels the upload. If the cancellation fails, too, the first failure is reported.
            if isinstance(error.__context__, Exception):
                raise error.__context__ from None
            raise

    def _delete(self, uri: str) -> None:
        self._fs.rm_file(_path(uri))

    # ------------------------------------------------------------ errors

    def _status(self, error: Exception) -> int:
        if isinstance(error, OSError) and str(error).startswith("Forbidden"):  # gcsfs's error for status 403
            return 403
        if isinstance(error, ValueError) and str(error).startswith(
            "Bad Request"
        ):  # any status, with "invalid" in its text
            return 400
        with contextlib.suppress(TypeError, ValueError):
            status = int(getattr(error, "code", 0) or 0)
            refreshing = error.__cause__  # gcsfs reports a failed refresh of the credentials as status 401
            return 503 if status == 401 and getattr(refreshing, "retryable", False) else status
        return 0

    def _may_pass(self, error: Exception) -> bool:
        from aiohttp import ClientError
        from gcsfs.retry import ChecksumError
        from google.auth.exceptions import TransportError
        from requests.exceptions import RequestException

        return isinstance(
            error,
            (ClientError, TimeoutError, ChecksumError, TransportError, RequestException, json.JSONDecodeError, OSError),
        )


def _path(uri: str) -> str:
    return "/".join(split(uri))


def _filesystem(timeout: float, repeats: bool) -> Any:
    """gcsfs's filesystem. repeats: whether it retries requests on its own."""
    core: Any = import_library("gcsfs.core")
    from aiohttp import ClientTimeout

    kind = core.GCSFileSystem
    if not repeats:
        kind = type("OneAttempt", (kind,), {"_request": kind._request.__wrapped__})
    return make_filesystem(
        kind,
        access="read_write",
        consistency="md5",  # checks uploads
        requests_timeout=ClientTimeout(total=None, sock_connect=base.CONNECT_TIMEOUT, sock_read=timeout),
        session_kwargs={"trust_env": True},
        skip_instance_cache=True,
    )


def make_filesystem(kind: Any, **options: Any) -> Any:
    """The filesystem with the credentials and the endpoint of the environment. Raises UserError if
    GOOGLE_APPLICATION_CREDENTIALS is invalid.
    """
    from google.auth.exceptions import GoogleAuthError

    options |= {"use_listings_cache": False, "endpoint_url": GoogleStore.endpoint("") or None}
    if GoogleStore.endpoint(""):
        return kind(token="anon", **options)
    try:
        return kind(token="google_default", **options)
    except (GoogleAuthError, ValueError, OSError) as error:
        if named := os.environ.get("GOOGLE_APPLICATION_CREDENTIALS"):
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(f"GOOGLE_APPLICATION_CREDENTIALS={named}: {reason}") from error
        return kind(token="anon", **options)


def arrow_filesystem() -> Any:
    """The fsspec filesystem, for the files that Ray Train writes."""
    return make_filesystem(import_library("gcsfs.core").GCSFileSystem)
