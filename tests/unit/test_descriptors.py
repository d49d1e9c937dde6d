"""Near duplicates by a descriptor network: a small TorchScript network finds
pairs that hashing misses, and pixels decide."""

import json
import pickle

import cv2
import numpy as np
import pytest
import simplejpeg
import torch

from pipeline import workqueue
from pipeline.data.duplicates import descriptors
from pipeline.data.duplicates.descriptors import Descriptor, find_centres, match_vectors, nearest_lists
from pipeline.data.format import open_dataset
from pipeline.data.prepare import PrepareConfig, prepare
from pipeline.errors import UserError
from tests.posed import POSES


class Colours(torch.nn.Module):
    """Mean and standard deviation of each channel, which do not depend on the positions of pixels."""

    def forward(self, images):
        flat = images.flatten(2)
        return torch.cat([flat.mean(2), flat.std(2)], dim=1)


class Scalar(torch.nn.Module):
    def forward(self, images):
        return images.mean()


def script(path, network=None, about=None):
    extra = {"descriptor.json": json.dumps(about)} if about else {}
    torch.jit.save(torch.jit.script(network or Colours()), str(path), _extra_files=extra)
    return str(path)


def test_a_network_is_run_as_its_file_and_the_flags_say(tmp_path):
    picture = POSES["scenes"](0)
    plain = Descriptor(script(tmp_path / "a.pt"))
    assert plain.preprocessing == (288, descriptors.MEAN, descriptors.STD)
    assert plain([picture]).shape == (1, 6)
    assert np.linalg.norm(plain([picture]).astype(np.float32)) == pytest.approx(1, abs=1e-2)
    about = {"size": 64, "mean": [0, 0, 0], "std": [1, 1, 1]}
    stated = Descriptor(script(tmp_path / "b.pt", about=about))
    assert stated.preprocessing == (64, (0, 0, 0), (1, 1, 1))
    expected = cv2.resize(picture, (64, 64), interpolation=cv2.INTER_AREA).reshape(-1, 3) / 255
    vector = np.concatenate([expected.mean(0), expected.std(0, ddof=1)])
    np.testing.assert_allclose(stated([picture])[0], vector / np.linalg.norm(vector), atol=2e-3)
    assert Descriptor(script(tmp_path / "c.pt", about=about), size=32).preprocessing.size == 32


def test_unusable_network_files_are_refused(tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "opened"), "w"))

    (tmp_path / "pickle.pt").write_bytes(pickle.dumps(Trap()))
    torch.save({"weights": torch.zeros(3)}, tmp_path / "weights.pt")
    for name in ("pickle.pt", "weights.pt"):
        with pytest.raises(UserError, match="not a TorchScript file"):
            Descriptor(str(tmp_path / name))
    assert not (tmp_path / "opened").exists()
    with pytest.raises(UserError, match="no such file"):
        Descriptor(str(tmp_path / "none.pt"))
    with pytest.raises(UserError, match="instead of one vector each"):
        Descriptor(script(tmp_path / "scalar.pt", Scalar()))
    with pytest.raises(UserError, match=r"descriptor\.json"):
        Descriptor(script(tmp_path / "odd.pt", about=["288"]))


def test_lists_find_what_all_pairs_find(monkeypatch):
    monkeypatch.setattr(descriptors, "LIST_ROWS", 400)
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(2000, 32))
    vectors[1000:1100] = vectors[:100] + 0.1 * rng.normal(size=(100, 32))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)
    rows = np.arange(2000)
    centres = find_centres(vectors, len(vectors))
    assert len(centres) == 5
    which, lists = nearest_lists(vectors, centres)
    found = set()
    for number in range(5):
        here = which[lists == number]
        pairs = match_vectors(rows[here], vectors[here], 0.9, corpus=2000, inside=True)
        found |= set(zip(pairs["first"].tolist(), pairs["second"].tolist(), strict=True))
    assert found == {(i, 1000 + i) for i in range(100)}


def test_an_evaluation_image_is_the_one_that_stays():
    vectors = np.eye(4, 8, dtype=np.float16)[[0, 1, 0, 1, 1]]
    rows = np.array([0, 1, 100, 101, 102])  # rows from 100 on belong to evaluation sets
    options = {"similarity": 0.9, "corpus": 100}
    for inside in (True, False):
        pairs = match_vectors(rows, vectors, **options, inside=inside)
        assert set(zip(pairs["first"].tolist(), pairs["second"].tolist(), strict=True)) == {
            (100, 0),
            (101, 1),
            (102, 1),
        }


