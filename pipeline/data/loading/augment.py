"""The configuration of augmentation. transform.py applies it; configs can be
read without loading the image libraries."""

from dataclasses import dataclass
from typing import Literal

from pipeline.errors import UserError, nearest


@dataclass(frozen=True, kw_only=True, slots=True)
class Augment:
    """How one image becomes `size` x `size` x 3, for training and evaluation.

    crop  inception   a random box, resized to `size`; `area` and `aspect` limit it (the paper, B.1)
          random      a box of `size` at a random position, after `resize`
          center      the central box of `size`, after `resize`
          squash      the whole image resized to `size` without its aspect ratio (the paper's test preprocessing)
    resize      for random and center: length of the shorter side in pixels, or of both sides with squash=True. None
    keeps the size of an image, except that an image smaller than `size` is enlarged to fit.
    flip        left-right with probability one half
    randaug_*   RandAugment: number of operations per image, and their magnitude (10 is big_vision's full scale)
    mixup       p of Beta(p, p), which gives the weights of two blended images; 0: off
    """

    size: int = 224
    """Side of the output, in pixels."""
    crop: Literal["inception", "random", "center", "squash"] = "inception"
    """How an image becomes square: inception (a random box, resized), random, center, or squash (the whole image,
    without its aspect ratio)."""
    resize: int | None = None
    """Shorter side, in pixels, before a random or center crop. None: the image's own size."""
    squash: bool = False
    """Apply --resize to both sides, without keeping the aspect ratio."""
    area: tuple[float, float] = (0.05, 1.0)
    """Smallest and largest area of an inception crop, as fractions of the image's area."""
    aspect: tuple[float, float] = (3 / 4, 4 / 3)
    """Smallest and largest width / height of an inception crop."""
    flip: bool = True
    """Flip half of the images from left to right."""
    randaug_layers: int = 0
    """RandAugment: number of operations per image. 0: off."""
    randaug_magnitude: int = 0
    """RandAugment: strength of the operations, 0 to 30; 10 is big_vision's full scale."""
    mixup: float = 0.0
    """Mixup: parameter p of Beta(p, p), the distribution of the weights of two blended images. 0: off."""
    filter: Literal["linear", "area"] = "linear"
    """Resize filter: linear (bilinear without antialiasing, as in the paper), or
    area (averaging when an image shrinks)."""

    def __post_init__(self) -> None:
        crops = ("inception", "random", "center", "squash")
        if self.crop not in crops:
            raise UserError(f"crop {self.crop!r} is not one of {', '.join(crops)}{nearest(self.crop, crops)}")
        if self.filter not in ("linear", "area"):
            raise UserError(f"filter {self.filter!r} is not linear or area")
        if self.size < 1 or (self.resize is not None and self.resize < self.size):
            raise UserError(f"size {self.size} must be at least 1 and resize {self.resize} at least size")
        if self.squash and (self.resize is None or self.crop not in ("random", "center")):
            raise UserError("squash=True needs resize, and crop random or center; crop=squash needs neither")
        if not 0 < self.area[0] <= self.area[1] <= 1 or not 0 < self.aspect[0] <= self.aspect[1]:
            raise UserError(f"area {self.area} must be in (0, 1] and aspect {self.aspect} above 0, both (low, high)")
        if not 0 <= self.randaug_magnitude <= 30 or self.randaug_layers < 0 or self.mixup < 0:
            raise UserError("randaug_layers and mixup must be at least 0, randaug_magnitude in 0..30")

    @property
    def deterministic(self) -> bool:
        return self.crop in ("center", "squash")

    @property
    def draws(self) -> int:
        """The number of uniform random numbers that `transform.augment_image` needs per image."""
        return 5 + 4 * self.randaug_layers
