"""TFDS's `diabetic_retinopathy_detection/btgraham-300`: normalises retinas to the same scale, brightness and round
frame. The method comes from the winner of the 2015 competition (B. Graham). It defines the pixels of the task,
including JPEG of quality 72, so this is the only task whose images are computed instead of copied.
"""

import cv2
import numpy as np

from pipeline.errors import UserError

RADIUS = 300  # pixels from the centre of the eye to its edge
QUALITY = 72
MAX_SIDE = 20_000  # pixels after scaling; otherwise a few bright pixels on black would be scaled up as a tiny eye


def btgraham(data: bytes, name: str) -> bytes:
    """Converts a photograph of the eye (any format that OpenCV reads) to the JPEG file of the task, at most 540 x 540.
    Raises UserError if the photograph cannot be decoded.
    """
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH)
    if image is None:
        raise UserError(f"{name}: not a readable image")
    # The bright pixels of the middle row are the eye. For a black frame, half the height is used as the radius.
    brightness = image[image.shape[0] // 2].sum(axis=1)
    radius = (brightness > brightness.mean() / 10).sum() / 2
    if radius < 1:
        radius = image.shape[0] / 2
    if max(image.shape[:2]) * RADIUS / radius > MAX_SIDE:
        raise UserError(f"{name}: no eye in the picture (radius {radius} pixels)")
    image = cv2.resize(image, None, fx=RADIUS / radius, fy=RADIUS / radius)
    # Subtract the local average: lighting differs between cameras, lesions are local.
    image = cv2.addWeighted(image, 4, cv2.GaussianBlur(image, (0, 0), RADIUS / 30), -4, 128)
    height, width = image.shape[:2]
    y, x, keep = height // 2, width // 2, int(RADIUS * 0.9)  # the rim of the eye has only artefacts
    disc = cv2.circle(np.zeros(image.shape, np.uint8), (x, y), keep, (1, 1, 1), thickness=-1)
    image = np.where(disc, image, 128).astype(np.uint8)
    image = image[max(y - keep, 0) : min(y + keep, height), max(x - keep, 0) : min(x + keep, width)]
    return cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, QUALITY])[1].tobytes()
