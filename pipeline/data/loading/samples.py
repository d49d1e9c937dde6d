"""Sample images to inspect a model with: from a folder, a prepared dataset, or two photographs of scikit-learn."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from pipeline import storage
from pipeline.data.codecs import BadImage, decode_stored, extensions, is_image_name
from pipeline.data.loading.augment import Augment
from pipeline.data.loading.transform import augment_image
from pipeline.data.patches import unpatchify
from pipeline.errors import UserError
from pipeline.revision_names import manifest_uri

if TYPE_CHECKING:
    from pipeline.data.format import Dataset


def sample_images(uri: str | None, size: int, limit: int, channels: int = 3) -> np.ndarray:
    """uint8 (n, size, size, channels), n <= limit: images resized to a shorter side of `size` and cropped at the
    centre.

    uri: a folder of images (at any depth), one image, or a prepared dataset, local or s3://; the images are evenly
    spaced. None: crops of the two photographs that scikit-learn installs. Raises UserError if there are no images.
    """
    fit = Augment(size=size, crop="center", resize=size, flip=False)
    fitted = []
    for picture in _pictures(uri, limit):
        out = np.empty((size, size, 3), np.uint8)
        augment_image(fit, picture, (), out, train=False)
        fitted.append(out)
    images = np.stack(fitted)
    if channels == 1:
        return np.round(images @ np.array([0.299, 0.587, 0.114])).astype(np.uint8)[..., None]
    return images


def _pictures(uri: str | None, limit: int) -> Iterator[np.ndarray]:
    """uint8 (H, W, 3); each array is valid until the next one is produced."""
    if uri is None:
        from sklearn.datasets import load_sample_images

        crops = [photo[:, left : left + 400] for left in (120, 0, 240, 60) for photo in load_sample_images().images]
        yield from (np.ascontiguousarray(crop) for crop in crops[:limit])
    elif storage.exists(manifest_uri(uri)):
        from pipeline.data import open_dataset

        dataset = open_dataset(uri)
        yield from stored_pictures(dataset, _spread(len(dataset), limit))
    else:
        files = [file.uri for file in storage.list_files(uri) if is_image_name(file.path)]
        if not files and is_image_name(uri) and storage.exists(uri):
            files = [uri]
        if not files:
            raise UserError(f"{uri}: no images ({', '.join(sorted(extensions()))})")
        for i in _spread(len(files), limit):
            yield _decode(storage.read_bytes(files[i]), files[i])


def stored_pictures(dataset: "Dataset", rows: Sequence[int]) -> Iterator[np.ndarray]:
    """uint8 (H, W, 3) of some rows of a dataset, as stored; each array is valid until the next one is produced."""
    for row in dataset.read(rows):
        if dataset.encoding == "jpeg":
            yield _decode(row["image"], f"{dataset.uri} ({row['key']})")
        else:
            about = dataset.manifest.image
            picture = unpatchify(row["image"], about["height"], about["width"], about["patch_size"])
            yield np.ascontiguousarray(np.broadcast_to(picture, (*picture.shape[:2], 3)))


def _spread(count: int, limit: int) -> list[int]:
    return np.unique(np.linspace(0, count - 1, min(limit, count)).round().astype(int)).tolist()


def _decode(data: bytes, name: str) -> np.ndarray:
    try:
        return decode_stored(data)
    except BadImage as error:
        raise UserError(f"{name}: not a readable image ({error})") from error
