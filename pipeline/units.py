"""Quantities as text."""


def bytes_text(count: float) -> str:
    """12.3 MB, in powers of 1,000 and with three digits."""
    for unit, factor in (("PB", 1e15), ("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.3g} {unit}"
    return f"{count:.0f} B"