@pytest.fixture
def corpus(tmp_path):
    """Portraits; a third of one of them (too small for hashing), and a part of another in an evaluation set."""
    for folder, name, picture in [
        *(("photos", f"{i}.jpg", POSES["portraits"](i)) for i in range(5)),
        ("photos", "x-part.jpg", np.ascontiguousarray(POSES["documents"](3)[60:220, 40:190])),
        ("photos", "document.jpg", POSES["documents"](3)),
        ("photos", "tested.jpg", POSES["documents"](4)),
        ("tests", "one.jpg", np.ascontiguousarray(POSES["documents"](4)[100:280, 60:210, :])),
    ]:
        (tmp_path / folder / "a").mkdir(parents=True, exist_ok=True)
        data = simplejpeg.encode_jpeg(picture, 90, "RGB", "420")
        (tmp_path / folder / "a" / name).write_bytes(data)
    return tmp_path


def keys(output):
    dataset = open_dataset(str(output))
    return {dataset[i]["key"] for i in range(len(dataset))}


def test_prepare_with_a_network_that_considers_all_images_alike(corpus):
    """The network proposes all pairs; verification removes the two parts and no portrait."""
    import pyarrow.parquet as pq

    config = PrepareConfig(
        source=(str(corpus / "photos"),),
        output=str(corpus / "out"),
        deduplicate="near",
        decontaminate=(str(corpus / "tests"),),
        descriptor=script(corpus / "colours.pt", about={"size": 32, "mean": [0, 0, 0], "std": [1, 1, 1]}),
        descriptor_similarity=0.1,
        unlabelled=True,
        distance=0,
    )
    with workqueue.without_ray():
        (manifest,) = prepare(config).values()
    gone = {line["key"]: line for line in pq.read_table(corpus / "out" / "duplicates.parquet").to_pylist()}
    assert {key: (line["reason"], line["match"]) for key, line in gone.items()} == {
        "a/tested.jpg": ("descriptor", "a/one.jpg"),
        "a/x-part.jpg": ("descriptor", "a/document.jpg"),
    } or {key: (line["reason"], line["match"]) for key, line in gone.items()} == {
        "a/tested.jpg": ("descriptor", "a/one.jpg"),
        "a/document.jpg": ("descriptor", "a/x-part.jpg"),
    }
    assert all(line["similarity"] > 0.9 and line["detail"] > 0.85 for line in gone.values())
    assert manifest.duplicates_by_reason == {
        f"descriptor {corpus / 'tests'}": 1,
        "descriptor in the corpus": 1,
    }
    assert (corpus / "out" / "duplicates.png").stat().st_size > 1000


def test_a_similarity_that_decides_alone(corpus):
    config = PrepareConfig(
        source=(str(corpus / "photos"),),
        output=str(corpus / "out"),
        deduplicate="report",
        descriptor=script(corpus / "colours.pt", about={"size": 32}),
        descriptor_accept=0.2,
        descriptor_similarity=0.2,
        unlabelled=True,
    )
    with workqueue.without_ray():
        (manifest,) = prepare(config).values()
    assert manifest.rows == 8
    assert manifest.duplicates == 0
    assert manifest.reported_by_reason["descriptor in the corpus"] >= 2


def test_flags_that_say_nothing(tmp_path):
    common = {"source": ("x",), "output": str(tmp_path), "descriptor": "x.pt"}
    with pytest.raises(UserError, match="nothing to compare"):
        prepare(PrepareConfig(**common))
    with pytest.raises(UserError, match="--descriptor-similarity 2"):
        prepare(PrepareConfig(**common, deduplicate="near", descriptor_similarity=2))
    with pytest.raises(UserError, match="--descriptor-mean"):
        prepare(PrepareConfig(**common, deduplicate="near", descriptor_mean=(0.5,)))


@pytest.mark.parametrize(
    "about", ["[" * 100_000, '{"size": 1e400}', '{"size": {}}', '{"mean": 5}', '{"std": [1e400, 1, 1]}', "null"]
)
def test_any_json_about_the_input_is_one_line(tmp_path, about):
    torch.jit.save(torch.jit.script(Colours()), str(tmp_path / "a.pt"), _extra_files={"descriptor.json": about})
    with pytest.raises(UserError, match=r"--descriptor .*a\.pt: (its descriptor\.json must be|invalid size)"):
        Descriptor(str(tmp_path / "a.pt"))
