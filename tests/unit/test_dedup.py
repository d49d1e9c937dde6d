"""Duplicate search: duplicates are found, other images are kept, and the banded
join agrees with a comparison of all pairs."""

import io
import itertools
import logging
import os
import tarfile
from pathlib import Path

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
import simplejpeg

from pipeline import workqueue
from pipeline.data import codecs
from pipeline.data.duplicates.candidates import (
    KEY,
    PIXELS,
    Removal,
    boxes,
    candidate_lines,
    concatenate_pairs,
    match_rows,
    select_removals,
    unique_pairs,
)
from pipeline.data.duplicates.evaluation import index_evaluation_sets
from pipeline.data.duplicates.hashes import MIRROR, ROW, VIEW, hamming, hash_image
from pipeline.data.duplicates.verification import compare_unaligned, compare_views, small_copy
from pipeline.data.format import write_dataset
from pipeline.data.prepare import PrepareConfig, prepare
from pipeline.errors import UserError
from tests.images import crop, textured
from tests.posed import POSES

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
        match = index.find(hash_image(pixels), pixels, distance=30)
        assert match is not None
        assert index.name(match.image)[1] == f"test/{i}"


def test_other_images_are_not(index):
    photos = [textured(seed) for seed in range(100, 200)]
    assert [index.find(hash_image(pixels), pixels, 30) for pixels in photos] == [None] * 100


def test_flat_images_match_only_exactly(tmp_path):
    flat = np.full((32, 32, 3), 200, np.uint8)
    nearly = flat.copy()
    nearly[3, 3] = 201
    png = cv2.imencode(".png", flat)[1].tobytes()
    write_dataset(str(tmp_path), [("flat", png, 0, 32, 32)], classes=["a"])
    index = index_evaluation_sets([str(tmp_path)], 10**8)
    match = index.find(hash_image(flat), flat, 30)
    assert match is not None
    assert (match.image, match.distance, match.exact) == (0, 0, True)
    assert index.find(hash_image(nearly), nearly, 30) is None


def test_mirroring_inverts_known_bits():
    pixels = textured(3)
    plain, mirrored = hash_image(pixels), hash_image(pixels[:, ::-1])
    assert hamming(plain.views["bits"][0] ^ MIRROR, mirrored.views["bits"][0]) <= 2
    assert plain.exact != mirrored.exact


def table(bits, exact=None, keys=None):
    """(rows, views): one view each, the whole image."""
    rows, views = np.zeros(len(bits), ROW), np.zeros(len(bits), VIEW)
    rows["exact"] = np.arange(len(bits)) + 1 if exact is None else exact
    rows["key"] = np.arange(len(bits)) + 1 if keys is None else keys
    views["image"], views["bits"], views["whole"] = np.arange(len(bits)), bits, True
    return rows, views


def join(tables, keys=False, exact=True, near=True, distance=12, buckets=3):
    """Does the work of the Ray Data job of `prepare` without Ray."""
    parts = [candidate_lines(*hashed, unit, keys, exact, near) for unit, hashed in enumerate(tables)]
    lines = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    bucket = (lines["join"] >> np.uint64(40)) % np.uint64(buckets)
    found = [match_rows({k: v[bucket == b] for k, v in lines.items()}, distance) for b in range(buckets)]
    pairs = unique_pairs(concatenate_pairs(found))
    return pairs | {"detail": np.ones(len(pairs["first"])), "difference": np.zeros(len(pairs["first"]))}


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
    assert select_removals(join(tables, keys=True, exact=False, near=False)) == {
        1 << 32: Removal(2, KEY, 0, 0.0, 1.0, 0.0)
    }


def hashes_of(pictures):
    """(rows, views) of images, in the form of a slice."""
    hashed = [hash_image(pixels) for pixels in pictures]
    rows = np.zeros(len(hashed), ROW)
    rows["exact"] = [h.exact for h in hashed]
    for i, one in enumerate(hashed):
        one.views["image"] = i
    return rows, np.concatenate([h.views for h in hashed])


def proposed_and_confirmed(pictures):
    """(pairs of images with similar hashes, pairs that verification confirms)."""
    copies = [small_copy(pixels) for pixels in pictures]
    pairs = join([hashes_of(pictures)], distance=30)
    first, second, mirrored = (pairs[name].tolist() for name in ("first", "second", "mirrored"))
    boxes_of = boxes(pairs["first_box"]), boxes(pairs["second_box"])
    confirmed = {
        (a, b)
        for a, b, box, other_box, flip in zip(first, second, *boxes_of, mirrored, strict=True)
        if compare_views(copies[b], copies[a], other_box, box, flip).same
    }
    return set(zip(first, second, strict=True)), confirmed


