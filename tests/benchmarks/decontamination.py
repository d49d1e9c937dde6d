"""Recall, false removals and cost of the duplicate search, measured with the code that `prepare` runs.

    python tests/benchmarks/decontamination.py --photos FOLDER... --posed FOLDER... --output FOLDER

Recall: every image in `photos` is changed in each way and looked up among the unchanged ones, as an evaluation set and
as neighbours in one corpus. Wrong removals: of each set of pictures that are posed alike (the `posed` folders; sets
drawn by tests/posed.py; one class of CIFAR-10 is a good one) all are one corpus, and one half is the evaluation set of
the other; `verification_only` gives pairs to verification that hashing did not propose. Thresholds were chosen on the
images of even number in `photos` and on drawn pictures of seeds below 1000; only what is left is measured here
(--choosing measures the former). The `posed` folders were used to choose nothing and are measured whole. Writes
results/decontamination.json; --output gets contact sheets of the least certain pairs. --parts measures some of the parts
and keeps the results of the others."""

import argparse
import itertools
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np
import pyarrow.parquet as pq
import simplejpeg
import torch

from models import create_model
from pipeline import workqueue
from pipeline.data import codecs
from pipeline.data.codecs import decode_stored
from pipeline.data.duplicates.candidates import PERCEPTUAL, boxes, candidate_lines, match_rows, unique_pairs
from pipeline.data.duplicates.descriptors import LIST_ROWS, PROBES, Descriptor, match_vectors
from pipeline.data.duplicates.evaluation import EvaluationIndex, index_evaluation_sets
from pipeline.data.duplicates.hashes import ROW, VIEW, Hashes, hash_image, join_keys
from pipeline.data.duplicates.report import pair_sheet
from pipeline.data.duplicates.verification import compare_unaligned, compare_views, small_copy
from pipeline.data.prepare import PrepareConfig, prepare

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.posed import POSES

DISTANCE = 30
rng = np.random.default_rng(0)


def encode(pixels, quality):
    return simplejpeg.decode_jpeg(simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), quality, "RGB", "420"))


def resize(pixels, side):
    scale = side / min(pixels.shape[:2])
    return cv2.resize(pixels, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)


def crop(pixels, side):
    height, width = (round(side * n) for n in pixels.shape[:2])
    top, left = rng.integers(0, pixels.shape[0] - height + 1), rng.integers(0, pixels.shape[1] - width + 1)
    return pixels[top : top + height, left : left + width]


def gain(pixels, factor, offset=0):
    return np.clip(pixels.astype(np.float32) * factor + offset, 0, 255).astype(np.uint8)


CHANGES = {
    "JPEG quality 50": lambda p: encode(p, 50),
    "JPEG quality 20": lambda p: encode(p, 20),
    "shorter side 128, JPEG 90": lambda p: encode(resize(p, 128), 90),
    "32x32 by area averaging": lambda p: cv2.resize(p, (32, 32), interpolation=cv2.INTER_AREA),
    "32x32, JPEG 90": lambda p: encode(cv2.resize(p, (32, 32), interpolation=cv2.INTER_AREA), 90),
    "32x32 bilinear, aliased": lambda p: cv2.resize(p, (32, 32), interpolation=cv2.INTER_LINEAR),
    "mirrored": lambda p: p[:, ::-1],
    "brightness x 0.7": lambda p: gain(p, 0.7),
    "brightness x 1.3": lambda p: gain(p, 1.3),
    "brightness + 40": lambda p: gain(p, 1, 40),
    "grey": lambda p: np.repeat(cv2.cvtColor(p, cv2.COLOR_RGB2GRAY)[:, :, None], 3, axis=2),
    "crop, 95% of each side": lambda p: crop(p, 0.95),
    "crop, 90% of each side": lambda p: crop(p, 0.9),
    "crop, 90% of each side, mirrored": lambda p: crop(p, 0.9)[:, ::-1],
    "crop, 80% of each side": lambda p: crop(p, 0.8),
    "crop, 80%, mirrored, JPEG 50": lambda p: encode(crop(p, 0.8)[:, ::-1], 50),
    "crop, 60% of each side": lambda p: crop(p, 0.6),
    "rotated by 2 degrees": lambda p: cv2.warpAffine(
        p, cv2.getRotationMatrix2D((p.shape[1] / 2, p.shape[0] / 2), 2, 1.05), p.shape[1::-1]
    ),
}

