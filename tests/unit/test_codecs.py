"""Image formats: decoding, invalid files, and adding a format."""

import io
import math
import zlib

import numpy as np
import pillow_heif
import pytest
import simplejpeg
from PIL import Image, ImageOps

from pipeline import workqueue
from pipeline.data import Loader, codecs, open_dataset
from pipeline.data.codecs import OTHER, BadImage, Codec, Picture, Refused, decode, decode_stored
from pipeline.data.loading.augment import Augment
from pipeline.data.loading.samples import sample_images
from pipeline.data.prepare import PrepareConfig, prepare
from tests.images import encoded, jpeg, photo, picture

LIMIT = 10_000_000


# ---------------------------------------------------------------- for prepare: strict, as a viewer shows it


def test_common_formats_decode_to_the_same_pixels():
    pixels = picture()
    image = Image.fromarray(pixels)
    for data in [
        encoded(image, "PNG"),
        encoded(image, "BMP"),
        encoded(image, "TIFF"),
        encoded(image, "WEBP", lossless=True),
        encoded(image, "PPM"),
    ]:
        assert np.array_equal(decode(data, LIMIT).pixels, pixels)
    for data in [
        jpeg(),
        encoded(image, "JPEG", quality=95, progressive=True),
        encoded(image, "JPEG", quality=95, subsampling=1),
    ]:
        assert np.abs(decode(data, LIMIT).pixels.astype(int) - pixels).mean() < 3


