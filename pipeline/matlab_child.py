"""Reads one variable of a MATLAB file with SciPy: `python matlab_child.py NAME [FIELD ...] <FILE.mat >ARRAY.npy`.

`pipeline.matlab` runs this file in a process of its own, because a damaged file can crash SciPy's reader, or claim any
amount of memory. An error is one line on stderr and exit code 1. The file imports nothing of the project."""

import os
import resource
import sys

import numpy as np
import scipy.io

BASE_BYTES, BYTES_PER_BYTE = 256 << 20, 4
"""The memory that the reader may take for a file of n bytes is BASE_BYTES + n * BYTES_PER_BYTE."""


def limit_resources(size: int) -> None:
    """Limits the memory and processor time of this process, for a file of `size` bytes."""
    budget = BASE_BYTES + size * BYTES_PER_BYTE
    seconds = 60 + (size >> 20)
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (budget, budget))
    try:
        with open("/proc/self/statm") as file:
            present = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (present + budget, present + budget))
    except (OSError, ValueError):  # macOS has neither
        resource.setrlimit(resource.RLIMIT_DATA, (budget, budget))


def read(name: str, fields: list[str]) -> np.ndarray:
    """The variable; with `fields`, these fields of its records as text, (records, fields)."""
    found = scipy.io.loadmat(sys.stdin.buffer, variable_names=[name], squeeze_me=bool(fields))
    if name not in found:
        raise KeyError(f"no variable {name}")
    if not fields:
        return found[name]
    return np.array([[str(record[field]) for field in fields] for record in np.atleast_1d(found[name])])


if __name__ == "__main__":
    limit_resources(os.fstat(0).st_size)
    try:
        np.save(sys.stdout.buffer, read(sys.argv[1], sys.argv[2:]), allow_pickle=False)
    except MemoryError:
        sys.exit(f"unpacks to more memory than {BASE_BYTES:,} bytes + {BYTES_PER_BYTE} times its size")
    except Exception as error:
        sys.exit(" ".join(f"{type(error).__name__}: {error}".split())[:300])
