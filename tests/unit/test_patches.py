"""Patches: the layout of the paper's eq. 1, and seeded token dropping."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.loading.order import kept_tokens
from pipeline.data.patches import patchify, unpatchify


@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 4), st.sampled_from([1, 3]))
def test_round_trip_and_layout(patch, rows, columns, channels):
    height, width = rows * patch, columns * patch
    images = np.random.default_rng(0).integers(0, 256, (2, height, width, channels), dtype=np.uint8)
    patches = patchify(images, patch)
    assert patches.shape == (2, rows * columns, patch * patch * channels)
    assert np.array_equal(unpatchify(patches, height, width, patch), images)
    for r in range(rows):
        for c in range(columns):
            block = images[1, r * patch : (r + 1) * patch, c * patch : (c + 1) * patch]
            assert np.array_equal(patches[1, r * columns + c], block.ravel())


def test_out_is_filled_in_place():
    image = np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3)
    out = np.zeros((4, 48), np.uint8)
    assert patchify(image, 4, out=out) is out
    assert np.array_equal(out, patchify(image, 4))


def test_a_patch_size_that_does_not_divide_is_an_error():
    with pytest.raises(ValueError, match="patch size 5 does not divide an image of 8x8"):
        patchify(np.zeros((8, 8, 3), np.uint8), 5)


def test_kept_tokens_are_a_uniform_choice_that_depends_on_the_sample_alone():
    kept = kept_tokens(1, 2, np.arange(4000), 16, 0.25)
    assert kept.shape == (4000, 4)
    assert kept.dtype == np.int64
    assert (np.diff(kept, axis=1) > 0).all()
    assert np.allclose(np.bincount(kept.ravel(), minlength=16) / 4000, 0.25, atol=0.03)
    assert np.array_equal(kept_tokens(1, 2, np.array([7, 3]), 16, 0.25), kept[[7, 3]])
    assert not np.array_equal(kept_tokens(1, 3, np.arange(4000), 16, 0.25), kept)
    assert kept_tokens(1, 2, np.arange(2), 16, 0.01).shape == (2, 1)
    assert np.array_equal(kept_tokens(1, 2, np.arange(1), 16, 1.0)[0], np.arange(16))
