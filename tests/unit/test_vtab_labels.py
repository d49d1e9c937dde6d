"""The label rules of the structured tasks, and the picture of the retinopathy task."""

import cv2
import numpy as np
import pytest

from pipeline.errors import UserError
from pipeline.vtab.datasets.clevr import clevr_count, clevr_distance
from pipeline.vtab.datasets.dsprites import dsprites_label
from pipeline.vtab.datasets.kitti import kitti_distance, kitti_label, kitti_videos
from pipeline.vtab.retinopathy import btgraham


@pytest.mark.parametrize(
    ("distance", "label"),
    [
        (0.1, 0),
        (8, 0),
        (8.01, 1),
        (8.5, 1),
        (8.51, 2),
        (9, 2),
        (9.2, 3),
        (9.5, 3),
        (9.6, 4),
        (10, 4),
        (10.1, 5),
        (100, 5),
    ],
)
def test_clevr_distance(distance, label):
    assert clevr_distance([50.0, distance, 60.0]) == label


def test_clevr_distance_compares_in_float32():
    """TFDS stores coordinates as float32, so a value that rounds to an edge is on the edge."""
    assert clevr_distance([8.0000001]) == 0
    assert clevr_distance([8.000001]) == 1


def test_clevr_count():
    assert [clevr_count(n) for n in range(3, 11)] == list(range(8))


@pytest.mark.parametrize(
    ("distances", "label"),
    [([7.9], 0), ([8.0], 0), ([8.1, 30], 1), ([20.0], 1), ([20.1], 2), ([999.0], 2), ([], 3), ([-2.0], 0)],
)
def test_kitti_distance(distances, label):
    assert kitti_distance(distances) == label


def test_kitti_label_counts_vehicles_only():
    z = "{} 0.00 0 1.85 387.63 181.54 423.81 203.12 1.67 1.87 3.69 -16.53 2.39 {} 1.57"
    assert kitti_label("\n".join([z.format("Car", 58.49), z.format("Cyclist", 3.0), z.format("DontCare", -1000)])) == 2
    assert kitti_label("\n".join([z.format("Tram", 4.0), z.format("Truck", 12.0), z.format("Van", 30.0)])) == 1
    assert kitti_label(z.format("Pedestrian", 2.0)) == 3
    assert kitti_label("") == 3


def test_kitti_splits_by_drive():
    mapping = "\n".join(f"2011_09_26 2011_09_26_drive_{i % 20:04d}_sync {i:010d}" for i in range(100))
    permutation = ",".join(str(i) for i in np.random.default_rng(0).permutation(100) + 1)
    lines = mapping.splitlines()
    splits = kitti_videos(permutation, mapping)
    drives = {
        split: {lines[int(permutation.split(",")[i]) - 1].split()[1] for i in images}
        for split, images in splits.items()
    }
    assert {split: len(names) for split, names in drives.items()} == {"train": 16, "validation": 2, "test": 2}
    assert sorted(i for images in splits.values() for i in images) == list(range(100))
    # numpy's legacy generator, seed 123, over the sorted names
    names = sorted({line.split()[1] for line in lines})
    state = np.random.RandomState(123)
    assert drives["test"] == set(state.choice(names, 2, replace=False))
    assert drives["validation"] == set(state.choice(sorted(set(names) - drives["test"]), 2, replace=False))


def test_dsprites_bins():
    """floor(id / 2.5): bins of three and two in turn; positions two by two."""
    assert [dsprites_label(o, 40) for o in range(10)] == [0, 0, 0, 1, 1, 2, 2, 2, 3, 3]
    assert dsprites_label(39, 40) == 15
    assert [dsprites_label(x, 32) for x in (0, 1, 2, 30, 31)] == [0, 0, 1, 15, 15]


def eye(height: int = 600, width: int = 800, radius: int = 250) -> np.ndarray:
    image = np.zeros((height, width, 3), np.uint8)
    return cv2.circle(image, (width // 2, height // 2), radius, (60, 90, 180), -1)


def test_btgraham_geometry():
    """The eye is scaled to 300 pixels, and 270 of them are kept on grey."""
    file = cv2.imencode(".png", eye())[1].tobytes()
    result = cv2.imdecode(np.frombuffer(btgraham(file, "x"), np.uint8), cv2.IMREAD_COLOR)
    assert result.shape == (540, 540, 3)
    assert np.abs(result[:40, :40].astype(int) - 128).max() <= 8  # outside the disc, up to JPEG
    assert np.abs(result[270, 270].astype(int) - 128).max() <= 8  # an even area has no local contrast


def test_btgraham_black_frame_and_no_image():
    black = cv2.imencode(".png", np.zeros((100, 140, 3), np.uint8))[1].tobytes()
    result = cv2.imdecode(np.frombuffer(btgraham(black, "x"), np.uint8), cv2.IMREAD_COLOR)
    assert result.shape == (540, 540, 3)
    with pytest.raises(UserError, match="10_left: not a readable image"):
        btgraham(b"no image", "10_left")


def test_btgraham_refuses_to_enlarge_a_speck():
    speck = np.zeros((2000, 3000, 3), np.uint8)
    speck[1000, 1500:1504] = 255
    with pytest.raises(UserError, match="no eye"):
        btgraham(cv2.imencode(".png", speck)[1].tobytes(), "x")
