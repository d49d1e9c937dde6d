"""Duplicate search: what is the same is found, what is not is left alone, and the banded join agrees with all pairs."""

import logging

import cv2
import numpy as np
import pytest
import simplejpeg

from pipeline import workqueue
from pipeline.data.duplicates.candidates import (
    KEY,
    PIXELS,
    Removal,
    candidate_keys,
    match_rows,
    select_removals,
    unique_pairs,
)
from pipeline.data.duplicates.evaluation import index_evaluation_sets
from pipeline.data.duplicates.hashes import MIRROR, ROW, hamming, hash_image
from pipeline.data.duplicates.verification import compare_views, small_copy
from pipeline.data.format import write_dataset
from pipeline.errors import UserError
from tests.images import crop, textured

CHANGES = {
    "same": lambda p: p,
    "JPEG quality 50": lambda p: simplejpeg.decode_jpeg(simplejpeg.encode_jpeg(p, 50, "RGB", "420")),
    "half size": lambda p: cv2.resize(p, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA),
    "32 x 32": lambda p: cv2.resize(p, (32, 32), interpolation=cv2.INTER_AREA),
    "mirrored": lambda p: p[:, ::-1],
    "brighter": lambda p: np.clip(p * 1.15, 0, 255).astype(np.uint8),
    "grey": lambda p: np.repeat(cv2.cvtColor(p, cv2.COLOR_RGB2GRAY)[:, :, None], 3, axis=2),
    "centre 90%": crop,
    "corner 90%, mirrored": lambda p: crop(p, y=0, x=1)[:, ::-1],
}


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    uri = str(tmp_path_factory.mktemp("eval") / "set")
    rows = [(f"test/{i}", simplejpeg.encode_jpeg(textured(i), 92, "RGB", "420"), 0, 320, 240) for i in range(40)]
    write_dataset(uri, rows, classes=["a"], row_group_bytes=200_000)
    with workqueue.without_ray():
        return index_evaluation_sets([uri], 10**8)


@pytest.mark.parametrize("change", CHANGES)
def test_changed_images_are_found(index, change):
    for i in (0, 7, 39):
        pixels = CHANGES[change](textured(i))
        match = index.find(hash_image(pixels, crops=True), pixels, distance=30)
        assert match is not None
        assert index.name(match.image)[1] == f"test/{i}"


def test_other_images_are_not(index):
    photos = [textured(seed) for seed in range(100, 200)]
    assert [index.find(hash_image(pixels, crops=True), pixels, 30) for pixels in photos] == [None] * 100


def test_flat_images_match_only_exactly(tmp_path):
    flat = np.full((32, 32, 3), 200, np.uint8)
    nearly = flat.copy()
    nearly[3, 3] = 201
    png = cv2.imencode(".png", flat)[1].tobytes()
    write_dataset(str(tmp_path), [("flat", png, 0, 32, 32)], classes=["a"])
    index = index_evaluation_sets([str(tmp_path)], 10**8)
    match = index.find(hash_image(flat, crops=True), flat, 30)
    assert match is not None
    assert (match.image, match.distance, match.exact) == (0, 0, True)
    assert index.find(hash_image(nearly, crops=True), nearly, 30) is None


def test_mirroring_inverts_known_bits():
    pixels = textured(3)
    plain, mirrored = hash_image(pixels), hash_image(pixels[:, ::-1])
    assert hamming(plain.bits ^ MIRROR, mirrored.bits)[0] <= 2
    assert plain.exact != mirrored.exact


def table(bits, exact=None, keys=None):
    rows = np.zeros(len(bits), ROW)
    rows["bits"] = bits
    rows["exact"] = np.arange(len(bits)) + 1 if exact is None else exact
    rows["key"] = np.arange(len(bits)) + 1 if keys is None else keys
    return rows


def join(tables, keys=False, exact=True, near=True, distance=12, buckets=3):
    """The Ray Data job of `prepare`, by hand."""
    parts = [candidate_keys(rows, unit, keys, exact, near) for unit, rows in enumerate(tables)]
    lines = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    bucket = (lines["join"] >> np.uint64(40)) % np.uint64(buckets)
    found = [match_rows({k: v[bucket == b] for k, v in lines.items()}, distance) for b in range(buckets)]
    pairs = unique_pairs({name: np.concatenate([pairs[name] for pairs in found]) for name in found[0]})
    return pairs | {"detail": np.ones(len(pairs["first"]))}


