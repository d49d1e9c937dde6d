"""The README's Python example runs, and gives what its comments say."""

import re
from pathlib import Path

import cv2
import numpy as np

from pipeline.data.format import write_dataset

README = Path(__file__).parents[2] / "README.md"


def test_the_python_example_runs(tmp_path):
    (code,) = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)
    picture = cv2.imencode(".jpg", np.full((32, 32, 3), 100, np.uint8))[1].tobytes()
    data = tmp_path / "data"
    rows = [(f"{i:03d}.jpg", picture, i % 10, 32, 32) for i in range(80)]
    write_dataset(str(data), rows, classes=[str(i) for i in range(10)])
    assert "runs/demo/data/train" in code
    names = {}
    exec(code.replace("runs/demo/data/train", str(data)), names)
    assert names["batch"]["image"].shape == (64, 32, 32, 3)
    assert names["batch"]["label"].shape == (64,)
    assert names["logits"].shape == (64, 10)