def test_unusual_pixels():
    pixels = picture()
    image = Image.fromarray(pixels)
    grey = image.convert("L")
    assert np.array_equal(decode(encoded(grey, "PNG"), LIMIT).pixels, np.asarray(grey)[:, :, None].repeat(3, 2))
    found = decode(encoded(grey, "JPEG", quality=95), LIMIT)
    assert found.intact
    assert np.abs(found.pixels[:, :, 0].astype(int) - np.asarray(grey)).mean() < 3
    palette = image.quantize(16)
    assert np.array_equal(decode(encoded(palette, "PNG"), LIMIT).pixels, np.asarray(palette.convert("RGB")))
    assert np.array_equal(decode(encoded(palette, "GIF"), LIMIT).pixels, np.asarray(palette.convert("RGB")))
    assert decode(encoded(image.convert("1"), "PNG"), LIMIT).pixels.max() == 255
    cmyk = decode(encoded(image.convert("CMYK"), "JPEG", quality=95), LIMIT)
    assert not cmyk.intact
    assert np.abs(cmyk.pixels.astype(int) - pixels).mean() < 4
    deep = Image.fromarray(np.full((5, 6), 40_000, np.uint16))
    for format in ("PNG", "TIFF"):
        assert (decode(encoded(deep, format), LIMIT).pixels == 40_000 >> 8).all()
    with pytest.raises(Refused, match="unsupported pixels"):
        decode(encoded(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"), LIMIT)


def test_transparent_images_are_put_on_white():
    rgba = np.zeros((2, 3, 4), np.uint8)
    rgba[0] = (200, 100, 0, 255)
    found = decode(encoded(Image.fromarray(rgba), "PNG"), LIMIT)
    assert not found.intact
    assert (found.pixels[0] == (200, 100, 0)).all()
    assert (found.pixels[1] == 255).all()


def test_first_frame_of_an_animation():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    for format in ("GIF", "PNG", "WEBP"):
        data = encoded(
            frames[0],
            format,
            save_all=True,
            append_images=frames[1:],
            **({} if format == "GIF" else {"lossless": True}),
        )
        assert Image.open(io.BytesIO(data)).n_frames == 2
        found = decode(data, LIMIT)
        assert (found.pixels == (255, 0, 0)).all()
        assert not found.intact


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_exif_orientation(orientation, format):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(picture()), format, exif=exif)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    found = decode(data, LIMIT)
    assert found.intact == (orientation == 1)
    assert found.pixels.shape == upright.shape
    assert np.abs(found.pixels.astype(int) - upright).mean() < 2


def test_bad_images_have_reasons():
    good, png = jpeg(height=200, width=300), encoded(Image.fromarray(picture()), "PNG")
    broken = bytearray(png)
    broken[60:80] = bytes(20)
    tangled = bytearray(good)
    tangled[len(good) // 2 : len(good) // 2 + 4] = b"\xff\xd4\xff\xd5"
    for data, reason in [
        (b"", "empty"),
        (b"hello, this is text" * 10, "not an image"),
        (bytes(1000), "not an image"),
        (good[:-2], "truncated"),  # only the end marker is missing, not a pixel: decoders report nothing
        (good[: len(good) // 2], "truncated"),
        (png[: len(png) // 2], "truncated"),
        (bytes(broken), "corrupt"),
        (bytes(tangled), "corrupt"),
        (b"\xff\xd8\xff\xe0 nothing more", "corrupt"),
        (encoded(Image.new("L", (5000, 5000)), "PNG"), "too many pixels"),
        (jpeg(height=4000, width=4000), "too many pixels"),
    ]:
        with pytest.raises(Refused) as refused:
            decode(data, LIMIT)
        assert refused.value.reason == reason
    assert decode(good + b"\0" * 100, LIMIT).intact  # padding after the end marker is harmless


@pytest.mark.parametrize(
    ("data", "reason", "detail"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pointer", "git lfs pull"),
        (b"\n<!DOCTYPE html><html>404</html>", "web page", "HTML"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "web page", "XML"),
        (b"<!-- saved page -->\n<!DOCTYPE html><html>404</html>", "web page", "HTML"),
        (b"<?xml version='1.0'?>\n<svg xmlns='x'/>", "unsupported format", "SVG"),
        (b"<!-- Generator: an editor -->\n<!DOCTYPE svg PUBLIC 'x'>\n<svg/>", "unsupported format", "SVG"),
        (b"%PDF-1.7", "unsupported format", "PDF"),
        (b"\xff\x0a" + bytes(60), "unsupported format", "JPEG XL"),
        (bytes(128) + b"DICM" + bytes(9), "unsupported format", "DICOM"),
        (b"\0\0\0\x18ftypmp42" + bytes(60), "unsupported format", "video"),
        (b"\0\0\0\x18ftypcrx " + bytes(60), "unsupported format", "raw file"),
        (b"\x1f\x8b\x08\0" + bytes(60), "unsupported format", "compressed"),
        (b"8BPS\0\1" + bytes(60), "unsupported format", "Photoshop"),
    ],
)
def test_files_that_are_named_like_images_say_what_they_are(data, reason, detail):
    with pytest.raises(Refused) as refused:
        decode(data, LIMIT)
    assert refused.value.reason == reason
    assert detail in refused.value.detail


def test_stray_bytes_between_markers_are_harmless():
    data = jpeg()
    cut = data.index(b"\xff\xdb")
    found = decode(data[:cut] + b"\0\0\0" + data[cut:], LIMIT)
    assert np.abs(found.pixels.astype(int) - picture()).mean() < 3


def test_bombs_are_refused_by_their_header():
    head = bytearray(encoded(Image.new("L", (8, 8)), "PNG"))
    head[16:24] = (60_000).to_bytes(4, "big") * 2
    head[29:33] = zlib.crc32(head[12:29]).to_bytes(4, "big")
    with pytest.raises(Refused, match="too many pixels"):
        decode(bytes(head), 100_000_000)


def test_the_limit_on_pixels_is_that_of_the_call():
    """Pillow's process-wide limit is not changed, and does not prevent a larger limit of one call."""
    limit = Image.MAX_IMAGE_PIXELS
    assert limit is not None
    side = math.isqrt(2 * limit) + 1
    data = encoded(Image.new("1", (side, side)), "PNG")
    with pytest.raises(Refused, match="too many pixels"):
        decode(data, 2 * limit)
    with Image.open(io.BytesIO(encoded(Image.new("1", (9, 9)), "PNG"))) as image:
        assert image.size == (9, 9)
    assert OTHER.open(data).size == (side, side)


def test_orientation_behind_other_segments_and_a_png_without_its_end():
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = encoded(Image.fromarray(picture()), "JPEG", exif=exif)
    late = turned[:2] + b"\xff\xed\x80\x00" + bytes(0x8000 - 2) + turned[2:]
    assert decode(late, LIMIT).pixels.shape == (60, 40, 3)
    png = encoded(Image.fromarray(picture()), "PNG")
    for cut in (png[:-1], png[:-12]):  # no pixel is missing: Pillow reports nothing
        with pytest.raises(Refused, match="truncated"):
            decode(cut, LIMIT)


@pytest.mark.parametrize("format", ["PNG", "WEBP"])
def test_an_unreadable_orientation_loses_no_pixels(format):
    data = encoded(Image.new("RGB", (16, 12), (90, 90, 90)), format, exif=b"Exif\0\0II*\0\xff\xff\xff\x7f")
    assert decode(data, LIMIT).pixels.shape == (12, 16, 3)


@pytest.mark.parametrize("size", [(1000, 1), (1, 1000)])
def test_slivers_are_refused(size):
    with pytest.raises(Refused, match="too narrow"):
        decode(encoded(Image.new("RGB", size), "PNG"), LIMIT)


# ---------------------------------------------------------------- for the loader: fast, as stored


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (encoded(photo(), "PNG"), photo()),
        (encoded(photo(), "BMP"), photo()),
        (encoded(photo(), "TIFF"), photo()),
        (encoded(photo(), "WEBP", lossless=True), photo()),
        (encoded(photo()[:, :, 0], "PNG"), photo()[:, :, [0, 0, 0]]),
        (encoded(Image.fromarray(photo()).convert("P"), "PNG"), np.array(Image.fromarray(photo()).convert("P").convert("RGB"))),
        (encoded(np.dstack([photo(), photo()[:, :, 0]]), "PNG"), photo()),
        (encoded(photo()[:, :, 0].astype(np.uint16) * 257, "PNG"), photo()[:, :, [0, 0, 0]]),
        (encoded(photo()[:, :, 0].astype(np.uint16) * 257, "TIFF"), photo()[:, :, [0, 0, 0]]),
        (encoded(photo()[:, :, 0] > 99, "PNG"), np.where(photo()[:, :, [0, 0, 0]] > 99, 255, 0)),
        (encoded(Image.fromarray(photo()).convert("P"), "GIF", save_all=True, append_images=[Image.new("P", (160, 120))]),
         np.array(Image.fromarray(photo()).convert("P").convert("RGB"))),
    ],
    ids=["png", "bmp", "tiff", "webp", "grey", "palette", "alpha", "png16", "tiff16", "bilevel", "animation"],
)  # fmt: skip
def test_lossless_formats_decode_exactly(data, expected):
    assert np.array_equal(decode_stored(data), expected)
    assert np.array_equal(decode_stored(memoryview(data)), expected)


def test_jpeg_kinds():
    rgb = encoded(photo(), "JPEG", quality=95)
    assert np.array_equal(decode_stored(rgb), simplejpeg.decode_jpeg(rgb))
    assert np.abs(decode_stored(rgb).astype(int) - photo()).mean() < 4
    grey = decode_stored(encoded(photo()[:, :, 0], "JPEG", quality=95))
    assert np.array_equal(grey[:, :, 0], grey[:, :, 2])
    cmyk = decode_stored(encoded(Image.fromarray(photo()).convert("CMYK"), "JPEG", quality=95))
    assert np.abs(cmyk.astype(int) - photo()).mean() < 6
    progressive = encoded(photo(), "JPEG", quality=95, progressive=True)
    assert np.abs(decode_stored(progressive).astype(int) - photo()).mean() < 4
    tagged = Image.Exif()
    tagged[0x0112] = 6
    assert decode_stored(encoded(photo(), "JPEG", exif=tagged)).shape == (120, 160, 3)  # as stored, not rotated


def test_stray_bytes_between_jpeg_markers_are_not_damage():
    data = encoded(photo(), "JPEG", quality=95)
    assert np.array_equal(decode_stored(data[:-2] + b"\x00\x00\x00" + data[-2:]).shape, (120, 160, 3))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not an image",
        b"\xff\xd8",
        encoded(photo(), "JPEG")[:2000],
        encoded(photo(), "PNG")[:9000],
        b"\x89PNG\r\n\x1a\n" + b"\0" * 40,
        encoded(photo(), "PNG")[:16] + (1 << 20).to_bytes(4, "big") * 2 + encoded(photo(), "PNG")[24:],
        encoded(photo(), "JPEG")[:1000] + bytes(3000) + encoded(photo(), "JPEG")[4000:],
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n",
    ],
    ids=["empty", "text", "two-bytes", "cut-jpeg", "cut-png", "hollow-png", "bomb", "corrupt-jpeg", "postscript"],
)
def test_damaged_files_are_bad_images(data):
    with pytest.raises(BadImage):
        decode_stored(data)


# ---------------------------------------------------------------- the list


class Raw(Codec):
    """An invented format: a signature, height and width as one byte each, and RGB pixels."""

    def decode(self, data, max_pixels, max_aspect=100):
        if len(data) != 6 + data[4] * data[5] * 3:
            raise Refused("truncated")
        return Picture(self.decode_stored(data, max_pixels), intact=True)

    def decode_stored(self, data, max_pixels):
        return np.frombuffer(data, np.uint8, offset=6).reshape(data[4], data[5], 3)


def raw(pixels):
    return b"RAW1" + bytes(pixels.shape[:2]) + pixels.tobytes()


def test_a_format_is_one_entry_of_the_list(tmp_path, monkeypatch):
    """Files are found, labelled, decoded, stored unchanged, read back and shown; truncated files become rejects."""
    monkeypatch.setattr(codecs, "CODECS", [*codecs.CODECS, Raw(name="RAW", extensions=("raw",), signature=b"RAW1")])
    pictures = {f"{name}/{i}.raw": picture(24, 24, seed=10 * len(name) + i) for name in ("ox", "cow") for i in range(4)}
    for path, pixels in pictures.items():
        (tmp_path / "in" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / path).write_bytes(raw(pixels))
    (tmp_path / "in" / "ox" / "cut.RAW").write_bytes(raw(picture(24, 24))[:-1])
    with workqueue.without_ray():
        config = PrepareConfig(source=(str(tmp_path / "in"),), output=str(tmp_path / "out"), max_reject_fraction=0.5)
        manifest = prepare(config)[""]
    assert (manifest.inputs, manifest.rejects) == (9, {"truncated": 1})
    dataset = open_dataset(tmp_path / "out")
    assert dataset.classes == ["cow", "ox"]
    plain = Augment(size=24, crop="center", flip=False)
    with Loader(dataset, batch_size=8, train=False, augment=plain) as loader:
        [batch] = loader
    for key, image in zip(batch["key"], batch["image"], strict=True):
        assert np.array_equal(image, pictures[key])
    assert sample_images(str(tmp_path / "in" / "cow"), 24, limit=9).shape == (4, 24, 24, 3)


def test_no_two_formats_claim_a_file():
    ends = [extension for codec in codecs.CODECS for extension in codec.extensions]
    assert len(ends) == len(set(ends))
    image = Image.fromarray(photo())
    pillow_heif.register_heif_opener()  # as the codec does for its first file
    for codec in codecs.CODECS:
        data = encoded(image.convert("P") if codec.name == "GIF" else image, codec.name)
        assert [other.name for other in codecs.CODECS if other.recognizes(data)] == [codec.name]
        assert codecs.find(memoryview(data)) is codec
