"""Which augmentation a recipe asks for. transform.py applies it; configs name it without the image libraries."""

from dataclasses import dataclass
from typing import Literal

from pipeline.errors import UserError, nearest


@dataclass(frozen=True, kw_only=True, slots=True)
class Augment:
    """How one image becomes `size` x `size` x 3. The same object serves training and evaluation.

    crop  inception   a box of `area` of the image and `aspect` width/height, resized to `size` (the paper, B.1)
          random      a `size` box anywhere, after `resize`
          center      the central `size` box, after `resize`
          squash      the whole image resized to `size`, aspect ratio lost (the paper's test preprocessing)
    resize      for random and center: the shorter side first becomes this many pixels; with squash=True both sides do.
                None leaves an image as it is, but one smaller than `size` grows until its shorter side fits.
    flip        left-right with probability one half
    randaug_*   RandAugment: so many operations per image, at this magnitude (10 is big_vision's full scale)
    mixup       p of Beta(p, p); the loader blends pairs, 0 is off
    """

    size: int = 224
    """Side of the output, in pixels."""
    crop: Literal["inception", "random", "center", "squash"] = "inception"
    """How a square is cut from the image: inception (a random box, resized), random, center, or squash (the whole
    image, aspect ratio lost)."""
    resize: int | None = None
    """Shorter side, in pixels, before a random or center crop. None: the image's own size."""
    squash: bool = False
    """Let --resize set both sides, so that the aspect ratio is lost."""
    area: tuple[float, float] = (0.05, 1.0)
    """Smallest and largest share of the image's area, 0 to 1, of an inception crop."""
    aspect: tuple[float, float] = (3 / 4, 4 / 3)
    """Smallest and largest width / height of an inception crop."""
    flip: bool = True
    """Mirror half of the images, left to right."""
    randaug_layers: int = 0
    """RandAugment: number of operations per image. 0: off."""
    randaug_magnitude: int = 0
    """RandAugment: strength of the operations, 0 to 30; 10 is big_vision's full scale."""
    mixup: float = 0.0
    """Mixup: parameter p of Beta(p, p), from which the blend of two images is drawn. 0: off."""
    filter: Literal["linear", "area"] = "linear"
    """Resize filter: bilinear without antialiasing (the paper), or area averaging where an image shrinks."""

    def __post_init__(self) -> None:
        crops = ("inception", "random", "center", "squash")
        if self.crop not in crops:
            raise UserError(f"crop {self.crop!r} is not one of {', '.join(crops)}{nearest(self.crop, crops)}")
        if self.filter not in ("linear", "area"):
            raise UserError(f"filter {self.filter!r} is not linear or area")
        if self.size < 1 or (self.resize is not None and self.resize < self.size):
            raise UserError(f"size {self.size} must be at least 1 and resize {self.resize} at least size")
        if self.squash and (self.resize is None or self.crop not in ("random", "center")):
            raise UserError("squash=True goes with resize and crop random or center; crop=squash needs neither")
        if not 0 < self.area[0] <= self.area[1] <= 1 or not 0 < self.aspect[0] <= self.aspect[1]:
            raise UserError(f"area {self.area} must lie in (0, 1] and aspect {self.aspect} above 0, both (low, high)")
        if not 0 <= self.randaug_magnitude <= 30 or self.randaug_layers < 0 or self.mixup < 0:
            raise UserError("randaug_layers and mixup must be at least 0, randaug_magnitude in 0..30")

    @property
    def deterministic(self) -> bool:
        return self.crop in ("center", "squash")

    @property
    def draws(self) -> int:
        """Uniform numbers that `transform.augment_image` needs per image."""
        return 5 + 4 * self.randaug_layers
