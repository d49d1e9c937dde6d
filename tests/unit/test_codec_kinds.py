"""Common kinds of image files: HEIC, JPEGs with other precisions, small
lossless images, very narrow images, invalid EXIF."""

import io
import math
import struct

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from pipeline.data import codecs, images
from pipeline.data.codecs import Refused
from tests.images import encoded, jpeg, picture

LIMIT = 10**7


def heic(pixels, **options):
    heif = pytest.importorskip("pillow_heif")
    sink = io.BytesIO()
    heif.from_pillow(Image.fromarray(pixels)).save(sink, quality=95, **options)
    return sink.getvalue()


def test_heic_is_read():
    pixels = picture(40, 60)
    found = codecs.decode(heic(pixels), LIMIT)
    assert np.abs(found.pixels.astype(int) - pixels).mean() < 4
    assert not found.intact
    assert codecs.is_image_name("IMG_0001.HEIC")


def test_a_cut_heic_is_damaged_and_not_something_else():
    with pytest.raises(Refused, match=r"corrupt|truncated"):
        codecs.decode(heic(picture(40, 60))[:300], LIMIT)


@pytest.mark.parametrize(("marker", "bits", "kind"), [(0xC1, 12, "12-bit JPEG"), (0xC3, 8, "lossless JPEG")])
def test_jpegs_that_no_decoder_here_reads_are_named(marker, bits, kind):
    data = bytearray(jpeg())
    frame = data.index(b"\xff\xc0")
    data[frame + 1], data[frame + 4] = marker, bits
    with pytest.raises(Refused, match=f"unsupported pixels: {kind}"):
        codecs.decode(bytes(data), LIMIT)


@pytest.mark.parametrize("format", ["PNG", "GIF", "BMP", "TIFF"])
def test_small_lossless_images_stay_lossless_unless_asked(format):
    palette = Image.fromarray(picture(20, 30)).quantize(16)
    found = codecs.decode(encoded(palette, format), LIMIT)
    stored, _ = images.as_jpeg(found, b"", 32, 90, lossless=True)
    assert np.array_equal(codecs.decode_stored(stored), np.asarray(palette.convert("RGB")))
    assert images.as_jpeg(found, b"", 32, 90, lossless=False)[0].startswith(b"\xff\xd8")
    assert images.as_jpeg(found, b"", 16, 90, lossless=True)[0].startswith(b"\xff\xd8")  # it is resized


def test_slivers_are_refused_unless_the_caller_accepts_them():
    for data in (encoded(Image.new("RGB", (1000, 1)), "PNG"), simplejpeg.encode_jpeg(np.zeros((1, 1000, 3), np.uint8))):
        with pytest.raises(Refused, match="too narrow"):
            codecs.decode(data, LIMIT)
        assert codecs.decode(data, LIMIT, math.inf).pixels.shape == (1, 1000, 3)


def tiff(pixels, exif):
    """A TIFF whose last tag is the offset of its EXIF: that of `exif`, which is put at its end."""
    data = encoded(Image.fromarray(pixels), "TIFF")
    (first,) = struct.unpack("<I", data[4:8])
    (count,) = struct.unpack("<H", data[first : first + 2])
    tags = data[first + 2 : first + 2 + 12 * count]
    place = len(data) + 2 + 12 * (count + 1) + 4
    directory = struct.pack("<H", count + 1) + tags + struct.pack("<HHII", 0x8769, 4, 1, place) + bytes(4)
    return data[:4] + struct.pack("<I", len(data)) + data[8:] + directory + exif


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data", "ignore:Tag data larger", "ignore:Possibly corrupt EXIF")
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF", "CMYK", "HEIC"])
@pytest.mark.parametrize(
    "exif", [b"Exif\0\0II*\0\xff\xff\xff\x7f", b"Exif\0\0garbage", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff"]
)
def test_unreadable_exif_loses_no_pixels(format, exif):
    image = Image.fromarray(picture(12, 16))
    image, format = (image.convert("CMYK"), "JPEG") if format == "CMYK" else (image, format)
    if format == "AVIF":  # the encoder refuses such EXIF, so it is inserted into a finished file
        data = encoded(image, format, exif=b"Exif\0\0II*\0\x08\0\0\0\0\0").replace(b"II*\0", exif[6:10])
    elif format == "HEIC":
        data = heic(picture(12, 16), exif=exif)
    elif format == "TIFF":
        data = tiff(picture(12, 16), exif[6:])
    else:
        data = encoded(image, format, exif=exif)
    assert exif[6:10] in data
    assert codecs.decode(data, LIMIT).pixels.shape == (12, 16, 3)
