"""The image encodings of prepare."""

import cv2
import numpy as np
import simplejpeg
from PIL import Image

from pipeline.data import images
from pipeline.data.codecs import decode
from tests.images import encoded, jpeg, picture

LIMIT = 10_000_000


def test_small_images_pass_through_and_large_ones_shrink():
    for data in (jpeg(), encoded(Image.fromarray(picture()), "PNG")):
        assert images.as_jpeg(decode(data, LIMIT), data, 256, 90)[0] is data
    data = jpeg(height=600, width=400)
    stored, _ = images.as_jpeg(decode(data, LIMIT), data, 256, 90)
    assert simplejpeg.decode_jpeg_header(stored) == (384, 256, "YCbCr", "420")
    reference = cv2.resize(picture(600, 400), (256, 384), interpolation=cv2.INTER_AREA)
    assert np.abs(simplejpeg.decode_jpeg(stored).astype(int) - reference).mean() < 2
    palette = encoded(Image.fromarray(picture()).quantize(16), "GIF")
    assert images.as_jpeg(decode(palette, LIMIT), palette, 256, 90)[0][:4] == b"\x89PNG"
    assert images.as_jpeg(decode(palette, LIMIT), palette, 256, 90, lossless=False)[0][:2] == b"\xff\xd8"


def test_patches_hold_the_centre_crop():
    pixels = picture(64, 96)
    data = encoded(Image.fromarray(pixels), "PNG")
    patches, square = images.as_patches(decode(data, LIMIT), 64, 16, "crop")
    assert np.array_equal(square, pixels[:, 16:80])
    assert patches.shape == (16, 768)
    assert np.array_equal(patches[5].reshape(16, 16, 3), square[16:32, 16:32])  # row 1, column 1 of a 4 x 4 grid
    _, squashed = images.as_patches(decode(data, LIMIT), 32, 16, "squash")
    assert np.array_equal(squashed, cv2.resize(pixels, (32, 32), interpolation=cv2.INTER_AREA))