INSIDE = {name: change for name, change in CHANGES.items() if name != "same"}
INSIDE["80% of it, JPEG quality 50"] = lambda p: CHANGES["JPEG quality 50"](np.ascontiguousarray(crop(p, 0.8, 0.3)))
INSIDE["turned by 2 degrees"] = lambda p: cv2.warpAffine(
    p, cv2.getRotationMatrix2D((160, 120), 2, 1.05), p.shape[1::-1]
)


@pytest.mark.parametrize("change", INSIDE)
def test_a_changed_copy_is_found_inside_a_corpus(change):
    photos = [textured(seed) for seed in range(6)]
    _, confirmed = proposed_and_confirmed([*photos, *(np.ascontiguousarray(INSIDE[change](p)) for p in photos)])
    assert confirmed == {(i, i + 6) for i in range(6)}


@pytest.mark.parametrize("pose", POSES)
def test_pictures_that_are_posed_alike_are_not_copies(pose):
    """Neither the pairs that hashing proposes nor other pairs are confirmed."""
    pictures = [POSES[pose](seed) for seed in range(12)]
    _, confirmed = proposed_and_confirmed(pictures)
    assert confirmed == set()
    copies = [small_copy(pixels) for pixels in pictures[:6]]
    pairs = list(itertools.combinations(copies, 2))
    assert not any(compare_views(b, a, mirrored=mirrored).same for a, b in pairs for mirrored in (False, True))


REAL_DATA = os.environ.get("VIT_REAL_DATA")


@pytest.mark.skipif(not REAL_DATA, reason="VIT_REAL_DATA is not set")
def test_photographs_that_are_posed_alike_are_not_copies():
    """Aeroplanes from the side: no pair that hashing proposes, and none of 150 others, is confirmed."""
    paths = sorted(Path(REAL_DATA, "caltech-airplanes-80").glob("*.jpg"))
    assert len(paths) == 80
    photos = [codecs.decode(path.read_bytes(), 10**8).pixels.copy() for path in paths]
    _, confirmed = proposed_and_confirmed(photos)
    assert confirmed == set()
    copies = [small_copy(pixels) for pixels in photos]
    some = np.random.default_rng(0).permutation(list(itertools.combinations(range(80), 2)))[:150].tolist()
    assert not any(compare_views(copies[b], copies[a]).same for a, b in some)


def test_hashing_alone_would_mistake_similar_poses_for_copies():
    proposed, _ = proposed_and_confirmed([POSES["outlines"](seed) for seed in range(12)])
    assert len(proposed) >= 20


COPIED = ("outlines", "documents", "filled_forms", "scratched_parts", "bicycles", "portraits")


def test_copies_of_pictures_that_are_posed_alike_are_found():
    pictures = [POSES[pose](0) for pose in COPIED]
    changes = [CHANGES["JPEG quality 50"], CHANGES["mirrored"], CHANGES["brighter"]]
    for change in changes:
        _, confirmed = proposed_and_confirmed([*pictures, *(np.ascontiguousarray(change(p)) for p in pictures)])
        assert confirmed == {(i, i + len(pictures)) for i in range(len(pictures))}


def test_alignment_without_a_hint():
    pixels, other = POSES["documents"](1), POSES["documents"](2)
    part = np.ascontiguousarray(crop(pixels, 0.6, 0.2, 0.9)[:, ::-1])
    assert compare_unaligned(small_copy(part), small_copy(pixels)).same
    assert not compare_unaligned(small_copy(part), small_copy(other)).same


def test_another_colour_is_another_picture():
    red, blue = textured(1), textured(1)[:, :, ::-1]
    assert compare_views(small_copy(red), small_copy(red)).same
    assert not compare_views(small_copy(red), small_copy(blue)).same


