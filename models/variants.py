"""The table of all models, with size and cost.

A name is `width/patch` ("B/16"; any width can have any patch size), `stem+width/stride` for a hybrid ("R50+B/16": the
number is the total downsampling, the transformer sees 1x1 patches of the feature map), or `RdepthxWidth` for a ResNet
("R50x1"). Parameters and GFLOPs (2 x multiply-accumulates, one image forward) at 224 pixels, class token, no head:

    name        params (M)   GFLOPs |  name        params (M)   GFLOPs
    Ti/16             5.52      2.5 |  R+Ti/16           6.14      0.9
    S/32             22.49      2.3 |  R26+S/32         36.05      6.9
    S/16             21.67      9.2 |  R26+B/32        100.61     13.4
    B/32             87.46      8.8 |  R50+B/16         97.89     43.1
    B/16             85.80     35.1 |  R50+B/32        110.18     16.9
    L/32            305.51     30.8 |  R50+L/16        315.46    131.1
    L/16            303.30    123.1 |  R50+L/32        327.97     38.8
    H/14            630.76    334.6 |  R50x1            23.50      8.2
    g/14           1011.20    534.1 |  R101x1           42.49     15.6
    G/14           1842.78    967.5 |  R152x2          232.24     91.6

Sources: arXiv 2010.11929 Tables 1 and 6; scaling (g, G): arXiv 2106.04560; BiT: arXiv 1912.11370.
"""

import re
from dataclasses import dataclass, replace

from models.errors import UserError, nearest

# name: (width, depth, heads, mlp)
TRANSFORMERS = {
    "mu": (32, 1, 2, 128),
    "Ti": (192, 12, 3, 768),
    "S": (384, 12, 6, 1536),
    "M": (512, 12, 8, 2048),
    "B": (768, 12, 12, 3072),
    "L": (1024, 24, 16, 4096),
    "So400m": (1152, 27, 16, 4304),
    "H": (1280, 32, 16, 5120),
    "g": (1408, 40, 16, 6144),
    "g-opt": (1536, 40, 16, 6144),
    "G": (1664, 48, 16, 8192),
    "G-opt": (1536, 48, 16, 8192),
    "e": (1792, 56, 16, 15360),
}

# (stem, stride): bottleneck units per stage, patch size on the feature map. At stride 16 the paper drops stage 4 and
# moves its units into stage 3 (section 4.1). "R" is the root convolution alone; with its 8x8 patches the true stride is
# 32, and the /16 of its published name is historical.
STEMS = {
    ("R", 16): ((), 8),
    ("R26", 32): ((2, 2, 2, 2), 1),
    ("R50", 16): ((3, 4, 9), 1),
    ("R50", 32): ((3, 4, 6, 3), 1),
}

RESNETS = {"R50": (3, 4, 6, 3), "R101": (3, 4, 23, 3), "R152": (3, 8, 36, 3), "R200": (3, 24, 36, 3)}

# The published names, from which a suggestion for a misspelt name is chosen.
VARIANTS = (
    *("Ti/16", "S/32", "S/16", "B/32", "B/16", "L/32", "L/16", "H/14", "g/14", "G/14"),
    *("R+Ti/16", "R26+S/32", "R26+B/32", "R50+B/16", "R50+B/32", "R50+L/16", "R50+L/32"),
    *("R50x1", "R50x2", "R101x1", "R152x1", "R152x2", "R200x3"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """Sizes of a named model. A `depth` of 0 means a ResNet; `stem` is None without convolutional stages."""

    name: str
    width: int
    depth: int = 0
    heads: int = 0
    mlp: int = 0
    patch: int = 1  # patch side, in pixels or (hybrid) in cells of the feature map
    stem: tuple[int, ...] | None = None  # bottleneck units per stage
    widen: int = 1  # width factor of the convolutional stages


def parse_variant(name: str) -> Variant:
    """The sizes of a named model. Raises UserError with the most similar name for an unknown name."""
    if match := re.fullmatch(r"(R\d*)\+([\w-]+)/(\d+)", name):
        stem, transformer, stride = match[1], match[2], int(match[3])
        if (stem, stride) in STEMS and transformer in TRANSFORMERS:
            layers, patch = STEMS[stem, stride]
            return _transformer(name, transformer, patch, layers)
    elif match := re.fullmatch(r"(R\d+)x(\d+)", name):
        if match[1] in RESNETS and int(match[2]):
            widen = int(match[2])
            return Variant(name=name, width=2048 * widen, stem=RESNETS[match[1]], widen=widen)
    elif (match := re.fullmatch(r"([\w-]+)/(\d+)", name)) and match[1] in TRANSFORMERS and int(match[2]):
        return _transformer(name, match[1], int(match[2]), None)
    raise UserError(
        f'unknown model "{name}"{nearest(name, VARIANTS)}; a name is width/patch with a width of '
        f"{', '.join(TRANSFORMERS)}, or one of {', '.join(v for v in VARIANTS if 'R' in v)}"
    )


def override_sizes(
    shape: Variant, width: int | None = None, depth: int | None = None, heads: int | None = None, mlp: int | None = None
) -> Variant:
    """A variant with other sizes, for ablations. If only the width is given, the MLP is four times as wide."""
    return replace(
        shape,
        width=width or shape.width,
        depth=depth or shape.depth,
        heads=heads or shape.heads,
        mlp=mlp or (shape.mlp if width is None else 4 * width),
    )


def _transformer(name: str, transformer: str, patch: int, stem: tuple[int, ...] | None) -> Variant:
    width, depth, heads, mlp = TRANSFORMERS[transformer]
    return Variant(name=name, width=width, depth=depth, heads=heads, mlp=mlp, patch=patch, stem=stem)
