"""What the duplicate search finds and what it removes wrongly, measured with the code that `prepare` runs.

    python tests/benchmarks/decontamination.py --photos FOLDER --others FOLDER... --posed FOLDER...

Recall: every image in `photos` is changed in each way and looked up among the unchanged ones, as an evaluation set and as
neighbours in one corpus. Wrong removals: `others` (images that are in no way in `photos`) are looked up among `photos`; of each
`posed` folder (images of one pose, none a copy of another) one half is the evaluation set of the other half, and all are one
corpus; every pair, as it is and mirrored, is given to the second look alone. `proposed` counts pairs that hash alike, `removed` those that the second look confirms. Thresholds were chosen on the images
of even number; only those of odd number are measured (--all measures all). Writes results/decontamination.json.
"""

import argparse
import itertools
import json
import os
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np
import simplejpeg

from pipeline import workqueue
from pipeline.data import codecs
from pipeline.data.duplicates.candidates import LOOK, MIRRORED, candidate_keys, match_rows, unique_pairs
from pipeline.data.duplicates.evaluation import EvaluationIndex, index_evaluation_sets
from pipeline.data.duplicates.hashes import ROW, Hashes, hash_image
from pipeline.data.duplicates.verification import compare_views, small_copy

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
    "rotated by 2 degrees": lambda p: cv2.warpAffine(
        p, cv2.getRotationMatrix2D((p.shape[1] / 2, p.shape[0] / 2), 2, 1.05), p.shape[1::-1]
    ),
}


def photographs(folders: list[str], everything: bool) -> list[np.ndarray]:
    """The readable images of some folders, by name; of odd number unless everything."""
    names = sorted(
        p for folder in folders for p in Path(folder).rglob("*") if p.suffix.lower() in (".jpg", ".jpeg", ".png")
    )
    found = []
    for path in names if everything else names[1::2]:
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


def inside(hashed: list[Hashes], copies: list[bytes]) -> tuple[set[tuple[int, int]], set[tuple[int, int]]]:
    """(pairs that hash alike, pairs that the second look confirms) of images that are one corpus."""
    rows = np.zeros(len(hashed), ROW)
    rows["bits"], rows["exact"] = [h.bits[0] for h in hashed], [h.exact for h in hashed]
    rows["flat"] = [h.flat for h in hashed]
    pairs = unique_pairs(match_rows(candidate_keys(rows, 0, False, True, True), DISTANCE))
    proposed, confirmed = set(), set()
    for first, second, kind in zip(*(pairs[name].tolist() for name in ("first", "second", "kind")), strict=True):
        proposed.add((first, second))
        if kind < LOOK or compare_views(copies[second], copies[first], mirrored=kind == MIRRORED).same:
            confirmed.add((first, second))
    return proposed, confirmed


def recall(photos: list[np.ndarray], index: EvaluationIndex) -> dict[str, dict[str, float]]:
    """By change: part found against an evaluation set and inside a corpus, and how many were matched to another image."""
    number = {int(key[:-4]): place for place, key in enumerate(index.keys.to_pylist())}
    plain, copies = [hash_image(pixels) for pixels in photos], [small_copy(pixels) for pixels in photos]
    rows = {}
    for change, function in CHANGES.items():
        found = wrong = 0
        hashed, changed_copies = [], []
        for i, pixels in enumerate(photos):
            changed = np.ascontiguousarray(function(pixels))
            hashed.append(hash_image(changed, crops=True))
            changed_copies.append(small_copy(changed))
            match = index.find(hashed[-1], changed, DISTANCE)
            found += match is not None and match.image == number[i]
            wrong += match is not None and match.image != number[i]
        _, confirmed = inside(plain + hashed, copies + changed_copies)
        right = {(i, len(photos) + i) for i in range(len(photos))}
        rows[change] = {
            "evaluation": round(found / len(photos), 4),
            "wrong": wrong,
            "inside": round(len(confirmed & right) / len(photos), 4),
            "wrong_inside": sum(b - a != len(photos) for a, b in confirmed),
        }
        print(f"{change:36s} {rows[change]}", flush=True)
    return rows


def wrong_removals(photos: list[np.ndarray]) -> dict[str, int]:
    """Of images of which none is a copy of another."""
    half = len(photos) // 2
    index = index_of(photos[:half])
    hashed = [hash_image(pixels, crops=True) for pixels in photos]
    copies = [small_copy(pixels) for pixels in photos]
    proposed, confirmed = inside(hashed, copies)
    every = list(itertools.product(itertools.combinations(copies[:120], 2), (False, True)))
    return {
        "images": len(photos),
        "proposed": sum(bool(index.propose(h, DISTANCE)) for h in hashed[half:]),
        "removed": sum(
            index.find(h, p, DISTANCE) is not None for h, p in zip(hashed[half:], photos[half:], strict=True)
        ),
        "pairs_proposed_inside": len(proposed),
        "pairs_confirmed_inside": len(confirmed),
        "second_look_alone": len(every),
        "second_look_confirmed": sum(compare_views(b, a, mirrored=mirrored).same for (a, b), mirrored in every),
    }


def costs(photos: list[np.ndarray]) -> dict[str, float]:
    """CPU milliseconds of the steps, an image or a pair."""
    copies = [small_copy(pixels) for pixels in photos]
    pairs = list(itertools.pairwise(copies))
    steps = {
        "hash": lambda: [hash_image(pixels) for pixels in photos],
        "hash_with_crops": lambda: [hash_image(pixels, crops=True) for pixels in photos],
        "small_copy": lambda: [small_copy(pixels) for pixels in photos],
        "second_look": lambda: [compare_views(a, b) for a, b in pairs],
    }
    milliseconds = {}
    for name, step in steps.items():
        begin = time.process_time()
        step()
        milliseconds[name] = round(1e3 * (time.process_time() - begin) / len(photos), 2)
    return milliseconds | {"small_copy_bytes": round(sum(map(len, copies)) / len(copies))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", required=True)
    parser.add_argument("--others", required=True, nargs="+")
    parser.add_argument("--posed", default=[], nargs="*")
    parser.add_argument("--all", action="store_true", help="also the images on which thresholds were chosen")
    options = parser.parse_args()
    cv2.setNumThreads(1)
    photos, others = photographs([options.photos], options.all), photographs(options.others, options.all)
    index = index_of(photos)
    rows = recall(photos, index)
    hashed = [hash_image(pixels, crops=True) for pixels in others]
    result = {
        "command": f"decontamination.py on {len(photos)} photographs and {len(others)} others",
        "distance": DISTANCE,
        "recall": rows,
        "others": {
            "images": len(others),
            "proposed": sum(bool(index.propose(h, DISTANCE)) for h in hashed),
            "removed": sum(index.find(h, p, DISTANCE) is not None for h, p in zip(hashed, others, strict=True)),
        },
        "others_posed": wrong_removals(others),
        "posed": {Path(f).name: wrong_removals(photographs([f], options.all)) for f in options.posed},
        "milliseconds": costs(photos),
        "host": {"cpus": os.cpu_count()},
    }
    print(json.dumps({name: value for name, value in result.items() if name != "recall"}, indent=1))
    where = Path(__file__).parent / "results" / "decontamination.json"
    where.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
