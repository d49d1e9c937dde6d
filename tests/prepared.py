"""Prepares data sets in a separate process and reads their content."""

import os
import subprocess
import sys
from pathlib import Path

JOB = str(Path(__file__).parents[1] / "jobs" / "prepare.py")


def job(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs jobs/prepare.py and waits for it."""
    quiet = [] if arguments[0] in ("verify", "describe", "delete") else ["--no-tracking"]
    return subprocess.run(
        [sys.executable, JOB, *map(str, arguments), *quiet],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


def content(folder: str | Path) -> dict[str, bytes]:
    """The bytes of every file of a dataset."""
    return {
        str(path.relative_to(folder)): path.read_bytes() for path in sorted(Path(folder).rglob("*")) if path.is_file()
    }


def many(image_folder: Path, copies: int = 25) -> Path:
    """The folder with enough images for several units."""
    for path in list(image_folder.rglob("*.*")):
        for i in range(copies):
            os.link(path, path.with_name(f"{path.stem}-{i}{path.suffix}"))
    (image_folder / "ant" / "broken.jpg").write_bytes((image_folder / "ant" / "001.jpg").read_bytes()[:-2])
    return image_folder
