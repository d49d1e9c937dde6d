"""The demo's source: scikit-learn's handwritten digits as a folder of images."""

import cv2
import numpy as np

from pipeline import storage


def write_digits(folder: str) -> str:
    """Writes 1,797 digits as `folder/<digit>/NNNN.png`, 8x8 grey, unless they are there already; returns `folder`."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    names = [f"{label}/{i:04d}.png" for i, label in enumerate(digits.target)]
    if not storage.exists(storage.join(folder, names[-1])):
        for image, name in zip(digits.images, names, strict=True):
            pixels = np.minimum(image * 16, 255).astype(np.uint8)  # 17 levels of grey
            storage.write_bytes(storage.join(folder, name), cv2.imencode(".png", pixels)[1].tobytes())
    return folder
