"""The checksum of a row group."""

import xxhash


def checksum(data: bytes | memoryview) -> int:
    """The low 32 bits of XXH3-64 of `data`: several times faster than copying the
    bytes, so that readers can verify all data."""
    return xxhash.xxh3_64_intdigest(data) & 0xFFFFFFFF
