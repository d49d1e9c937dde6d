"""Image descriptors from a network that the user provides, and the search for similar descriptors.

The network is a TorchScript file that maps each image to a vector, such as SSCD (Pizzi et al., "A self-supervised
descriptor for image copy detection", CVPR 2022). Vectors are compared by cosine similarity. FAISS does the search
(Douze et al., "The Faiss library", 2024). No step compares all pairs of a large corpus: k-means divides the space into
lists, a vector is added to the lists with the nearest centres, and each list is searched exactly.
"""

import io
import json
import zipfile
from collections.abc import Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np

from pipeline import storage
from pipeline.data.duplicates.candidates import DESCRIPTOR, Pairs, as_pairs, no_pairs
from pipeline.errors import UserError, plural
from pipeline.libraries import import_library

METADATA = "descriptor.json"  # extra file of a TorchScript archive
LIST_ROWS = 50_000  # approximate number of vectors per list
PROBES = 3  # lists that a vector is added to
NEIGHBOURS = 16  # nearest vectors that are considered for each vector
TRAINING = 64  # training vectors of k-means per list
MEAN, STD, SIZE = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 288
BATCH = 32


class Preprocessing(NamedTuple):
    """The input of the network: squares of `size` pixels, (RGB in [0, 1] - `mean`) / `std`."""

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


class Descriptor:
    """A network that maps RGB images (uint8, H x W x 3, any size) to vectors of length one.

    uri: a TorchScript file. size, mean, std: the preprocessing. The defaults are those of the extra file
    `descriptor.json` in the TorchScript file, or else 288 pixels and the mean and standard deviation of ImageNet.
    TorchScript is executable code that runs with the rights of the job, so use only files from a trusted origin. Raises
    UserError for other files, and for a network that does not map images to vectors.
    """

    def __init__(
        self,
        uri: str,
        size: int | None = None,
        mean: Sequence[float] = (),
        std: Sequence[float] = (),
        gpu: bool = False,
    ) -> None:
        import torch

        data = read_script(uri)
        extra = {METADATA: ""}
        self.device = torch.device("cuda" if gpu else "cpu")
        try:
            self.network = torch.jit.load(io.BytesIO(data), map_location=self.device, _extra_files=extra).eval()
        except (RuntimeError, ValueError) as error:
            raise UserError(f"--descriptor {uri}: cannot be loaded as TorchScript ({_line(error)})") from error
        self.uri = uri
        self.preprocessing = _preprocessing(uri, extra[METADATA], size, mean, std)
        probe = self([np.zeros((8, 8, 3), np.uint8), np.full((8, 8, 3), 255, np.uint8)])
        self.dimensions = probe.shape[1]

    def __call__(self, pictures: Sequence[np.ndarray]) -> np.ndarray:
        """The descriptors of images: (images, dimensions) float16, each of length one."""
        import torch

        size, mean, std = self.preprocessing
        batch = np.stack([_square(picture, size) for picture in pictures]).transpose(0, 3, 1, 2)
        images = torch.from_numpy(np.ascontiguousarray(batch)).to(self.device).float() / 255
        images = (images - torch.tensor(mean, device=self.device)[:, None, None]) / torch.tensor(
            std, device=self.device
        )[:, None, None]
        try:
            with torch.inference_mode():
                out = self.network(images)
        except RuntimeError as error:
            raise UserError(
                f"--descriptor {self.uri}: fails on {plural(len(pictures), 'image')} of {size}x{size} ({_line(error)}); set the "
                "size of its input with --descriptor-size"
            ) from error
        if not isinstance(out, torch.Tensor) or out.ndim != 2 or len(out) != len(pictures):
            shape = tuple(out.shape) if isinstance(out, torch.Tensor) else type(out).__name__
            raise UserError(
                f"--descriptor {self.uri}: returns {shape} for {plural(len(pictures), 'image')}, instead of one vector each"
            )
        vectors = torch.nn.functional.normalize(out.float(), dim=1)
        if not bool(torch.isfinite(vectors).all()):
            raise UserError(f"--descriptor {self.uri}: returns numbers that are not finite")
        return vectors.cpu().numpy().astype(np.float16)