def test_the_join_finds_what_all_pairs_find():
    rng = np.random.default_rng(0)
    base = rng.integers(0, 2**63, (300, 2), dtype=np.uint64)
    copies = base[:60].copy()
    for i in range(60):  # up to six bits differ, so that two of eight bands agree
        for bit in rng.choice(128, i % 7, replace=False):
            copies[i, bit // 64] ^= np.uint64(1) << np.uint64(bit % 64)
    copies[30:] ^= MIRROR
    pairs = join([table(base), table(copies, exact=np.arange(1000, 1060))])
    found = set(zip(pairs["first"].tolist(), pairs["second"].tolist(), strict=True))
    assert found == {(i, 1 << 32 | i) for i in range(60)}
    gone = select_removals(pairs)
    assert {row: removal.distance for row, removal in gone.items()} == {1 << 32 | i: i % 7 for i in range(60)}


def test_many_copies_leave_the_first():
    bits = np.random.default_rng(0).integers(0, 2**63, (1, 2), dtype=np.uint64).repeat(500, 0)
    gone = select_removals(join([table(bits[:200], exact=[7] * 200), table(bits[200:], exact=[7] * 300)]))
    assert len(gone) == 499
    assert {removal[:2] for removal in gone.values()} == {(0, PIXELS)}


def test_equal_keys_and_only_keys():
    bits = np.random.default_rng(0).integers(0, 2**63, (6, 2), dtype=np.uint64)
    tables = [table(bits[:3], keys=[1, 2, 3]), table(bits[3:], keys=[3, 4, 5], exact=[10, 11, 12])]
    assert select_removals(join(tables, keys=True, exact=False, near=False)) == {1 << 32: Removal(2, KEY, 0, 1.0)}


def posed(seed):
    """One of many pictures of a pose: the same outline and light, details of its own."""
    outline = cv2.GaussianBlur(textured(1000), (0, 0), 4).astype(np.float32)
    noise = np.random.default_rng(seed).normal(0, 1, (60, 80, 3)).astype(np.float32)
    detail = cv2.resize(noise, (320, 240), interpolation=cv2.INTER_CUBIC)
    return np.clip(outline + 20 * detail, 0, 255).astype(np.uint8)


def test_pictures_of_one_pose_hash_alike_and_are_no_copies(tmp_path):
    """A hash proposes them; the second look tells them apart, and still finds what was re-encoded."""
    rows = [("x", simplejpeg.encode_jpeg(posed(0), 92, "RGB", "420"), 0, 320, 240)]
    write_dataset(str(tmp_path), rows, classes=["a"])
    index = index_evaluation_sets([str(tmp_path)], 10**8)
    others = [(hash_image(pixels, crops=True), pixels) for pixels in map(posed, range(1, 30))]
    assert sum(bool(index.propose(hashed, 30)) for hashed, _ in others) >= 25
    assert [index.find(hashed, pixels, 30) for hashed, pixels in others] == [None] * 29
    for change in ("JPEG quality 50", "mirrored", "centre 90%"):
        pixels = CHANGES[change](posed(0))
        assert index.find(hash_image(pixels, crops=True), pixels, 30) is not None, change


def test_another_colour_is_another_picture():
    red, blue = textured(1), textured(1)[:, :, ::-1]
    assert compare_views(small_copy(red), small_copy(red)).same
    assert not compare_views(small_copy(red), small_copy(blue)).same


def test_evaluation_images_that_cannot_be_read_are_counted(tmp_path, caplog):
    """A damaged image that decodes is kept out; one that does not is counted in a warning."""
    (tmp_path / "x").mkdir()
    data = simplejpeg.encode_jpeg(textured(5), 95, "RGB", "420")
    (tmp_path / "x" / "cut.jpg").write_bytes(data[: len(data) * 995 // 1000])
    (tmp_path / "x" / "text.jpg").write_bytes(b"no picture")
    logging.getLogger("pipeline").propagate = True  # a job of this process may have switched it off
    with caplog.at_level(logging.WARNING, "pipeline"):
        index = index_evaluation_sets([str(tmp_path)], 10**8)
    assert "1 of 2 images cannot be read and are not kept out, such as x/text.jpg" in caplog.text
    match = index.find(hash_image(textured(5), crops=True), textured(5), 30)
    assert match is not None
    assert index.name(match.image)[1] == "x/cut.jpg"


def test_an_evaluation_set_without_images(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "a.jpg").write_bytes(b"no")
    with pytest.raises(UserError, match="not one readable image"):
        index_evaluation_sets([str(tmp_path)], 10**8)
    with pytest.raises(UserError, match="no such file or folder"):
        index_evaluation_sets([str(tmp_path / "none")], 10**8)
