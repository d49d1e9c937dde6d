"""Link cycles, pipes, devices and kernel files: one line or a counted reject, and never an endless read."""

import os
import tarfile

import pyarrow as pa
import pytest

from pipeline import storage
from pipeline.data.sources import folder, items, listing, tar
from pipeline.data.sources.items import ScanOptions
from pipeline.errors import UserError
from pipeline.vtab.containers import Tree


@pytest.fixture(params=["pipe", "device", "link to a device", "kernel log"])
def endless(request, tmp_path):
    """A file that could be read endlessly."""
    path = tmp_path / "in" / "endless.png"
    path.parent.mkdir()
    if request.param == "pipe":
        os.mkfifo(path)
    elif request.param == "device":
        return "/dev/zero"
    else:
        path.symlink_to("/dev/zero" if "device" in request.param else "/proc/kmsg")
    return str(path)


def test_endless_files_are_refused(endless):
    with pytest.raises(UserError, match=r"endless\.png: a |/dev/zero: a "):
        storage.read_bytes(endless)
    with pytest.raises(UserError, match=r": a "), storage.open_file(endless):
        pass
    parent, _, name = endless.rpartition("/")
    files = pa.table({"path": [name], "size": [0]}, schema=items.LISTING)
    source = folder.scan(parent, files, ScanOptions(need_names=False))
    (item,) = folder.read(source, source.fragments)
    assert item.refused
    assert item.refused.reason == "unreadable"


def test_an_endless_archive_is_refused(tmp_path):
    os.mkfifo(tmp_path / "a.tar")
    files = pa.table({"path": ["a.tar"], "size": [0]}, schema=items.LISTING)
    with pytest.raises(UserError, match=r"a\.tar: a pipe"):
        tar.scan(str(tmp_path), files, ScanOptions())
    with pytest.raises(UserError, match=r"a\.tar: a pipe"):
        Tree(str(tmp_path / "a.tar")).names()


def test_a_link_that_leads_to_itself_is_a_reject(tmp_path):
    source = tmp_path / "in"
    (source / "a").mkdir(parents=True)
    (source / "a" / "one.png").write_bytes(b"picture")
    (source / "a" / "self.png").symlink_to(source / "a" / "self.png")
    (source / "a" / "ping").symlink_to(source / "a" / "pong")
    (source / "a" / "pong").symlink_to(source / "a" / "ping")
    found = listing.list_source(str(source))
    assert found["path"].to_pylist() == ["a/one.png", "a/ping", "a/pong", "a/self.png"]
    fragments = folder.scan(str(source), found, ScanOptions()).fragments
    refused = {i.key: bool(i.refused) for i in folder.read(folder.scan(str(source), found, ScanOptions()), fragments)}
    assert refused == {"a/one.png": False, "a/ping": True, "a/pong": True, "a/self.png": True}
    assert Tree(str(source)).names() == ["a/one.png"]
    with pytest.raises(UserError, match=r"self\.png"):
        listing.list_source(str(source / "a" / "self.png"))


def test_a_tar_without_members_is_not_read_endlessly(tmp_path):
    with tarfile.open(tmp_path / "empty.tar", "w"):
        pass
    files = pa.table({"path": [""], "size": [10240]}, schema=items.LISTING)
    source = tar.scan(str(tmp_path / "empty.tar"), files, ScanOptions())
    assert not list(tar.read(source, source.fragments))
