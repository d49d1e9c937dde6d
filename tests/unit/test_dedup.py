"""Duplicate search: what is the same is found, what is not is left alone, and the banded join agrees with all pairs."""

import cv2
import numpy as np
import pytest
import simplejpeg

from pipeline import workqueue
from pipeline.data import format as shards
from pipeline.data.duplicates.candidates import candidate_keys, match_rows, select_removals
from pipeline.data.duplicates.evaluation import index_evaluation_sets
from pipeline.data.duplicates.hashes import MIRROR, ROW, hamming, hash_image
from pipeline.errors import UserError


def photo(seed, height=240, width=320):
    """Structure at every scale, as in photographs (amplitude falls with frequency)."""
    rng = np.random.default_rng(seed)
    layers = [
        cv2.resize(rng.normal(0, 1, (n, n + 1, 3)).astype(np.float32), (width, height), interpolation=cv2.INTER_CUBIC)
        * (40 / n**0.5)
        for n in (2, 4, 8, 16, 32, 64)
    ]
    return np.clip(128 + sum(layers), 0, 255).astype(np.uint8)


def crop(pixels, side=0.9, y=0.5, x=0.5):
    height, width = (round(side * n) for n in pixels.shape[:2])
    top, left = round(y * (pixels.shape[0] - height)), round(x * (pixels.shape[1] - width))
    return pixels[top : top + height, left : left + width]


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
    rows = [(f"test/{i}", simplejpeg.encode_jpeg(photo(i), 92, "RGB", "420"), 0, 320, 240) for i in range(40)]
    shards.write_dataset(uri, rows, classes=["a"], row_group_bytes=200_000)
    with workqueue.without_ray():
        return index_evaluation_sets([uri], 10**8)


@pytest.mark.parametrize("change", CHANGES)
def test_changed_images_are_found(index, change):
    for i in (0, 7, 39):
        match = index.find(hash_image(CHANGES[change](photo(i)), crops=True), distance=24)
        assert match is not None
        assert index.name(match[0])[1] == f"test/{i}"


def test_other_images_are_not(index):
    assert [index.find(hash_image(photo(seed), crops=True), 24) for seed in range(100, 200)] == [None] * 100


def test_flat_images_match_only_exactly(tmp_path):
    flat = np.full((32, 32, 3), 200, np.uint8)
    nearly = flat.copy()
    nearly[3, 3] = 201
    png = cv2.imencode(".png", flat)[1].tobytes()
    shards.write_dataset(str(tmp_path), [("flat", png, 0, 32, 32)], classes=["a"])
    index = index_evaluation_sets([str(tmp_path)], 10**8)
    assert index.find(hash_image(flat, crops=True), 24) == (0, 0, True)
    assert index.find(hash_image(nearly, crops=True), 24) is None


def test_mirroring_inverts_known_bits():
    pixels = photo(3)
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
    return {name: np.concatenate([pairs[name] for pairs in found]) for name in found[0]}


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
    assert {row: why[2] for row, why in gone.items()} == {1 << 32 | i: i % 7 for i in range(60)}


def test_many_copies_leave_the_first():
    bits = np.random.default_rng(0).integers(0, 2**63, (1, 2), dtype=np.uint64).repeat(500, 0)
    gone = select_removals(join([table(bits[:200], exact=[7] * 200), table(bits[200:], exact=[7] * 300)]))
    assert len(gone) == 499
    assert {why[:2] for why in gone.values()} == {(0, 1)}


def test_equal_keys_and_only_keys():
    bits = np.random.default_rng(0).integers(0, 2**63, (6, 2), dtype=np.uint64)
    tables = [table(bits[:3], keys=[1, 2, 3]), table(bits[3:], keys=[3, 4, 5], exact=[10, 11, 12])]
    assert select_removals(join(tables, keys=True, exact=False, near=False)) == {1 << 32: (2, 0, 0)}


def test_an_evaluation_set_without_images(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "a.jpg").write_bytes(b"no")
    with pytest.raises(UserError, match="not one readable image"):
        index_evaluation_sets([str(tmp_path)], 10**8)
    with pytest.raises(UserError, match="no such file or folder"):
        index_evaluation_sets([str(tmp_path / "none")], 10**8)