BRIGHTNESS = ("brightness x 0.7", "brightness x 1.3", "brightness + 40")


def photographs(folders: list[str], start: int = 0, step: int = 1, most: int | None = None) -> list[np.ndarray]:
    """The readable images of some folders, by name."""
    names = sorted(
        p for folder in folders for p in Path(folder).rglob("*") if p.suffix.lower() in (".jpg", ".jpeg", ".png")
    )
    found = []
    for path in names[start::step][:most]:
        try:
            found.append(codecs.decode(path.read_bytes(), 10**8).pixels.copy())
        except codecs.Refused:
            continue
    return found


def index_of(photos: list[np.ndarray]) -> EvaluationIndex:
    with tempfile.TemporaryDirectory() as folder, workqueue.without_ray():
        for i, pixels in enumerate(photos):
            cv2.imwrite(f"{folder}/{i:06d}.png", pixels[:, :, ::-1])
        return index_evaluation_sets([folder], 10**8)


def inside(hashed: list[Hashes], copies: list[bytes]) -> tuple[set[tuple[int, int]], dict[tuple[int, int], float]]:
    """(pairs that hash alike, {pair that verification confirms: detail}) of images that are one corpus."""
    rows = np.zeros(len(hashed), ROW)
    rows["exact"] = [h.exact for h in hashed]
    for i, one in enumerate(hashed):
        one.views["image"] = i
    views = np.concatenate([np.empty(0, VIEW), *(h.views for h in hashed)])
    pairs = unique_pairs(match_rows(candidate_lines(rows, views, 0, False, True, True), DISTANCE))
    first_box, second_box = boxes(pairs["first_box"]), boxes(pairs["second_box"])
    proposed: set[tuple[int, int]] = set()
    confirmed: dict[tuple[int, int], float] = {}
    for i, pair in enumerate(zip(pairs["first"].tolist(), pairs["second"].tolist(), strict=True)):
        proposed.add(pair)
        if pair in confirmed:
            continue
        if pairs["kind"][i] < PERCEPTUAL:
            confirmed[pair] = 1.0
            continue
        mirrored = bool(pairs["mirrored"][i])
        agreement = compare_views(copies[pair[1]], copies[pair[0]], second_box[i], first_box[i], mirrored)
        if agreement.same:
            confirmed[pair] = agreement.detail
    return proposed, confirmed


def recall(photos: list[np.ndarray], changes: list[str], output: Path | None) -> dict[str, dict[str, float]]:
    """By change: part found against an evaluation set and inside a corpus, and how many were matched to another
    image."""
    index = index_of(photos)
    number = {int(key[:-4]): place for place, key in enumerate(index.keys.to_pylist())}
    plain, copies = [hash_image(pixels) for pixels in photos], [small_copy(pixels) for pixels in photos]
    rows, shown = {}, []
    for change in changes:
        function, found, wrong = CHANGES[change], 0, 0
        hashed, changed_copies = [], []
        for i, pixels in enumerate(photos):
            changed = np.ascontiguousarray(function(pixels))
            hashed.append(hash_image(changed))
            changed_copies.append(small_copy(changed))
            match = index.find(hashed[-1], changed, DISTANCE)
            found += match is not None and match.image == number[i]
            wrong += match is not None and match.image != number[i]
        _, confirmed = inside(plain + hashed, copies + changed_copies)
        right = {(i, len(photos) + i) for i in range(len(photos))}
        every = copies + changed_copies
        shown += [(d, change, every[a], every[b]) for (a, b), d in confirmed.items() if d < 1]
        rows[change] = {
            "photographs": len(photos),
            "evaluation": round(found / len(photos), 4),
            "wrong": wrong,
            "inside": round(len(confirmed.keys() & right) / len(photos), 4),
            "wrong_inside": sum(b - a != len(photos) for a, b in confirmed),
        }
        print(f"{change:36s} {rows[change]}", flush=True)
    write_sheet(output, "copies", shown)
    return rows


def write_sheet(output: Path | None, name: str, shown: list[tuple[float, str, bytes, bytes]]) -> None:
    """The 24 least certain pairs."""
    if output is not None and shown:
        shown = sorted(shown, key=lambda pair: pair[0])[:24]
        pairs = [
            (decode_stored(a).copy(), decode_stored(b).copy(), f"{detail:.2f} {title}") for detail, title, a, b in shown
        ]
        (output / f"{name}.png").write_bytes(pair_sheet(pairs))