def test_evaluation_images_that_cannot_be_read_are_counted(tmp_path, caplog):
    """Copies of a damaged image that can be decoded are removed; a warning counts images that cannot be decoded."""
    (tmp_path / "x").mkdir()
    data = simplejpeg.encode_jpeg(textured(5), 95, "RGB", "420")
    (tmp_path / "x" / "cut.jpg").write_bytes(data[: len(data) * 995 // 1000])
    (tmp_path / "x" / "text.jpg").write_bytes(b"no picture")
    logging.getLogger("pipeline").propagate = True  # an earlier job in this process may have disabled it
    with caplog.at_level(logging.WARNING, "pipeline"):
        index = index_evaluation_sets([str(tmp_path)], 10**8)
    assert (
        "1 of 2 images cannot be read and are therefore not removed from the corpus, such as x/text.jpg" in caplog.text
    )
    match = index.find(hash_image(textured(5)), textured(5), 30)
    assert match is not None
    assert index.name(match.image)[1] == "x/cut.jpg"


@pytest.mark.parametrize("spared", [0.995, 0.9, 0.7])
def test_a_damaged_evaluation_image_keeps_its_intact_copy_out(tmp_path, spared):
    """The image is truncated, or overwritten from some byte on."""
    data = simplejpeg.encode_jpeg(textured(5), 95, "RGB", "420")
    end = int(len(data) * spared)
    noise = np.random.default_rng(0).integers(0, 255, len(data) - end, dtype=np.uint8).tobytes()
    for name, content in (("cut", data[:end]), ("overwritten", data[:end] + noise)):
        folder = tmp_path / name / "x"
        folder.mkdir(parents=True)
        (folder / "a.jpg").write_bytes(content)
        index = index_evaluation_sets([str(tmp_path / name)], 10**8)
        assert index.count == 1
        match = index.find(hash_image(textured(5)), textured(5), 30)
        assert match is not None, name
        assert index.name(match.image)[1] == "x/a.jpg"
        assert index.find(hash_image(textured(6)), textured(6), 30) is None


def test_another_light_on_the_same_things_is_another_picture():
    turned = POSES["turned"]
    lit = [(small_copy(turned(seed)), small_copy(turned(seed + 18))) for seed in range(0, 18, 3)]
    assert not any(compare_views(a, b).same for a, b in lit)


def test_raw_images_and_archives_beside_datasets_belong_to_the_set(tmp_path, caplog):
    """All images below the address of --decontaminate count, whatever form they have; reports and tables are none."""
    data = [simplejpeg.encode_jpeg(textured(i), 95, "RGB", "420") for i in range(6)]
    write_dataset(str(tmp_path / "sets" / "done"), [("a", data[0], 0, 320, 240)], classes=["x"])
    for name, content in {
        "raw/b/1.jpg": data[1],
        "raw/b/labels.csv": b"file,label\n1.jpg,x\n",
        "2.png": cv2.imencode(".png", textured(2)[:, :, ::-1])[1].tobytes(),
        "raw/3": data[3],
        "done/duplicates.png": data[5],
    }.items():
        path = tmp_path / "sets" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    with tarfile.open(tmp_path / "sets" / "more.tar", "w") as tar:
        member = tarfile.TarInfo("4.jpg")
        member.size = len(data[4])
        tar.addfile(member, io.BytesIO(data[4]))
    logging.getLogger("pipeline").propagate = True
    with caplog.at_level(logging.INFO, "pipeline"), workqueue.without_ray():
        index = index_evaluation_sets([str(tmp_path / "sets")], 10**8)
    assert index.count == 5
    for i in range(5):
        assert index.find(hash_image(textured(i)), textured(i), 30) is not None
    assert index.find(hash_image(textured(5)), textured(5), 30) is None
    assert "beside the datasets are part of the set, such as 2.png" in caplog.text


def test_an_evaluation_set_without_images(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "a.jpg").write_bytes(b"no")
    with pytest.raises(UserError, match="no readable images"):
        index_evaluation_sets([str(tmp_path)], 10**8)
    with pytest.raises(UserError, match="no such file or folder"):
        index_evaluation_sets([str(tmp_path / "none")], 10**8)


@pytest.mark.parametrize(
    "change", [lambda p: p * 0.7, lambda p: p * 1.3, lambda p: p + 40.0], ids=["x 0.7", "x 1.3", "+ 40"]
)
@pytest.mark.parametrize("way", ["against a set", "in the corpus"])
def test_copies_of_other_brightness_through_prepare(tmp_path, change, way):
    """The bright copies clip a quarter of the pixels. Two other images stay."""
    for i in range(3):
        plain = textured(i)
        changed = np.clip(change(plain.astype(np.float32)), 0, 255).astype(np.uint8)
        for name, pixels in (
            ("b" if way == "in the corpus" else "set", plain),
            ("c", changed),
            ("other", textured(50 + i)),
        ):
            folder = tmp_path / ("set" if name == "set" else "corpus") / name
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{i}.jpg").write_bytes(simplejpeg.encode_jpeg(pixels, 95, "RGB", "444"))
    options = {"deduplicate": "near"} if way == "in the corpus" else {"decontaminate": (str(tmp_path / "set"),)}
    with workqueue.without_ray():
        config = PrepareConfig(
            source=(str(tmp_path / "corpus"),), output=str(tmp_path / "out"), unlabelled=True, **options
        )
        (manifest,) = prepare(config).values()
    gone = pq.read_table(tmp_path / "out" / "duplicates.parquet").to_pylist()
    assert sorted(row["key"][-5:] for row in gone) == ["0.jpg", "1.jpg", "2.jpg"]
    assert all("other" not in row["key"] + row["match"] for row in gone)
    assert manifest.rows == (6 if way == "in the corpus" else 3)
