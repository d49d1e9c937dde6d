"""Convolutional stages: the stem of the hybrids, and the ResNet (BiT) baselines.

Two orders of the same bottleneck, with timm's parameter names:
- hybrid stem: convolution, GroupNorm, ReLU (post-activation), SAME padding (arXiv 2010.11929, section 3.1);
- BiT: GroupNorm, ReLU, convolution (pre-activation), symmetric padding (arXiv 1912.11370).
All convolutions are weight-standardised and have no bias; GroupNorm has 32 groups.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint_sequential

from models.errors import UserError
from models.heads import lecun_normal_, linear_head
from models.pixels import to_images
from models.variants import parse_variant


class StdConv2d(nn.Conv2d):
    """Convolution whose kernel is standardised per output channel, over the population of its weights.

    `eps_on_std`: divide by (std + eps), as Google's hybrids do; otherwise by sqrt(variance + eps), as BiT and timm do.
    """

    def __init__(self, channels: int, out: int, kernel: int, stride: int, padding: int, eps: float, eps_on_std: bool):
        super().__init__(channels, out, kernel, stride, padding, bias=False)
        self.eps, self.eps_on_std = eps, eps_on_std
        lecun_normal_(self.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        w = self.weight.float()
        variance, mean = torch.var_mean(w, dim=(1, 2, 3), keepdim=True, correction=0)
        scale = 1 / (variance.sqrt() + self.eps) if self.eps_on_std else (variance + self.eps).rsqrt()
        return self._conv_forward(x, ((w - mean) * scale).to(x.dtype), None)


class StdConv2dSame(StdConv2d):
    """With TensorFlow's SAME padding: output = ceil(input / stride); an odd row of padding is at the bottom and right."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(pad_same(x, self.kernel_size[0], self.stride[0]))


