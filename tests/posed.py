"""Images with similar poses that are not copies of each other, for the near-duplicate search.

Each function draws one image (RGB uint8, H x W x 3) from a seed. Images of two
seeds are clearly different to a person."""

import cv2
import numpy as np

from tests.images import textured


def outlines(seed):
    """The same outline and light with different details."""
    outline = cv2.GaussianBlur(textured(1000), (0, 0), 4).astype(np.float32)
    noise = np.random.default_rng(seed).normal(0, 1, (60, 80, 3)).astype(np.float32)
    detail = cv2.resize(noise, (320, 240), interpolation=cv2.INTER_CUBIC)
    return np.clip(outline + 20 * detail, 0, 255).astype(np.uint8)


def sprites(seed):
    """A white shape on black, as in dSprites: 64x64, other place, angle and size."""
    rng = np.random.default_rng(seed)
    picture = np.zeros((256, 256, 3), np.uint8)
    centre, size, angle = rng.integers(70, 186, 2), rng.integers(28, 58), rng.uniform(0, 360)
    if rng.random() < 0.5:
        cv2.ellipse(picture, centre.tolist(), (int(size), int(size * 0.6)), angle, 0, 360, (255,) * 3, -1)
    else:
        corners = cv2.boxPoints((centre.tolist(), (float(2 * size), float(1.6 * size)), angle))
        cv2.fillPoly(picture, [corners.astype(np.int32)], (255,) * 3)
    return cv2.resize(picture, (64, 64), interpolation=cv2.INTER_AREA)


def turned(seed):
    """One lit toy on grey, seen from another side or under another light, as in smallNORB."""
    toy = np.random.default_rng(7)
    picture = np.full((192, 192), 170, np.float32)
    azimuth, light = seed % 18 * np.pi / 9, -1 + seed // 18 % 6 * 0.4
    parts = [(toy.uniform(-50, 50), toy.uniform(-50, 50), toy.uniform(-40, 40), toy.uniform(8, 26)) for _ in range(9)]
    turned_parts = [(x * np.cos(azimuth) + z * np.sin(azimuth), y, z * np.cos(azimuth) - x * np.sin(azimuth), r) for x, y, z, r in parts]  # fmt: skip
    rows, columns = np.mgrid[:192, :192]
    for x, y, z, r in sorted(turned_parts, key=lambda part: part[2]):
        away = np.hypot(columns - 96 - x, rows - 96 - y)
        shade = 120 + 60 * light * (columns - 96 - x) / r + z / 2
        picture = np.where(away < r, shade, picture)
    return np.repeat(np.clip(picture, 0, 255).astype(np.uint8)[:, :, None], 3, axis=2)


def scenes(seed):
    """Coloured balls and boxes on one floor under one light, as in CLEVR."""
    rng = np.random.default_rng(seed)
    picture = np.repeat(np.linspace(90, 170, 240, dtype=np.float32)[:, None, None], 320, 1).repeat(3, 2)
    rows, columns = np.mgrid[:240, :320]
    for _ in range(rng.integers(3, 7)):
        x, y, r = rng.uniform(50, 270), rng.uniform(70, 200), rng.uniform(14, 34)
        colour = rng.uniform(40, 230, 3)
        if rng.random() < 0.5:
            away = np.hypot(columns - x, rows - y) / r
            shade = np.clip(1.2 - np.hypot(columns - x + r / 3, rows - y + r / 3) / (1.4 * r), 0.2, 1.2)
        else:
            away = np.maximum(np.abs(columns - x), np.abs(rows - y)) / (0.8 * r)
            shade = np.where(rows < y - r / 3, 1.1, 0.7)
        picture = np.where((away < 1)[:, :, None], shade[:, :, None] * colour, picture)
    noise = np.random.default_rng(3).normal(0, 2, picture.shape)
    return np.clip(picture + noise, 0, 255).astype(np.uint8)


def documents(seed):
    """Printed forms: one letterhead, other words."""
    rng = np.random.default_rng(seed)
    picture = np.full((320, 240, 3), 255, np.uint8)
    cv2.rectangle(picture, (12, 10), (228, 34), (40, 60, 120), -1)
    cv2.putText(picture, "REPORT OF EXPENSES", (24, 27), cv2.FONT_HERSHEY_SIMPLEX, 0.5, (255,) * 3, 1, cv2.LINE_AA)
    letters = list("abcdefghijklmnopqrstuvwxyz     ")
    for line in range(15):
        text = "".join(rng.choice(letters, 26))
        cv2.putText(picture, text, (14, 60 + 17 * line), cv2.FONT_HERSHEY_SIMPLEX, 0.4, (20,) * 3, 1, cv2.LINE_AA)
    return picture


def filled_forms(seed):
    """Scans of one form, in which fields of the same length have other words."""
    printed, written = np.random.default_rng(50), np.random.default_rng(seed)
    letters = list("abcdefghijklmnopqrstuvwxyz  ")
    picture = np.full((1700, 1200, 3), 252, np.uint8)
    cv2.putText(picture, "Declaration of goods", (90, 110), cv2.FONT_HERSHEY_DUPLEX, 1.4, (20,) * 3, 2, cv2.LINE_AA)
    for y in range(190, 1640, 37):
        label = "".join(printed.choice(letters, printed.integers(8, 22)))
        entry = "".join(written.choice(letters, printed.integers(6, 22) + written.integers(0, 2)))
        cv2.putText(picture, label, (90, y), cv2.FONT_HERSHEY_SIMPLEX, 0.6, (30,) * 3, 1, cv2.LINE_AA)
        cv2.line(picture, (450, y + 6), (1120, y + 6), (150,) * 3, 1)
        cv2.putText(picture, entry, (470, y), cv2.FONT_HERSHEY_SIMPLEX, 0.5, (60, 60, 110), 1, cv2.LINE_AA)
    return picture


