"""What the duplicate search finds and misses: recall under changes of real photographs, and false matches.

    python tests/benchmarks/decontamination.py --photos FOLDER --others FOLDER...

Every image in `photos` is changed in each way and looked up among the unchanged ones, by itself at distances of 12 to
28 of 128 bits against an evaluation set, and at 24 bits as a neighbour in the same corpus; `others` (images that are in no way in `photos`) count the false matches. Writes results/decontamination.json
and prints the table of docs/decontamination.md.
"""

import argparse
import json
import os
from pathlib import Path

import cv2
import numpy as np
import simplejpeg

from pipeline.data import duplicates as dedup
from pipeline.data import images

DISTANCES = (12, 20, 24, 28)
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


def inside(plain, changed, distance=24):
    """How many changed images the join inside a corpus brings together with their originals, and pairs that are none."""
    tables = []
    for number, looks in enumerate((plain, changed)):
        rows = np.zeros(len(looks), dedup.ROW)
        rows["bits"], rows["exact"] = looks, np.arange(len(looks)) + 1 + (number << 32)
        tables.append(dedup.emit(rows, number, False, True, True))
    pairs = dedup.meet({name: np.concatenate([table[name] for table in tables]) for name in tables[0]}, distance)
    found = set(zip(pairs["first"].tolist(), pairs["second"].tolist(), strict=True))
    right = {(i, 1 << 32 | i) for i in range(len(plain))}
    return len(found & right) / len(plain), len(found - right)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--photos", required=True)
    parser.add_argument("--others", required=True, nargs="+")
    options = parser.parse_args()
    cv2.setNumThreads(1)
    index = dedup.build_index([options.photos], 10**8, map)
    names = [
        path for path in sorted(Path(options.photos).rglob("*")) if path.suffix.lower() in (".jpg", ".jpeg", ".png")
    ]
    place = {key: i for i, key in enumerate(index.keys.to_pylist())}
    photos = [
        (place[str(p.relative_to(options.photos))], images.decode(p.read_bytes(), 10**8).pixels.copy()) for p in names
    ]
    rows = {}
    plain = np.array([dedup.hashes(pixels).bits[0] for _, pixels in photos])
    for change, function in CHANGES.items():
        counts = dict.fromkeys(DISTANCES, 0)
        wrong, looks = 0, []
        for number, pixels in photos:
            hashed = dedup.hashes(function(pixels), crops=True)
            looks.append(hashed.bits[0])
            match = index.find(hashed, max(DISTANCES))
            wrong += match is not None and match[0] != number
            for distance in DISTANCES:
                counts[distance] += match is not None and match[0] == number and match[1] <= distance
        rows[change] = {str(d): round(count / len(photos), 4) for d, count in counts.items()} | {"wrong": wrong}
        recall, false = inside(plain, np.array(looks))
        rows[change] |= {"inside": round(recall, 4), "wrong_inside": false}
        print(
            f"{change:36s}{recall:8.1%}{false:4d}"
            + "".join(f"{rows[change][str(d)]:8.1%}" for d in DISTANCES)
            + f"{wrong:6d}",
            flush=True,
        )
    false, total = dict.fromkeys(map(str, DISTANCES), 0), 0
    for path in sorted(path for folder in options.others for path in Path(folder).rglob("*.jpg")):
        total += 1
        match = index.find(dedup.hashes(images.decode(path.read_bytes(), 10**8).pixels, crops=True), max(DISTANCES))
        for distance in DISTANCES:
            false[str(distance)] += match is not None and match[1] <= distance
    print(f"false matches of {total} other images among {len(photos)}: {false}")
    result = {
        "command": f"decontamination.py on {len(photos)} photographs and {total} others",
        "photos": len(photos),
        "others": total,
        "recall": rows,
        "false_matches": false,
        "host": {"cpus": os.cpu_count()},
    }
    where = Path(__file__).parent / "results" / "decontamination.json"
    where.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
