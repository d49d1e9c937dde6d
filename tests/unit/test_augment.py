"""Crops against a reference, RandAugment against Pillow."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance, ImageOps

from pipeline.data.loading.augment import Augment
from pipeline.data.loading.rand_augment import OPERATIONS, rand_augment
from pipeline.data.loading.transform import augment_image, inception_box
from pipeline.errors import UserError
from tests.images import photo

# ---------------------------------------------------------------- crops


@given(st.integers(1, 700), st.integers(1, 700), st.lists(st.floats(0, 1, exclude_max=True), min_size=4, max_size=4))
def test_an_inception_box_lies_in_the_image_and_keeps_its_bounds(height, width, u):
    top, left, h, w = inception_box(height, width, (0.05, 1.0), (3 / 4, 4 / 3), u)
    assert 0 <= top <= top + h <= height
    assert 0 <= left <= left + w <= width
    assert min(h, w) >= 1
    if min(height, width) >= 100 and max(height, width) < 4 * min(height, width):  # where whole pixels do not matter
        assert 0.045 <= h * w / (height * width) <= 1
        assert 0.73 <= w / h <= 1.37


def test_inception_boxes_have_the_distribution_they_state():
    """Compares with a direct simulation: uniform aspect, then uniform height
    between the smallest and the largest that fit."""
    generator = np.random.default_rng(0)
    draws = generator.random((20_000, 4))
    boxes = np.array([inception_box(300, 400, (0.05, 1.0), (3 / 4, 4 / 3), u) for u in draws.tolist()])
    ratio = generator.uniform(3 / 4, 4 / 3, 20_000)
    height = generator.uniform(
        np.sqrt(0.05 * 120_000 / ratio), np.minimum(np.minimum(np.sqrt(120_000 / ratio), 300), 400 / ratio)
    )
    assert np.allclose(np.quantile(boxes[:, 2], [0.1, 0.5, 0.9]), np.quantile(height, [0.1, 0.5, 0.9]), rtol=0.02)
    area, expected = boxes[:, 2] * boxes[:, 3] / 120_000, height**2 * ratio / 120_000
    assert np.allclose(np.quantile(area, [0.1, 0.5, 0.9]), np.quantile(expected, [0.1, 0.5, 0.9]), rtol=0.03)
    centre = boxes[:, 0] + boxes[:, 2] / 2
    assert abs(centre.mean() - 150) < 1


def bilinear(image, height, width):
    """Half-pixel centres, edges repeated, no antialiasing; float64."""

    def axis(n, size):
        x = ((np.arange(n) + 0.5) * size / n - 0.5).clip(0, size - 1)
        low = np.floor(x).astype(int)
        return low, np.minimum(low + 1, size - 1), x - low

    (y0, y1, fy), (x0, x1, fx) = axis(height, image.shape[0]), axis(width, image.shape[1])
    rows = image[y0] * (1 - fy)[:, None, None] + image[y1] * fy[:, None, None]
    return rows[:, x0] * (1 - fx)[:, None] + rows[:, x1] * fx[:, None]


@pytest.mark.parametrize("flip", [False, True])
def test_inception_crop_is_box_bilinear_flip(flip):
    image, out = photo(), np.empty((64, 64, 3), np.uint8)
    u = [0.3, 0.6, 0.2, 0.7, 0.1 if flip else 0.9]
    augment_image(Augment(size=64), image, u, out)
    top, left, h, w = inception_box(120, 160, (0.05, 1.0), (3 / 4, 4 / 3), u)
    expected = bilinear(image[top : top + h, left : left + w].astype(float), 64, 64)
    assert (
        np.abs(out - (expected[:, ::-1] if flip else expected)).max() <= 1
    )  # OpenCV interpolates in 11-bit fixed point


def test_evaluation_crops():
    image, out = photo(120, 160), np.empty((48, 48, 3), np.uint8)
    augment_image(Augment(size=48, crop="squash"), image, [0.0] * 5, out, train=False)
    assert np.abs(out - bilinear(image.astype(float), 48, 48)).max() <= 1
    augment_image(Augment(size=48, crop="center", resize=60), image, [0.0] * 5, out, train=False)
    assert np.abs(out - bilinear(image.astype(float), 60, 80)[6:54, 16:64]).max() <= 1
    augment_image(Augment(size=48, crop="center"), image, [0.0] * 5, out, train=False)
    assert np.array_equal(out, image[36:84, 56:104])
    augment_image(Augment(size=48, crop="center", resize=60, squash=True), image, [0.0] * 5, out, train=False)
    assert np.abs(out - bilinear(image.astype(float), 60, 60)[6:54, 6:54]).max() <= 1


def test_random_crop_after_a_squash_as_bit_does():
    image, out, whole = photo(), np.empty((48, 48, 3), np.uint8), np.empty((60, 60, 3), np.uint8)
    augment_image(Augment(size=60, crop="squash"), image, [0.9] * 5, whole, train=False)
    recipe = Augment(size=48, crop="random", resize=60, squash=True)
    corners = set()
    for u in np.random.default_rng(0).random((300, 5)):
        augment_image(recipe, image, [*u[:4], 0.9], out)
        top, left = int(u[2] * 13), int(u[3] * 13)
        assert np.array_equal(out, whole[top : top + 48, left : left + 48])
        corners |= {("top", top), ("left", left)}
    assert len(corners) == 26  # every offset 0..12 occurs


def test_area_filter_averages():
    image, out = photo(96, 96), np.empty((48, 48, 3), np.uint8)
    augment_image(Augment(size=48, crop="squash", filter="area"), image, [0.0] * 5, out)
    expected = image.astype(float).reshape(48, 2, 48, 2, 3).mean(axis=(1, 3))
    assert np.abs((out[:, ::-1]) - expected).max() <= 1  # draws of zero flip


@pytest.mark.parametrize("crop", ["inception", "random", "center", "squash"])
@pytest.mark.parametrize("shape", [(1, 1), (3, 2000), (2000, 1), (20, 30), (64, 64)])
def test_every_shape_of_image_works(crop, shape):
    image, out = np.full((*shape, 3), 77, np.uint8), np.zeros((32, 32, 3), np.uint8)
    for resize in (None, 40) if crop in ("random", "center") else (None,):
        augment_image(Augment(size=32, crop=crop, resize=resize), image, [0.99] * 5, out)
        assert (out == 77).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crop": "inceptoin"}, 'crop .inceptoin. .*did you mean "inception"'),
        ({"size": 224, "resize": 200}, "resize 200 at least size"),
        ({"squash": True}, "squash=True needs resize"),
        ({"area": (0.0, 1.0)}, "area"),
        ({"filter": "cubic"}, "filter"),
        ({"mixup": -1.0}, "mixup"),
    ],
)  # fmt: skip
def test_settings_that_make_no_sense(options, message):
    with pytest.raises(UserError, match=message):
        Augment(**options)


# ---------------------------------------------------------------- RandAugment

MAGNITUDES = (2, 10, 15, 20)


def pillow_reference(name, image, magnitude, sign):
    """The result of the operation in Pillow."""
    level, picture = magnitude / 10, Image.fromarray(image)
    factor, (width, height) = 1.8 * level + 0.1, picture.size

    def affine(matrix):
        return picture.transform(
            picture.size, Image.Transform.AFFINE, matrix, Image.Resampling.NEAREST, fillcolor=(128,) * 3
        )

    def about_the_middle(angle):
        cos, sin, x, y = math.cos(angle), math.sin(angle), width / 2, height / 2
        return (cos, sin, x - cos * x - sin * y, -sin, cos, y + sin * x - cos * y)

    with_threshold = picture.point([min(255, v + int(level * 110)) if v < 128 else v for v in range(256)] * 3)
    keep = min(8, int(level * 4))
    result = {
        "_auto_contrast": lambda: ImageOps.autocontrast(picture),
        "_equalize": lambda: ImageOps.equalize(picture),
        "_invert": lambda: ImageOps.invert(picture),
        "_rotate": lambda: affine(about_the_middle(math.radians(30 * level * sign))),
        "_posterize": lambda: ImageOps.posterize(picture, keep) if keep else Image.new("RGB", picture.size),
        "_solarize": lambda: ImageOps.solarize(picture, int(level * 256)),
        "_color": lambda: ImageEnhance.Color(picture).enhance(factor),
        "_contrast": lambda: ImageEnhance.Contrast(picture).enhance(factor),
        "_brightness": lambda: ImageEnhance.Brightness(picture).enhance(factor),
        "_sharpness": lambda: ImageEnhance.Sharpness(picture).enhance(factor),
        "_shear_x": lambda: affine((1, 0.3 * level * sign, 0, 0, 1, 0)),
        "_shear_y": lambda: affine((1, 0, 0, 0.3 * level * sign, 1, 0)),
        "_translate_x": lambda: affine((1, 0, 100 * level * sign, 0, 1, 0)),
        "_translate_y": lambda: affine((1, 0, 0, 0, 1, 100 * level * sign)),
        "_solarize_add": lambda: with_threshold,
    }
    return np.asarray(result[name]())


@pytest.mark.parametrize("index", range(16), ids=[operation.__name__ for operation in OPERATIONS])
@pytest.mark.parametrize("magnitude", MAGNITUDES)
def test_operations_match_pillow(index, magnitude):
    """Geometry: 93% of pixels equal (a shear by 0.6 has an exact tie of two neighbours in every fifth row). Colour: every pixel within 2 of 255, times
    the factor by which the operation exaggerates."""
    name = OPERATIONS[index].__name__
    if name == "_cutout":
        return
    for sign, seed in ((-1.0, 0), (1.0, 1)):
        image = photo(224, 224, seed=seed)
        result = image.copy()
        rand_augment(result, [(index + 0.5) / 16, 0.1 if sign < 0 else 0.9, 0.5, 0.5], magnitude)
        expected = pillow_reference(name, image, magnitude, sign)
        if name in ("_rotate", "_shear_x", "_shear_y", "_translate_x", "_translate_y"):
            assert (result == expected).all(axis=2).mean() > 0.93
        else:
            assert np.abs(result.astype(int) - expected).max() <= math.ceil(2 * max(1, 0.18 * magnitude))


def test_cutout_blanks_a_square_and_nothing_else():
    image = np.zeros((224, 224, 3), np.uint8)
    rand_augment(image, [14.5 / 16, 0.0, 0.5, 0.25], 10)
    assert (image[72:152, 16:96] == 128).all()
    assert (image == 128).sum() == 80 * 80 * 3
    corner = np.zeros((224, 224, 3), np.uint8)
    rand_augment(corner, [14.5 / 16, 0.0, 0.0, 0.999], 10)
    assert (corner == 128).sum() == 40 * 41 * 3


@given(st.lists(st.floats(0, 1, exclude_max=True), min_size=13, max_size=13), st.sampled_from([0, 10, 20]))
@settings(max_examples=100, deadline=None)
def test_any_draw_gives_the_same_image_twice(u, magnitude):
    recipe, image = Augment(size=40, randaug_layers=2, randaug_magnitude=magnitude), photo(50, 70)
    first, second = np.zeros((40, 40, 3), np.uint8), np.ones((40, 40, 3), np.uint8)
    augment_image(recipe, image, u, first)
    augment_image(recipe, image.copy(), u, second)
    assert np.array_equal(first, second)
    assert np.array_equal(image, photo(50, 70))


def test_constant_images_survive_every_operation():
    for index in range(16):
        image = np.full((32, 32, 3), 200, np.uint8)
        rand_augment(image, [(index + 0.5) / 16, 0.9, 0.5, 0.5], 10)
        assert image.shape == (32, 32, 3)
