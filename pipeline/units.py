"""Quantities as text."""


def bytes_text(count: float) -> str:
    """12.3 MB, in powers of 1,000 and with three digits."""
    for unit, factor in (("PB", 1e15), ("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.3g} {unit}"
    return f"{count:.0f} B"


def flops_text(count: float) -> str:
    """3.16 exaFLOPs, with three digits; at most in exaFLOPs, the unit of papers (2,430 exaFLOPs)."""
    for unit, factor in (("exa", 1e18), ("peta", 1e15), ("tera", 1e12)):
        if count >= factor:
            return f"{float(f'{count / factor:.3g}'):,g} {unit}FLOPs"
    return f"{count / 1e9:.3g} gigaFLOPs"
