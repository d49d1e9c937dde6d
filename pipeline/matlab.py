"""Variables of MATLAB files, read in a process of their own: SciPy's reader crashes on some damaged files."""

import os
import signal
import subprocess
import sys
import tempfile
from typing import IO

import numpy as np

from pipeline.errors import UserError

MAX_FILE_BYTES = 1 << 30  # the largest official file has 182 MB
SECONDS = 3600  # the reader limits its own processor time; this is for a machine that is too busy to run it
READER = os.path.join(os.path.dirname(os.path.abspath(__file__)), "matlab_child.py")


def read_variable(file: IO[bytes], where: str, name: str, *fields: str) -> np.ndarray:
    """One variable of a MATLAB file; with `fields`, those fields of its records, as text: (records, fields).

    where: the address of the file, for errors. The reader takes at most 256 MiB and four times the size of the file.
    Raises UserError for a file that is damaged, too large, or has no such variable.
    """
    with tempfile.TemporaryFile() as stored, tempfile.TemporaryFile() as answer:
        _copy(file, where, stored)
        command = [sys.executable, "-P", READER, name, *fields]
        # Threads of a linear algebra library would take address space; the reader computes nothing.
        env = os.environ | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        try:
            child = subprocess.run(
                command, stdin=stored, stdout=answer, stderr=subprocess.PIPE, timeout=SECONDS, env=env
            )
        except subprocess.TimeoutExpired:
            raise UserError(
                f"{where}: its variable {name} is not read after {SECONDS} seconds; fetch it again"
            ) from None
        if child.returncode:
            raise UserError(
                f"{where}: truncated, or not a MATLAB file with the variable {name} ({_reason(child)}); fetch it again"
            )
        answer.seek(0)
        return np.load(answer, allow_pickle=False)


def _reason(child: subprocess.CompletedProcess[bytes]) -> str:
    """Why the reader ended."""
    if child.returncode == -signal.SIGXCPU:
        return "its reader does not end"
    if child.returncode < 0:
        return f"its reader ended with {signal.Signals(-child.returncode).name}"
    lines = child.stderr.decode("utf-8", "replace").strip().splitlines()
    return lines[-1] if lines else f"its reader ended with exit code {child.returncode}"


def _copy(file: IO[bytes], where: str, target: IO[bytes]) -> None:
    """Copies the file to a temporary one, which the reader can seek in, and goes back to its beginning."""
    while chunk := file.read(1 << 20):
        if target.tell() + len(chunk) > MAX_FILE_BYTES:
            raise UserError(f"{where}: more than {MAX_FILE_BYTES:,} bytes; no official MATLAB file is that large")
        target.write(chunk)
    target.seek(0)
