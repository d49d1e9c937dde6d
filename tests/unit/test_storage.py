"""Local paths and s3:// through the same calls."""

import sys
import tomllib
from pathlib import Path

import pytest

from pipeline import libraries, storage
from pipeline.errors import UserError


@pytest.fixture(params=["local", "s3"])
def root(request, tmp_path):
    return str(tmp_path / "folder") if request.param == "local" else request.getfixturevalue("s3") + "/folder"


def test_write_read_list_remove(root):
    assert storage.list_files(root) == []
    storage.write_bytes(storage.join(root, "a", "one.bin"), b"0123456789")
    storage.write_json(storage.join(root, "two.json"), {"x": [1, 2]})
    assert storage.read_bytes(storage.join(root, "a/one.bin"), 2, 5) == b"234"
    assert storage.read_json(storage.join(root, "two.json")) == {"x": [1, 2]}
    listed = storage.list_files(root)
    assert next((file.path, file.size) for file in listed) == ("a/one.bin", 10)
    assert [file.path for file in storage.list_files(root, recursive=False)] == ["two.json"]
    assert storage.read_bytes(listed[0].uri) == b"0123456789"
    storage.remove(storage.join(root, "a"), recursive=True)
    storage.remove(storage.join(root, "never-there"))
    assert [file.path for file in storage.list_files(root)] == ["two.json"]
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(storage.join(root, "a/one.bin"))


def test_copy_tree_between_places(root, tmp_path):
    for i in range(5):
        storage.write_bytes(str(tmp_path / "source" / "deep" / f"{i}.bin"), bytes([i]) * 1000)
    storage.copy_tree(str(tmp_path / "source"), root)
    storage.copy_tree(root, str(tmp_path / "back"))
    for i in range(5):
        assert (tmp_path / "back" / "deep" / f"{i}.bin").read_bytes() == bytes([i]) * 1000


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(storage.os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        storage.write_bytes(str(tmp_path / "x.bin"), b"data")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("uri", ["gopher://x/y", "s3://"])
def test_addresses_that_cannot_be(uri):
    with pytest.raises(UserError, match="s3://bucket/prefix"):
        storage.filesystem(uri)


def test_no_credentials_is_a_clear_error(monkeypatch, s3_server):
    import s3fs

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(UserError, match="AWS_"):
        storage.read_bytes("s3://some-bucket/file")
    s3fs.S3FileSystem.clear_instance_cache()


def test_listing_page_by_page_finds_what_a_whole_listing_finds(s3):
    """More objects than fit on a page; names that URLs and patterns would trip over; no folder marker, no neighbour."""
    fs, root = storage.filesystem(s3)
    names = [f"{i % 7}/{i:04d}.jpg" for i in range(1005)] + ["日本 [1]*?#%20+&.jpg", "a b/<ü>.png"]
    bodies = {f"{root}/images/{name}": name.encode() for name in names}
    fs.pipe(bodies | {f"{root}/images/folder/": b"", f"{root}/images-too/1.jpg": b"x", f"{root}/other.jpg": b"x"})
    found = sorted(storage.iter_files(f"{s3}/images"), key=lambda file: file.path)
    assert found == storage.list_files(f"{s3}/images")
    assert {file.path: file.size for file in found} == {name: len(name.encode()) for name in names}
    assert storage.read_bytes(found[-1].uri) == found[-1].path.encode()
    assert list(storage.iter_files(f"{s3}/nothing")) == list(storage.iter_files("s3://no-such-bucket-at-all")) == []


def test_a_missing_library_of_an_extra_is_one_line_with_the_install_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)  # what `import s3fs` then meets is an ImportError
    with pytest.raises(UserError, match=r"s3fs is not installed.*pip install -c constraints.txt -e '.\[cloud\]'"):
        storage.exists("s3://bucket/photos")


def test_extras_and_the_errors_that_name_them_agree():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    for extra, packages in libraries.EXTRAS.items():
        assert set(project["optional-dependencies"][extra]) == set(packages)
