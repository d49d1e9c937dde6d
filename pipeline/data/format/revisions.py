"""Revisions of a dataset, which `prepare --append` and `prepare delete` create.

    manifest.json            the newest revision
    manifest@1.json          an older one, byte for byte as it was written; `FOLDER@1` opens it
    part-*.parquet           shards, which revisions share; part-rNNNN-* were written by revision N
    rejects.parquet          reports of revision 1; later ones have the revision in their names (rejects@2.parquet)
    deleted@3.parquet        hashes of the keys that were deleted up to revision 3 (deleted.py)

A revision is published by its manifest: the manifest before it is kept under its number first, then manifest.json is
replaced. A folder thus always has a complete newest revision. `FOLDER` is the newest revision.
"""

import contextlib
import itertools
import re
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from pipeline import storage
from pipeline.data.format.manifest import Manifest
from pipeline.errors import UserError, shorten
from pipeline.revision_names import MANIFEST, REPORTS, manifest_uri, name_of, report_name, split_address

_RAW = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".tar", ".tar.gz", ".tgz", ".zip")
_OLDER = re.compile(r"manifest@([1-9][0-9]{0,5})\.json")


def read_manifest(uri: str) -> tuple[str, Manifest]:
    """The folder and the manifest of a dataset or of one of its revisions. Raises UserError if there is none."""
    uri = storage.normalise(uri)
    folder, revision = split_address(uri)
    where = manifest_uri(uri)
    try:
        manifest = Manifest.from_json(storage.read_bytes(where), where)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"{uri}: {_why_none(folder)}") from error
    if revision is not None and manifest.revision != revision:
        there = ", ".join(f"@{number}" for number in sorted(revisions(folder)))
        raise UserError(f"{uri}: {folder} has no revision {revision}; it has {there}")
    return folder, manifest


def _why_none(folder: str) -> str:
    """Why a folder without a manifest cannot be opened: nothing was prepared, or it holds the splits of a dataset."""
    try:
        splits = find_datasets(folder)
    except (UserError, OSError):  # a store that cannot list
        splits = []
    if not splits:
        if raw := _first_image(folder):
            return f"images such as {raw}, but no dataset; make one with python jobs/prepare.py --source {folder} --output FOLDER"
        return f"no dataset here ({MANIFEST} is missing: not prepared, or not finished)"
    names = [split.rpartition("/")[2] for split in splits]
    example = next((split for split, name in zip(splits, names, strict=True) if name.startswith("train")), splits[0])
    return f"no dataset here, but in its folders {shorten(names, 6)}; name one of them, such as {example}"


def _first_image(folder: str) -> str | None:
    """The name of an image or archive in a folder or in its first subfolder, as in a source of `prepare`."""
    with contextlib.suppress(UserError, OSError):
        first = next(iter(sorted(storage.list_folders(folder))), "")
        for place in (folder, storage.join(folder, first)):
            for file in itertools.islice(storage.iter_files(place, recursive=False), 100):
                if file.path.lower().endswith(_RAW):
                    return file.path
    return None


def find_datasets(folder: str, depth: int = 1) -> list[str]:
    """The folder if it is a dataset, otherwise the datasets below it, such as its splits, sorted; empty without any.

    depth: how many levels of folders to search (2: the splits of each task of VTAB)."""
    if storage.exists(storage.join(folder, MANIFEST)):
        return [folder]
    if not depth:
        return []
    below = (storage.join(folder, name) for name in storage.list_folders(folder) if not name.startswith(("_", ".")))
    return [dataset for one in below for dataset in find_datasets(one, depth - 1)]


def revisions(folder: str) -> dict[int, Manifest]:
    """{revision: manifest} of all revisions of a dataset, oldest first. Raises UserError when there is no dataset."""
    folder, newest = read_manifest(folder)
    found = {}
    for file in storage.list_files(folder, recursive=False):
        if match := _OLDER.fullmatch(file.path):
            found[int(match[1])] = Manifest.from_json(storage.read_bytes(file.uri), file.uri)
    found[newest.revision] = newest  # a stopped publication may have copied it already
    return dict(sorted(found.items()))


def publish(folder: str, manifest: Manifest) -> None:
    """Publishes a manifest as the newest revision, after its shards and reports were written. May be repeated after a
    stop. Raises UserError if the newest revision is neither the one from which the change began nor this one."""
    where = storage.join(folder, MANIFEST)
    text = storage.read_bytes(where)
    before = Manifest.from_json(text, where)
    began_from = manifest.history[-2]["revision"] if len(manifest.history) > 1 else 1
    is_same = before.revision == manifest.revision and before.history[:-1] == manifest.history[:-1]
    if is_same:
        last, new = before.history[-1], manifest.history[-1]
        is_same = all(last.get(name) == new.get(name) for name in ("kind", "keys", "input_fingerprint"))
    if before.revision != began_from and not is_same:
        raise UserError(
            f"{folder}: another command made revision {before.revision} while this one made revision "
            f"{manifest.revision} from revision {began_from}; nothing was published, remove {folder}/_work and repeat it"
        )
    if before.revision < manifest.revision:
        storage.write_bytes(storage.join(folder, name_of(MANIFEST, before.revision)), text)
    storage.write_bytes(where, manifest.to_json().encode())


def successor(before: Manifest, revision: int, entry: dict[str, Any], **changes: Any) -> Manifest:
    """The manifest of the next revision. entry: the fields of its entry in `history`, without the number."""
    return replace(before, revision=revision, history=[*before.history, {"revision": revision, **entry}], **changes)


def known_files(manifests: Iterable[Manifest]) -> set[str]:
    """Names of all files of these revisions of a dataset, except manifest.json."""
    names: set[str] = set()
    for manifest in manifests:
        names |= {shard.name for shard in manifest.shards}
        names |= {report_name(name, manifest.revision) for name in REPORTS}
        names.add(name_of(MANIFEST, manifest.revision))
    return names
