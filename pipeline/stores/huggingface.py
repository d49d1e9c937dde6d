"""hf:// addresses, read only: data sets on the Hugging Face Hub, as hf://datasets/OWNER/NAME[@REVISION]/PATH.

huggingface_hub parses the address, builds the URL of a file and finds the token (HF_TOKEN, or the file of `hf auth
login`). Requests use `pipeline.stores.web` instead of HfFileSystem, which retries on its own, lists a folder for each
file that it opens, and never refreshes listings. HF_ENDPOINT names a server other than the Hub.
"""

import json
import os
import re
import urllib.parse
from typing import Any

from pipeline.errors import UserError
from pipeline.libraries import import_library
from pipeline.stores.base import Entry
from pipeline.stores.web import WebStore

HUB = "https://huggingface.co"
NEXT = re.compile(r'<([^>]+)>;\s*rel="next"')  # in the Link header of a page


class HuggingFaceStore(WebStore):
    EXAMPLE = "hf://datasets/owner/name"
    ROOT = "data set"
    LISTS = True
    ENDPOINT = "HF_ENDPOINT"
    SETTINGS = ("HF_ENDPOINT", "HF_TOKEN")
    ACCESS = "check the name, accept the conditions of the data set on its page, and set HF_TOKEN (or `hf auth login`)"
    REMEDY = "check that the server is up, the address and HF_ENDPOINT"

    def __init__(self) -> None:
        super().__init__()
        self._hub: Any = import_library("huggingface_hub")
        token = self._hub.get_token()
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}

    @classmethod
    def endpoint(cls, uri: str) -> str:
        return os.environ.get("HF_ENDPOINT", "").rstrip("/") or HUB

    def _login(self, endpoint: str) -> dict[str, str]:
        """The token; logins of ~/.netrc are for other servers."""
        return self._headers

    def _address(self, uri: str) -> str:
        if not uri.startswith("hf://"):  # a page of a listing
            return uri
        place = self._parse(uri)
        if not place.path_in_repo:
            raise FileNotFoundError(f"{uri}: a data set, not a file")
        return self._hub.hf_hub_url(
            place.id,
            place.path_in_repo,
            repo_type="dataset",
            revision=place.revision or "main",
            endpoint=self.endpoint(uri),
        )

    def _parse(self, uri: str) -> Any:
        """The parts of an address. Raises UserError unless it is the address of a data set."""
        from huggingface_hub.utils import parse_hf_uri

        if not uri.startswith("hf://datasets/"):
            raise UserError(f"{uri}: not a data set; use hf://datasets/OWNER/NAME[@REVISION]/PATH")
        try:
            return parse_hf_uri(uri)
        except ValueError as error:
            raise UserError(f"{uri}: {error}; use hf://datasets/OWNER/NAME[@REVISION]/PATH") from error

    def _page(self, uri: str, recursive: bool, token: Any, limit: int | None) -> tuple[list[Entry], Any]:
        """token: the address of the page, from the server."""
        place = self._parse(uri)
        prefix = f"{place.path_in_repo.rstrip('/')}/" if place.path_in_repo else ""
        if token is None:
            revision = urllib.parse.quote(place.revision or "main", safe="")
            path = "/" + urllib.parse.quote(prefix.rstrip("/")) if prefix else ""
            options = {"recursive": str(recursive).lower(), **({"limit": limit} if limit else {})}
            where = f"{self.endpoint(uri)}/api/datasets/{place.id}/tree/{revision}{path}"
            token = f"{where}?{urllib.parse.urlencode(options)}"
        headers, page = self._ask(token, None)
        try:
            found = [
                Entry(
                    entry["path"].removeprefix(prefix),
                    int(entry.get("size") or 0),
                    entry.get("oid", ""),
                    is_folder=entry["type"] == "directory",
                )
                for entry in json.loads(page)
                if entry["path"].startswith(prefix) and (entry["type"] == "file" or not recursive)
            ]
        except (AttributeError, LookupError, OverflowError, RecursionError, TypeError, ValueError) as error:
            raise UserError(
                f"{uri}: the server does not answer like the Hub ({type(error).__name__}); {self.REMEDY}"
            ) from error
        following = NEXT.search(headers.get("Link", ""))
        return found, following[1] if following else None