def wrong_removals(name: str, photos: list[np.ndarray], output: Path | None, alone: int) -> dict[str, int]:
    """False removals in a set of distinct images."""
    half = len(photos) // 2
    index = index_of(photos[:half])
    hashed = [hash_image(pixels) for pixels in photos]
    copies = [small_copy(pixels) for pixels in photos]
    proposed, confirmed = inside(hashed, copies)
    every = list(itertools.product(itertools.combinations(copies, 2), (False, True)))
    every = [every[i] for i in np.random.default_rng(1).permutation(len(every))[:alone]]
    result = {
        "images": len(photos),
        "proposed": sum(bool(index.propose(h, DISTANCE)) for h in hashed[half:]),
        "removed": sum(
            index.find(h, p, DISTANCE) is not None for h, p in zip(hashed[half:], photos[half:], strict=True)
        ),
        "pairs_proposed_inside": len(proposed),
        "pairs_confirmed_inside": len(confirmed),
        "verification_only": len(every),
        "verification_only_confirmed": sum(compare_views(b, a, mirrored=mirrored).same for (a, b), mirrored in every),
        "unaligned": len(every) // 10,
        "unaligned_confirmed": sum(compare_unaligned(b, a).same for (a, b), _ in every[: len(every) // 10]),
    }
    print(name, result, flush=True)
    write_sheet(output, name, [(d, name, copies[a], copies[b]) for (a, b), d in confirmed.items()])
    return result


def costs(photos: list[np.ndarray]) -> dict[str, float]:
    """CPU milliseconds of the steps, an image or a pair; bytes and lines of an image."""
    copies, hashed = [small_copy(pixels) for pixels in photos], [hash_image(pixels) for pixels in photos]
    pairs = list(itertools.pairwise(copies))
    parts = [decode_stored(encode_part(pixels)).copy() for pixels in photos]
    true_pairs = list(zip(copies, map(small_copy, parts), strict=True))
    steps = {
        "pixel_hash": lambda: [hash_image(pixels, views=False) for pixels in photos],
        "hash": lambda: [hash_image(pixels) for pixels in photos],
        "small_copy": lambda: [small_copy(pixels) for pixels in photos],
        "verification_of_others": lambda: [compare_views(a, b) for a, b in pairs],
        "verification_of_copies": lambda: [compare_views(a, b) for a, b in true_pairs],
    }
    milliseconds = {}
    for name, step in steps.items():
        begin = time.process_time()
        step()
        milliseconds[name] = round(1e3 * (time.process_time() - begin) / len(photos), 2)
    lines = [len(join_keys(h.views)[0]) for h in hashed]
    return milliseconds | {
        "small_copy_bytes": round(sum(map(len, copies)) / len(copies)),
        "views": round(float(np.mean([len(h.views) for h in hashed])), 1),
        "view_bytes": VIEW.itemsize,
        "lines": round(float(np.mean(lines)), 1),
    }


def small_pictures(photos: list[np.ndarray]) -> dict[str, float]:
    """Part of small pictures whose re-encoded copy verification confirms."""
    rates = {}
    for side, quality in itertools.product((32, 64), (50, 75, 90)):
        pictures = [cv2.resize(pixels, (side, side), interpolation=cv2.INTER_AREA) for pixels in photos]
        same = [compare_views(small_copy(encode(p, quality)), small_copy(p)).same for p in pictures]
        rates[f"{side}x{side}, JPEG {quality}"] = round(sum(same) / len(same), 4)
    return rates


def damaged(photos: list[np.ndarray]) -> dict[str, float]:
    """Part of damaged evaluation images whose whole copy is kept out."""
    rates = {}
    for spared in (0.995, 0.9, 0.7, 0.5):
        found = 0
        with tempfile.TemporaryDirectory() as folder, workqueue.without_ray():
            for i, pixels in enumerate(photos):
                data = simplejpeg.encode_jpeg(pixels, 90, "RGB", "420")
                (Path(folder) / f"{i:04d}.jpg").write_bytes(data[: int(len(data) * spared)])
            index = index_evaluation_sets([folder], 10**8)
        for i, pixels in enumerate(photos):
            match = index.find(hash_image(pixels), pixels, DISTANCE)
            found += match is not None and index.name(match.image)[1] == f"{i:04d}.jpg"
        rates[f"the first {100 * spared:g}% of the file"] = round(found / len(photos), 4)
    return rates


def descriptor_cost(photos: list[np.ndarray]) -> dict[str, float]:
    """CPU milliseconds of an image: a ResNet-50 with random weights at 288 pixels, as large as SSCD's, and the search in one
    full list of vectors, of which an image needs PROBES."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.pt"
        torch.jit.trace(create_model("R50x1", num_classes=512).eval(), torch.zeros(2, 3, 288, 288)).save(str(path))
        network = Descriptor(str(path), size=288)
    begin = time.process_time()
    network(photos[:8])
    middle = time.process_time()
    vectors = np.random.default_rng(0).normal(size=(LIST_ROWS, 512)).astype(np.float16)
    vectors /= np.linalg.norm(vectors.astype(np.float32), axis=1, keepdims=True).astype(np.float16)
    end = time.process_time()
    match_vectors(np.arange(len(vectors)), vectors, 0.6, len(vectors), True)
    return {
        "network": round(1e3 * (middle - begin) / 8, 1),
        "search_of_a_list": round(1e3 * (time.process_time() - end) / len(vectors), 3),
        "lists": PROBES,
    }


class Colours(torch.nn.Module):
    """The smallest network that separates photographs: mean and standard deviation of each channel."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        flat = images.flatten(2)
        return torch.cat([flat.mean(2), flat.std(2)], dim=1)


def levels(photos: list[np.ndarray]) -> dict[str, float]:
    """CPU milliseconds an image of the whole of `prepare`, by level of the search, for JPEG files of quality 95."""
    torch.set_num_threads(1)
    milliseconds = {}
    with tempfile.TemporaryDirectory() as folder, workqueue.without_ray():
        (Path(folder) / "corpus").mkdir()
        for i, pixels in enumerate(photos):
            data = simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), 95, "RGB", "444")
            (Path(folder) / "corpus" / f"{i:04d}.jpg").write_bytes(data)
        torch.jit.save(torch.jit.script(Colours()), f"{folder}/network.pt")
        network = {"deduplicate": "near", "descriptor": f"{folder}/network.pt", "descriptor_similarity": 0.999}
        ways = {
            "off": {},
            "exact": {"deduplicate": "exact"},
            "near": {"deduplicate": "near"},
            "near with a small network": network,
        }
        for i, (name, options) in enumerate([("warm-up", network), *ways.items()]):
            begin = time.process_time()
            prepare(PrepareConfig(source=(f"{folder}/corpus",), output=f"{folder}/{i}", unlabelled=True, **options))
            milliseconds[name] = round(1e3 * (time.process_time() - begin) / len(photos), 1)
    del milliseconds["warm-up"]  # imports and first calls of libraries
    return {"photographs": len(photos)} | milliseconds


