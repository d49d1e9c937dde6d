"""The object stores, one module per address scheme. Use them through `pipeline.storage`."""

import functools
import importlib
import os
import threading
from types import ModuleType
from typing import Any

from pipeline.errors import UserError
from pipeline.stores.azure import AzureStore
from pipeline.stores.base import BLOCK, Entry, ObjectStore, expect_answers
from pipeline.stores.gcs import GoogleStore
from pipeline.stores.huggingface import HuggingFaceStore
from pipeline.stores.s3 import S3Store
from pipeline.stores.web import WebStore

__all__ = [
    "BLOCK",
    "SCHEMES",
    "Entry",
    "ObjectStore",
    "arrow_filesystem",
    "expect_answers",
    "kind_of",
    "make_store",
    "store_of",
]

SCHEMES: dict[str, type[ObjectStore]] = {
    "s3": S3Store,
    "gs": GoogleStore,
    "az": AzureStore,
    "hf": HuggingFaceStore,
    "https": WebStore,
    "http": WebStore,
}
"""Scheme of an address -> its store. The libraries are extras of pyproject.toml: `pipeline.libraries.EXTRAS`."""

_making = threading.Lock()  # botocore cannot create sessions in two threads at once


def kind_of(uri: str) -> type[ObjectStore]:
    """The store class of an address. Raises UserError for an unsupported scheme and for an address without a bucket."""
    scheme, _, path = uri.partition("://")
    kind = SCHEMES.get(scheme)
    if kind is None:
        examples = dict.fromkeys(kind.EXAMPLE for kind in SCHEMES.values())
        raise UserError(f"{uri}: {scheme}:// is not supported; use a local path, {', '.join(examples)}")
    if not path.strip("/"):
        raise UserError(f"{uri}: no {kind.ROOT}; use {kind.EXAMPLE}")
    return kind


def store_of(uri: str) -> ObjectStore:
    """This process's store for an address, with the current settings of the environment."""
    kind = kind_of(uri)
    with _making:
        return _shared(kind, os.getpid(), *map(os.environ.get, kind.SETTINGS))


@functools.lru_cache(maxsize=16)
def _shared(kind: type[ObjectStore], *settings: Any) -> ObjectStore:
    return kind()


def make_store(uri: str) -> ObjectStore:
    """A separate store for the caller, with its own count of retries, which the caller may close."""
    kind = kind_of(uri)
    with _making:
        return kind()


def arrow_filesystem(uri: str) -> Any:
    """The fsspec filesystem of an address, for the files that Ray Train writes."""
    module: ModuleType = importlib.import_module(kind_of(uri).__module__)
    return module.arrow_filesystem()