def scratched_parts(seed):
    """One machined part below a fixed camera, with other scratches."""
    rng = np.random.default_rng(seed)
    picture = cv2.GaussianBlur(np.random.default_rng(1).normal(0, 12, (700, 900, 3)), (0, 0), 1.5) + 130
    for radius, grey in ((260, 170), (90, 60)):
        cv2.circle(picture, (450, 350), radius, (grey,) * 3, -1, cv2.LINE_AA)
    for angle in np.arange(6):
        hole = int(450 + 180 * np.cos(angle)), int(350 + 180 * np.sin(angle))
        cv2.circle(picture, hole, 26, (82,) * 3, -1, cv2.LINE_AA)
    for _ in range(rng.integers(2, 6)):
        angle = rng.uniform(0, 2 * np.pi)
        start = np.array([450 + 200 * np.cos(angle), 350 + 200 * np.sin(angle)])
        end = start + rng.uniform(30, 90) * np.array([np.cos(2 * angle), np.sin(3 * angle)])
        cv2.line(picture, start.astype(int).tolist(), end.astype(int).tolist(), (225,) * 3, 2, cv2.LINE_AA)
    return np.clip(picture + rng.normal(0, 2, picture.shape), 0, 255).astype(np.uint8)


def bicycles(seed):
    """Catalogue pictures: two wheels and a frame on white, another frame each."""
    rng = np.random.default_rng(seed)
    picture = np.full((480, 640, 3), 255, np.uint8)
    wheels = [(170 + rng.integers(-6, 7), 330 + rng.integers(-4, 5)), (470 + rng.integers(-6, 7), 330)]
    radius, colour = int(rng.integers(98, 116)), tuple(int(v) for v in rng.integers(0, 200, 3))
    for x, y in wheels:
        cv2.circle(picture, (int(x), int(y)), radius, (30, 30, 30), int(rng.integers(6, 18)), cv2.LINE_AA)
        for angle in np.linspace(rng.uniform(0, 1), np.pi + 0.5, int(rng.integers(5, 11)))[:-1]:
            dx, dy = int(radius * np.cos(angle)), int(radius * np.sin(angle))
            cv2.line(picture, (int(x) - dx, int(y) - dy), (int(x) + dx, int(y) + dy), (150,) * 3, 2, cv2.LINE_AA)
    saddle, bar, pedal = (rng.integers(-18, 19, 2) + p for p in ((255, 170), (410, 160), (310, 335)))
    width = int(rng.integers(8, 20))
    for p, q in (
        (saddle, bar),
        (saddle, pedal),
        (bar, pedal),
        (wheels[0], saddle),
        (wheels[0], pedal),
        (bar, wheels[1]),
    ):
        cv2.line(picture, [int(v) for v in p], [int(v) for v in q], colour, width, cv2.LINE_AA)
    return picture


def portraits(seed):
    """A face in the middle before one curtain: other features, other hair, other shirt."""
    rng = np.random.default_rng(seed)
    curtain = cv2.GaussianBlur(np.random.default_rng(5).normal(120, 60, (1, 200, 1)).astype(np.float32), (9, 1), 3)
    picture = np.repeat(np.repeat(curtain.reshape(1, 200, 1), 250, 0), 3, 2) * np.array([0.7, 0.8, 1.0], np.float32)
    picture = np.ascontiguousarray(picture)
    skin, hair, shirt = (rng.uniform(*limits, 3).tolist() for limits in ((140, 220), (10, 120), (20, 230)))
    x, y = 100 + int(rng.integers(-4, 5)), 118 + int(rng.integers(-4, 5))
    cv2.ellipse(picture, (x, 260), (80, 70), 0, 0, 360, shirt, -1, cv2.LINE_AA)
    cv2.ellipse(picture, (x, y - 12), (58 + int(rng.integers(-4, 10)), 68), 0, 0, 360, hair, -1, cv2.LINE_AA)
    cv2.ellipse(
        picture, (x, y), (int(rng.integers(42, 52)), int(rng.integers(54, 64))), 0, 0, 360, skin, -1, cv2.LINE_AA
    )
    apart, level = int(rng.integers(16, 25)), y - int(rng.integers(4, 18))
    for side in (-1, 1):
        cv2.ellipse(picture, (x + side * apart, level), (int(rng.integers(5, 10)), int(rng.integers(3, 6))), 0, 0, 360, (250, 250, 250), -1, cv2.LINE_AA)  # fmt: skip
        cv2.circle(picture, (x + side * apart, level), 3, hair, -1, cv2.LINE_AA)
    cv2.ellipse(picture, (x, y + 30), (int(rng.integers(10, 24)), int(rng.integers(3, 10))), 0, 0, 180, (150, 60, 70), int(rng.integers(2, 6)))  # fmt: skip
    cv2.line(picture, (x, level + 6), (x + int(rng.integers(-6, 7)), y + 14), [0.8 * v for v in skin], 3, cv2.LINE_AA)
    return np.clip(picture, 0, 255).astype(np.uint8)


POSES = {
    f.__name__: f
    for f in (outlines, sprites, turned, scenes, documents, filled_forms, scratched_parts, bicycles, portraits)
}