def through_prepare(photos: list[np.ndarray]) -> dict[str, dict[str, float]]:
    """By change: part of the changed photographs that `prepare` removes, as copies of an evaluation set and of earlier
    images of the corpus, and how many others it removes. Files are JPEG of quality 95."""
    rows = {}
    for change in BRIGHTNESS:
        found = {}
        for way in ("evaluation", "inside"):
            with tempfile.TemporaryDirectory() as folder, workqueue.without_ray():
                for i, pixels in enumerate(photos):
                    for name, picture in (("plain", pixels), ("changed", CHANGES[change](pixels))):
                        path = Path(folder, "set" if name == "plain" and way == "evaluation" else "corpus", name)
                        path.mkdir(parents=True, exist_ok=True)
                        picture = np.ascontiguousarray(picture)
                        (path / f"{i:04d}.jpg").write_bytes(simplejpeg.encode_jpeg(picture, 95, "RGB", "444"))
                (Path(folder, "corpus") / "other.png").write_bytes(cv2.imencode(".png", POSES["scenes"](0))[1])
                options = {"deduplicate": "near"} if way == "inside" else {"decontaminate": (f"{folder}/set",)}
                prepare(PrepareConfig(source=(f"{folder}/corpus",), output=f"{folder}/out", unlabelled=True, **options))
                gone = pq.read_table(f"{folder}/out/duplicates.parquet").to_pylist()
            same = [Path(row["key"]).name == Path(row["match"]).name for row in gone]
            found[way] = round(sum(same) / len(photos), 4)
            found[f"wrong_{way}"] = len(same) - sum(same)
        rows[change] = found
        print(f"prepare, {change:30s} {found}", flush=True)
    return rows