def pad_same(x: torch.Tensor, kernel: int, stride: int, value: float = 0.0) -> torch.Tensor:
    pads = [max((-(-size // stride) - 1) * stride + kernel - size, 0) for size in (x.shape[-1], x.shape[-2])]
    if not any(pads):
        return x
    return F.pad(x, (pads[0] // 2, pads[0] - pads[0] // 2, pads[1] // 2, pads[1] - pads[1] // 2), value=value)


class MaxPoolSame(nn.Module):
    """3x3 max pooling, stride 2, SAME padding."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.max_pool2d(pad_same(x, 3, 2, value=-float("inf")), 3, 2)


class Flavour:
    """The layer conventions of a family: padding, epsilons, order of activation."""

    def __init__(self, preact: bool, epsilons: str):
        """preact: True for BiT, False for the hybrid stem. epsilons: those of "google"
        (the original code of the family) or "timm"."""
        if epsilons not in ("google", "timm"):
            raise UserError(f'epsilons="{epsilons}" is not one of google, timm')
        self.preact = preact
        # Google's hybrids keep flax's GroupNorm default and add 1e-5 to the deviation; timm uses the same weights with
        # 1e-5 and sqrt(variance + 1e-8). BiT has 1e-5 and sqrt(variance + 1e-10).
        google_hybrid = epsilons == "google" and not preact
        self.norm_eps = 1e-6 if google_hybrid else 1e-5
        self.conv_eps = 1e-8 if epsilons == "timm" else (1e-10 if preact else 1e-5)
        self.eps_on_std = google_hybrid

    def conv(self, channels: int, out: int, kernel: int, stride: int = 1) -> StdConv2d:
        if self.preact:
            return StdConv2d(channels, out, kernel, stride, kernel // 2, self.conv_eps, self.eps_on_std)
        return StdConv2dSame(channels, out, kernel, stride, 0, self.conv_eps, self.eps_on_std)

    def norm(self, channels: int) -> nn.GroupNorm:
        return nn.GroupNorm(32, channels, eps=self.norm_eps)


class Downsample(nn.Module):
    """1x1 projection of the shortcut; normalised only in the post-activation order."""

    def __init__(self, channels: int, out: int, stride: int, flavour: Flavour):
        super().__init__()
        self.conv = flavour.conv(channels, out, 1, stride)
        self.norm = nn.Identity() if flavour.preact else flavour.norm(out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.conv(x))


class Bottleneck(nn.Module):
    """Convolutions 1x1, 3x3 (with the stride) and 1x1 (to four times the channels), with a shortcut."""

    def __init__(self, channels: int, hidden: int, stride: int, flavour: Flavour):
        super().__init__()
        out = 4 * hidden
        self.preact = flavour.preact
        widths = (channels, hidden, hidden) if self.preact else (hidden, hidden, out)  # channels of each norm
        self.norm1, self.norm2, self.norm3 = (flavour.norm(width) for width in widths)
        self.conv1 = flavour.conv(channels, hidden, 1)
        self.conv2 = flavour.conv(hidden, hidden, 3, stride)
        self.conv3 = flavour.conv(hidden, out, 1)
        self.downsample = Downsample(channels, out, stride, flavour) if channels != out or stride != 1 else None
        if not self.preact:
            nn.init.zeros_(self.norm3.weight)  # at initialisation the unit computes its shortcut

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.preact:
            y = F.relu(self.norm1(x))
            shortcut = x if self.downsample is None else self.downsample(y)
            y = self.conv2(F.relu(self.norm2(self.conv1(y))))
            return shortcut + self.conv3(F.relu(self.norm3(y)))
        shortcut = x if self.downsample is None else self.downsample(x)
        y = F.relu(self.norm1(self.conv1(x)))
        y = F.relu(self.norm2(self.conv2(y)))
        return F.relu(shortcut + self.norm3(self.conv3(y)))


class ResNetStage(nn.Module):
    """A sequence of bottleneck units. The first unit changes the channels and,
    except in stage 1, halves the feature map."""

    def __init__(self, channels: int, hidden: int, stride: int, units: int, flavour: Flavour):
        super().__init__()
        self.grad_checkpointing = False
        self.blocks = nn.Sequential(Bottleneck(channels, hidden, stride, flavour))
        for _ in range(units - 1):
            self.blocks.append(Bottleneck(4 * hidden, hidden, 1, flavour))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.grad_checkpointing and self.training:
            return checkpoint_sequential(self.blocks, len(self.blocks), x, use_reentrant=False)
        return self.blocks(x)


class Stages(nn.Module):
    """Root convolution, max pooling and the stages: (B,C,H,W) -> (B,4*hidden,H/s,W/s).

    units: number of bottleneck units per stage; empty for the root only.
    """

    def __init__(self, units: tuple[int, ...], widen: int, channels: int, flavour: Flavour):
        super().__init__()
        root = 64 * widen
        self.stem = nn.Sequential()
        self.stem.add_module("conv", flavour.conv(channels, root, 7, 2))
        if flavour.preact:
            # BiT pads with zeros before pooling, not with minus infinity
            self.stem.add_module("pad", nn.ConstantPad2d(1, 0.0))
            self.stem.add_module("pool", nn.MaxPool2d(3, 2))
        else:
            self.stem.add_module("norm", flavour.norm(root))
            self.stem.add_module("act", nn.ReLU())
            self.stem.add_module("pool", MaxPoolSame())
        self.channels = root
        self.blocks: list[ResNetStage] = []
        for i, count in enumerate(units):
            self.blocks.append(ResNetStage(self.channels, root * 2**i, 2 if i else 1, count, flavour))
            self.channels = 4 * root * 2**i
        self.stages = nn.Sequential(*self.blocks)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.stages(self.stem(x))

    def set_grad_checkpointing(
        self, enabled: bool = True, blocks: int | None = None, keep_products: bool = False
    ) -> None:
        """Recompute each unit of the first `blocks` stages (all by default) in the backward pass instead of keeping its
        activations. keep_products has no effect here, because it is for transformer blocks."""
        for number, stage in enumerate(self.blocks):
            stage.grad_checkpointing = enabled and (blocks is None or number < blocks)

    def compiled_parts(self) -> list[nn.Module]:
        """The modules that torch.compile compiles separately: units, of which all but the first of a stage share one
        compilation. In a compiled unit, GroupNorm keeps the layout of the convolutions (channels last on a GPU); torch's
        kernel would convert to NCHW each time."""
        return [unit for stage in self.blocks for unit in stage.blocks]


class ResNet(Stages):
    """The ResNet (BiT) baselines of the paper: R50x1, R101x1, R152x2, ... Head: GroupNorm, ReLU, mean, linear.

    Takes uint8 (B,H,W,C) or (B,C,H,W), or float (B,C,H,W) in [-1, 1]; any image size. Raises UserError for patches.
    """

    def __init__(
        self,
        variant: str,
        num_classes: int,
        image_size: int = 224,
        *,
        channels: int = 3,
        epsilons: str = "google",
        head_bias: float = 0.0,
    ):
        shape = parse_variant(variant)
        assert shape.stem is not None
        flavour = Flavour(preact=True, epsilons=epsilons)
        super().__init__(shape.stem, shape.widen, channels, flavour)
        self.config: dict[str, Any] = {
            "variant": variant,
            "num_classes": num_classes,
            "image_size": image_size,
            "channels": channels,
            "epsilons": epsilons,
            "head_bias": head_bias,
        }
        self.norm = flavour.norm(self.channels)
        self.head = linear_head(self.channels, num_classes, head_bias)

    def features(self, x: torch.Tensor, positions: torch.Tensor | None = None, every_token: bool = False):
        """Mean of the last feature map, (B,D)."""
        if x.dim() == 3 or positions is not None:
            raise UserError(f"{self.config['variant']} needs images, not patches: use a data set with encoding jpeg")
        x = super().forward(to_images(x, self.config["channels"], self.norm.weight.dtype))
        return F.relu(self.norm(x)).mean(dim=(2, 3))

    def forward(self, x: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
        """Logits (B,K)."""
        return self.head(self.features(x, positions))

    def replace_head(self, num_classes: int) -> None:
        self.head = linear_head(self.channels, num_classes).to(self.norm.weight)
        self.config |= {"num_classes": num_classes, "head_bias": 0.0}

    def set_image_size(self, size: int) -> None:
        self.config["image_size"] = size
