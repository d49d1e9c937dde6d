"""az:// addresses: Azure Blob Storage, as az://container/prefix.

adlfs reads the AZURE_STORAGE_* variables and finds the credentials: a connection string, or an account with a key, a
SAS token, a service principal, or the result of Azure's DefaultAzureCredential (`az login`, a managed identity).
Requests use the Azure SDK client that adlfs creates, because adlfs loses `#` and `?` in names and reports refused
requests as missing files.
"""

import logging
import os
from collections.abc import Coroutine
from typing import Any

from pipeline.credentials import redacted
from pipeline.errors import UserError
from pipeline.libraries import import_library
from pipeline.stores import base
from pipeline.stores.base import Entry, IncompleteResponse, ObjectStore, split, split_folder, too_short

logging.getLogger("azure").setLevel(logging.ERROR)  # it logs every request, and pages about missing credentials

CONNECTION = "AZURE_STORAGE_CONNECTION_STRING"
THREADS = 4  # parts of a large file that are uploaded in parallel


class AzureStore(ObjectStore):
    EXAMPLE = "az://container/prefix"
    ROOT = "container"
    ENDPOINT = f"{CONNECTION}: BlobEndpoint"
    RESENDS = True  # aiohttp does this once if a connection is closed before a response
    SETTINGS = (
        CONNECTION,
        "AZURE_STORAGE_ACCOUNT_NAME",
        "AZURE_STORAGE_ACCOUNT_KEY",
        "AZURE_STORAGE_SAS_TOKEN",
        "AZURE_STORAGE_CLIENT_ID",
        "AZURE_STORAGE_CLIENT_SECRET",
        "AZURE_STORAGE_TENANT_ID",
        "AZURE_STORAGE_ANON",
    )
    ACCESS = "check the AZURE_STORAGE_* credentials, and the roles of the account on the container"
    REMEDY = f"check that the store is up, the container's name, AZURE_STORAGE_ACCOUNT_NAME and {CONNECTION}"

    def __init__(self) -> None:
        super().__init__()
        self._fs = arrow_filesystem()
        self._once = {"retry_total": 0, "connection_timeout": base.CONNECT_TIMEOUT, "read_timeout": base.READ_TIMEOUT}

    @classmethod
    def endpoint(cls, uri: str) -> str:
        parts = (part.partition("=") for part in os.environ.get(CONNECTION, "").split(";"))
        address = next((value for name, _, value in parts if name.strip().lower() == "blobendpoint"), "")
        return "/".join(address.split("/")[:3])  # in an emulator, the account follows

    def _ask(self, request: Coroutine[Any, Any, Any]) -> Any:
        from fsspec.asyn import sync

        return sync(self._fs.loop, lambda: request)

    def _blob(self, uri: str) -> Any:
        return self._fs.service_client.get_blob_client(*split(uri))

    def _get(self, uri: str, start: int, end: int | None, exact: bool) -> bytes:
        async def download() -> tuple[bytes, int]:
            length = None if end is None else end - start
            stream = await self._blob(uri).download_blob(start if length or start else None, length, **self._once)
            return await stream.readall(), stream.size

        data, size = self._ask(download())
        if len(data) != size:
            raise IncompleteResponse(f"{len(data)} of {size} bytes at {start}")
        if exact and end is not None and size < end - start:
            raise too_short(uri, data, start, end)
        return data

    def _head(self, uri: str) -> Entry:
        found = self._ask(self._blob(uri).get_blob_properties(**self._once))
        return Entry("", found.size, found.etag)

    def _page(self, uri: str, recursive: bool, token: Any, limit: int | None) -> tuple[list[Entry], Any]:
        bucket, prefix = split_folder(uri)
        container = self._fs.service_client.get_container_client(bucket)
        find = container.list_blobs if recursive else container.walk_blobs

        async def page() -> tuple[list[Any], Any]:
            # The metadata distinguish folders from files in accounts with a hierarchical namespace.
            found = find(name_starts_with=prefix, include=["metadata"], results_per_page=limit, **self._once)
            pages = found.by_page(continuation_token=token)
            items = [item async for item in await anext(pages)]
            return items, pages.continuation_token

        try:
            items, following = self._ask(page())
        except StopAsyncIteration:
            return [], None
        entries = []
        for item in items:
            path = item.name[len(prefix) :]
            if path.endswith("/") and not recursive:
                entries.append(Entry(path.rstrip("/"), 0, "", is_folder=True))
            elif not path.endswith("/") and not (item.metadata or {}).get("hdi_isfolder"):
                entries.append(Entry(path, item.size, item.etag))
        return entries, following or None

    def _put(self, uri: str, data: bytes, new: bool) -> None:
        """new: sends If-None-Match: *, so that the store decides."""
        self._ask(self._blob(uri).upload_blob(data, length=len(data), overwrite=not new, **self._once))

    def _put_file(self, uri: str, path: str) -> None:
        options = {"retry_total": base.PART_ATTEMPTS - 1, "connection_timeout": base.CONNECT_TIMEOUT}
        with open(path, "rb") as file:
            blob, size = self._blob(uri), os.path.getsize(path)
            options |= {"read_timeout": base.PART_TIMEOUT, "max_concurrency": THREADS}
            self._ask(blob.upload_blob(file, length=size, overwrite=True, **options))

    def _delete(self, uri: str) -> None:
        self._ask(self._blob(uri).delete_blob(**self._once))

    # ------------------------------------------------------------ errors

    def _status(self, error: Exception) -> int:
        if (
            getattr(error, "error_code", None) == "BlobAlreadyExists"
        ):  # Azure's response with status 409, which otherwise is temporary
            return 412
        return int(getattr(error, "status_code", None) or 0)

    def _unsent(self, error: Exception) -> str | None:
        from azure.core.exceptions import ClientAuthenticationError

        if isinstance(error, ClientAuthenticationError) and error.response is None:
            return f"no credentials ({str(error).splitlines()[0]}); {self.ACCESS}"
        return None

    def _may_pass(self, error: Exception) -> bool:
        from azure.core.exceptions import AzureError

        return isinstance(error, (AzureError, TimeoutError, OSError))


def arrow_filesystem() -> Any:
    """The adlfs filesystem with the credentials of the environment, for the files that Ray Train writes. Raises
    UserError if the environment names no account or an invalid one.
    """
    adlfs: Any = import_library("adlfs")
    if not (os.environ.get(CONNECTION) or os.environ.get("AZURE_STORAGE_ACCOUNT_NAME")):
        raise UserError(f"az:// addresses: no storage account; set AZURE_STORAGE_ACCOUNT_NAME, or {CONNECTION}")
    try:
        return adlfs.AzureBlobFileSystem(skip_instance_cache=True, use_listings_cache=False)
    except ValueError as error:
        raise UserError(f"AZURE_STORAGE_* settings: {redacted(str(error).splitlines()[0])}") from error