def read_script(uri: str) -> bytes:
    """The bytes of a TorchScript file. Raises UserError for other files. The check does not unpickle anything."""
    try:
        data = storage.read_bytes(uri)
    except FileNotFoundError:
        raise UserError(f"--descriptor {uri}: no such file") from None
    try:
        names = [name.partition("/")[2] for name in zipfile.ZipFile(io.BytesIO(data)).namelist()]
    except zipfile.BadZipFile:
        names = []
    if "constants.pkl" not in names or not any(name.startswith("code/") for name in names):
        raise UserError(
            f"--descriptor {uri}: not a TorchScript file; make one with torch.jit.script(model).save(path), or use the "
            ".torchscript.pt of the model's authors"
        )
    return data


def _preprocessing(
    uri: str, metadata: Any, size: int | None, mean: Sequence[float], std: Sequence[float]
) -> Preprocessing:
    try:
        stated = json.loads(metadata) if metadata else {}
        known = Preprocessing(
            int(size or stated.get("size", SIZE)),
            tuple(map(float, mean or stated.get("mean", MEAN))),
            tuple(map(float, std or stated.get("std", STD))),
        )
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise UserError(
            f"--descriptor {uri}: its {METADATA} must be an object with size, mean and std ({error})"
        ) from error
    if (
        not 8 <= known.size <= 4096
        or len(known.mean) != 3
        or len(known.std) != 3
        or not min(known.std) > 0
        or not np.isfinite(known.mean + known.std).all()
    ):
        raise UserError(f"--descriptor {uri}: invalid size {known.size}, mean {known.mean} or std {known.std}")
    return known


def _square(picture: np.ndarray, size: int) -> np.ndarray:
    smaller = min(picture.shape[:2]) >= size
    return cv2.resize(picture, (size, size), interpolation=cv2.INTER_AREA if smaller else cv2.INTER_LINEAR)


def _line(error: Exception) -> str:
    return next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)[
        :200
    ]


# ---------------------------------------------------------------- search


def find_centres(sample: np.ndarray, rows: int) -> np.ndarray:
    """Centres of the lists, (lists, dimensions), by spherical k-means: one for every LIST_ROWS of `rows` vectors."""
    faiss = import_library("faiss")
    lists = max(1, min(-(-rows // LIST_ROWS), len(sample) // TRAINING))
    if lists == 1:
        return np.zeros((1, sample.shape[1]), np.float32)
    means = faiss.Kmeans(sample.shape[1], lists, niter=10, spherical=True, seed=0, max_points_per_centroid=TRAINING)
    means.train(np.ascontiguousarray(sample, np.float32))
    return means.centroids


def nearest_lists(vectors: np.ndarray, centres: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(positions in `vectors`, lists): each vector with the PROBES lists that have the nearest centres."""
    index = import_library("faiss").IndexFlatIP(centres.shape[1])
    index.add(np.ascontiguousarray(centres, np.float32))
    probes = min(PROBES, len(centres))
    _, lists = index.search(np.ascontiguousarray(vectors, np.float32), probes)
    return np.repeat(np.arange(len(vectors)), probes), lists.ravel()


def match_vectors(rows: np.ndarray, vectors: np.ndarray, similarity: float, corpus: int, inside: bool) -> Pairs:
    """Pairs of rows in one list whose vectors have at least the cosine `similarity`, among the NEIGHBOURS nearest of
    each row.

    corpus: rows with this number or above belong to evaluation sets; such a row is `first` in its pairs, and two such
    rows do not form a pair. inside: whether two rows of the corpus can form a pair.
    """
    order = np.argsort(rows, kind="stable")
    rows, vectors = rows[order], np.ascontiguousarray(vectors[order], np.float32)
    of_set = rows >= corpus
    queries, targets = (np.arange(len(rows)),) * 2 if inside else (np.flatnonzero(~of_set), np.flatnonzero(of_set))
    if not len(queries) or not len(targets):
        return no_pairs()
    index = import_library("faiss").IndexFlatIP(vectors.shape[1])
    index.add(vectors[targets])
    near, found = index.search(vectors[queries], min(len(targets), NEIGHBOURS + 1))
    a, b = np.repeat(queries, found.shape[1]), targets[found.ravel()]
    good = (near.ravel() >= similarity) & (a != b) & ~(of_set[a] & of_set[b])
    a, b, near = a[good], b[good], near.ravel()[good]
    # the row that is kept comes first: the evaluation image, or else the earlier row
    swap = np.where(of_set[a] != of_set[b], of_set[b], b < a)
    first, second = np.where(swap, rows[b], rows[a]), np.where(swap, rows[a], rows[b])
    return as_pairs({"first": first, "second": second, "kind": np.full(len(first), DESCRIPTOR), "similarity": near})