def encode_part(pixels: np.ndarray) -> bytes:
    return simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), 50, "RGB", "420")


def join_cost(images_of_corpus: int) -> dict[str, float]:
    """Cost of the join of random views with the lines of `count` images: CPU seconds and memory of one process."""
    draw = np.random.default_rng(0)
    rows, views = np.zeros(images_of_corpus, ROW), np.zeros(33 * images_of_corpus, VIEW)
    rows["exact"] = np.arange(images_of_corpus)
    views["image"] = np.repeat(np.arange(images_of_corpus), 33)
    views["bits"] = draw.integers(0, 2**64, (len(views), 2), np.uint64, endpoint=False)
    views["whole"] = np.arange(len(views)) % 33 == 0
    begin = time.process_time()
    lines = candidate_lines(rows, views, 0, False, True, True)
    middle = time.process_time()
    pairs = match_rows(lines, DISTANCE)
    return {
        "images": images_of_corpus,
        "make_lines": round(middle - begin, 2),
        "match": round(time.process_time() - middle, 2),
        "line_bytes": sum(column.nbytes for column in lines.values()) / len(lines["join"]),
        "pairs": len(pairs["first"]),
    }


PARTS = [
    "posed",
    "photographs_as_they_are",
    "recall",
    "end_to_end",
    "cost",
    "small",
    "damaged",
    "descriptor",
    "levels",
    "join",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", required=True, nargs="+")
    parser.add_argument("--posed", default=[], nargs="*", help="folders of different pictures that are posed alike")
    parser.add_argument("--most", type=int, help="images of each folder, at most")
    parser.add_argument("--alone", type=int, default=1500, help="pairs of each folder and pose for verification only")
    parser.add_argument("--drawn", type=int, default=100, help="drawn pictures of each pose")
    parser.add_argument("--choosing", action="store_true", help="the images on which thresholds were chosen")
    parser.add_argument("--output", type=Path, help="folder for contact sheets")
    parser.add_argument(
        "--parts", nargs="*", choices=PARTS, default=PARTS, help="what to measure (default: everything)"
    )
    parser.add_argument("--changes", nargs="*", choices=CHANGES, default=list(CHANGES), help="the changes of recall")
    options = parser.parse_args()
    cv2.setNumThreads(1)
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
    result = measured(options)
    print(json.dumps({name: result[name] for name in result if name not in ("posed", "recall")}, indent=1))
    if not options.choosing:
        where = Path(__file__).parent / "results" / "decontamination.json"
        known = json.loads(where.read_text()) if where.exists() and options.parts != PARTS else {}
        for name in ("posed", "recall", "end_to_end"):
            result[name] = known.get(name, {}) | result.get(name, {})
        where.write_text(json.dumps(known | result, indent=1) + "\n")


def measured(options: argparse.Namespace) -> dict[str, object]:
    """The results of the parts that were asked for."""
    start, seed = (0, 0) if options.choosing else (1, 1000)
    photos = [p for folder in options.photos for p in photographs([folder], start, 2, options.most)]
    posed = {Path(folder).name: photographs([folder], most=options.most) for folder in options.posed}
    posed |= {name: [draw(seed + i) for i in range(options.drawn)] for name, draw in POSES.items() if options.drawn}
    parts = {
        "posed": lambda: {
            name: wrong_removals(name, pictures, options.output, options.alone) for name, pictures in posed.items()
        },
        "photographs_as_they_are": lambda: wrong_removals("photographs", photos, options.output, options.alone),
        "recall": lambda: recall(photos, options.changes, options.output),
        "end_to_end": lambda: through_prepare(photos),
        "cost": lambda: {"photographs": len(photos)} | costs(photos),
        "small": lambda: {"photographs": len(photos)} | small_pictures(photos),
        "damaged": lambda: {"photographs": len(photos)} | damaged(photos),
        "descriptor": lambda: descriptor_cost(photos),
        "levels": lambda: levels(photos),
        "join": lambda: [join_cost(count) for count in (5_000, 10_000, 20_000, 40_000)],
    }
    return {"distance": DISTANCE} | {name: parts[name]() for name in options.parts} | {"host": {"cpus": os.cpu_count()}}


if __name__ == "__main__":
    main()
