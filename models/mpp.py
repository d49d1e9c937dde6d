"""Masked patch prediction, the paper's self-supervised objective (section 4.6, appendix B.1.2)."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from models.errors import UserError
from models.pixels import normalise, patchify
from models.vit import VisionTransformer

TARGETS = ("mean", "downsized", "full")


class MaskedPrediction(NamedTuple):
    """The model's prediction of the corrupted patches, and the original patches; `models.losses` compares the two.

    prediction: (B,n,512) for "mean", (B,n,16,512) for "downsized", (B,n,P*P*C) for "full".
    target: int64 (B,n) or (B,n,16) colour classes, or float (B,n,P*P*C) pixels in [-1, 1].
    """

    prediction: torch.Tensor
    target: torch.Tensor


class MaskedPatchPredictor(VisionTransformer):
    """A ViT that predicts the original patches after half of its patch embeddings were corrupted. Of the corrupted
    patches, 80% are replaced by a learned [mask] embedding, 10% by the embedding of another patch of the image, and 10%
    are unchanged. mpp: "mean", the 3-bit mean colour (512 classes, the paper's choice); "downsized", a 4x4 version of
    the patch in 3-bit colours; "full", regression of all pixels. Its encoder has the same parameter names as a plain
    ViT, so its checkpoints load into one.

    `forward` returns a MaskedPrediction; which patches are corrupted is drawn from torch's generator in every call.
    """

    def __init__(
        self,
        variant: str,
        num_classes: int = 0,
        image_size: int = 224,
        *,
        mpp: str = "mean",
        corrupt: float = 0.5,
        **options,
    ):
        if mpp not in TARGETS:
            raise UserError(f'mpp="{mpp}" is not one of {", ".join(TARGETS)}')
        if options.get("pre_logits") or options.get("fc_norm"):
            raise UserError("masked patch prediction has no classification head: remove pre_logits and fc_norm")
        super().__init__(variant, 0, image_size, **options)
        if self.shape.stem is not None:
            raise UserError(f"masked patch prediction needs patches of pixels; {variant} is a hybrid")
        if mpp == "downsized" and self.shape.patch < 4:
            raise UserError(f"a patch of {self.shape.patch} pixels cannot be downsized to 4x4 colours")
        self.config |= {"mpp": mpp, "corrupt": corrupt}
        colours = 8 ** self.config["channels"]  # 3 bits per channel
        outputs = {"mean": colours, "downsized": 16 * colours, "full": self.shape.patch**2 * self.config["channels"]}
        self.mask_token = nn.Parameter(torch.empty(1, 1, self.shape.width).normal_(std=0.02))
        self.mpp_head = nn.Linear(self.shape.width, outputs[mpp])
        nn.init.xavier_uniform_(self.mpp_head.weight)
        nn.init.zeros_(self.mpp_head.bias)

    def forward(self, x: torch.Tensor, positions: torch.Tensor | None = None) -> MaskedPrediction:  # type: ignore[override]
        self._check_input(x, positions)
        if x.dim() == 4:
            x = patchify(x, self.shape.patch, self.config["channels"])
            if positions is not None:
                x = x.gather(1, positions[:, :, None].expand(-1, -1, x.shape[2]))
        chosen, corrupted = self.corrupt_patches(self.patch_embed(x, None))
        tokens = self.run_blocks(self.assemble(corrupted, positions))[:, self.prefix :]
        tokens = tokens.gather(1, chosen[:, :, None].expand(-1, -1, tokens.shape[2]))
        prediction = self.mpp_head(tokens)
        if self.config["mpp"] == "downsized":
            prediction = prediction.unflatten(2, (16, -1))
        patches = x.gather(1, chosen[:, :, None].expand(-1, -1, x.shape[2]))
        return MaskedPrediction(prediction, self.targets(patches))

    def corrupt_patches(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Patch embeddings (B,N,D) -> indices (B,n) of the corrupted patches, and the corrupted embeddings."""
        batch, length, _ = x.shape
        count = max(1, round(self.config["corrupt"] * length))
        chosen = torch.rand(batch, length, device=x.device).argsort(dim=1)[:, :count]
        # the chosen patches are in random order, so a fixed fraction of them is a random selection
        masked, replaced = round(0.8 * count), round(0.1 * count)
        other = (chosen + torch.randint(1, max(2, length), chosen.shape, device=x.device)) % length
        index = chosen[:, :, None].expand(-1, -1, x.shape[2])
        original = x.gather(1, index)
        new = torch.cat(
            [
                self.mask_token.to(x.dtype).expand(batch, masked, -1),
                x.gather(1, other[:, :, None].expand_as(index))[:, masked : masked + replaced],
                original[:, masked + replaced :],
            ],
            dim=1,
        )
        return chosen, x.scatter(1, index, new)

    def targets(self, patches: torch.Tensor) -> torch.Tensor:
        """The targets of patches (B,n,P*P*C): pixels or colour classes (see `MaskedPrediction`)."""
        pixels = normalise(patches, torch.float32)
        if self.config["mpp"] == "full":
            return pixels
        patch, channels = self.shape.patch, self.config["channels"]
        plane = pixels.reshape(-1, patch, patch, channels).permute(0, 3, 1, 2)
        plane = F.adaptive_avg_pool2d(plane, 1 if self.config["mpp"] == "mean" else 4)
        level = ((plane + 1) * 4).long().clamp(0, 7).flatten(2)  # 8 equal bins of [-1, 1] in every channel
        digits = 8 ** torch.arange(channels, device=level.device)
        classes = (level * digits[None, :, None]).sum(dim=1)
        return classes.reshape(*patches.shape[:2], *(() if self.config["mpp"] == "mean" else (16,)))
