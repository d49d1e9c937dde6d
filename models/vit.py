"""The Vision Transformer of arXiv 2010.11929, equations 1 to 4, and its hybrids.

Shape suffixes: B batch, C channels, H W pixels, P patch side, N patches, T tokens (class and register tokens, then N
patches row by row), D width, K classes. Parameter names are timm's, so that weights move between the two.
"""

import inspect
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from models import posemb
from models.errors import UserError
from models.heads import AttentionPool, Mlp, PreLogits, lecun_normal_, linear_head
from models.pixels import channels_last, normalise, patchify, to_images
from models.resnet import Flavour, Stages
from models.variants import Variant, override_sizes, parse_variant

# ---------------------------------------------------------------- patches to tokens


class PatchProjection(nn.Conv2d):
    """E of eq. 1: stored as a convolution, as in timm and Google's code, and applied as a matrix. (B,N,P*P*C) ->
    (B,N,D). One matrix product over patches gives the same result as the strided convolution.
    """

    def __init__(self, channels: int, width: int, patch: int):
        super().__init__(channels, width, patch, patch)
        lecun_normal_(self.weight)
        assert self.bias is not None
        nn.init.zeros_(self.bias)

    def forward(self, patches_BNP: torch.Tensor) -> torch.Tensor:
        return F.linear(patches_BNP, self.weight.permute(0, 2, 3, 1).flatten(1), self.bias)


class PatchEmbed(nn.Module):
    """Images or patches -> (B,N,D)."""

    def __init__(self, channels: int, width: int, patch: int):
        super().__init__()
        self.channels, self.patch = channels, patch
        self.proj = PatchProjection(channels, width, patch)

    def grid(self, image_size: int) -> int:
        return image_size // self.patch

    def forward(self, x: torch.Tensor, positions: torch.Tensor | None) -> torch.Tensor:
        if x.dim() == 4:
            x = patchify(x, self.patch, self.channels)  # as uint8, because this moves a quarter of the bytes
            if positions is not None:
                x = x.gather(1, positions[:, :, None].expand(-1, -1, x.shape[2]))
        return self.proj(normalise(x, self.proj.weight.dtype))


class HybridEmbed(nn.Module):
    """Images -> ResNet feature map -> (B,N,D). The map is cut into 1x1 patches (8x8 for the root-only stem)."""

    def __init__(self, shape: Variant, channels: int, epsilons: str):
        super().__init__()
        assert shape.stem is not None
        self.channels, self.patch = channels, shape.patch
        self.backbone = Stages(shape.stem, shape.widen, channels, Flavour(preact=False, epsilons=epsilons))
        self.proj = PatchProjection(self.backbone.channels, shape.width, shape.patch)

    def grid(self, image_size: int) -> int:
        halvings = 1 + max(1, len(self.backbone.stages))  # the root, pooling, and every stage after the first
        for _ in range(halvings):
            image_size = -(-image_size // 2)
        return image_size // self.patch

    def forward(self, x: torch.Tensor, positions: torch.Tensor | None) -> torch.Tensor:
        if x.dim() == 3 or positions is not None:
            raise UserError("a hybrid needs images, not patches: use a data set with encoding jpeg")
        feature_map = self.backbone(to_images(x, self.channels, self.proj.weight.dtype))
        return self.proj(patchify(feature_map, self.patch, self.backbone.channels))


# ---------------------------------------------------------------- the encoder

# Operations whose results selective recomputation keeps, because recomputing them costs more than storing them.
_ATEN = torch.ops.aten
PRODUCTS: list = [
    _ATEN.mm.default,
    _ATEN.addmm.default,
    _ATEN.bmm.default,
    _ATEN._scaled_dot_product_flash_attention.default,
    _ATEN._scaled_dot_product_flash_attention_for_cpu.default,
    _ATEN._scaled_dot_product_efficient_attention.default,
    _ATEN._scaled_dot_product_cudnn_attention.default,
]


class Attention(nn.Module):
    """Multi-head self-attention, eq. 6 to 8 of the paper's appendix A, with q, k and v fused into one matrix product."""

    def __init__(self, width: int, heads: int, dropout: float, qk_norm: bool, ln_eps: float):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = nn.LayerNorm(width // heads, eps=ln_eps) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(width // heads, eps=ln_eps) if qk_norm else nn.Identity()
        self.proj = nn.Linear(width, width)
        # Xavier for each of q, k, v alone (fan in = fan out = width). For the fused (3*width, width) matrix, the usual
        # initialiser would use fan out = 3*width and scale all three by 0.71.
        bound = (3 / width) ** 0.5
        for layer in (self.qkv, self.proj):
            nn.init.uniform_(layer.weight, -bound, bound)
            nn.init.zeros_(layer.bias)

    def split(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q, k, v, each (B,heads,T,D/heads)."""
        batch, length, _ = x.shape
        q, k, v = self.qkv(x).reshape(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        return self.q_norm(q), self.k_norm(k), v

    def forward(self, x: torch.Tensor, queries: int | None = None) -> torch.Tensor:
        """(B,T,D) -> (B,T,D), or (B,queries,D): the first tokens only, which attend to all."""
        q, k, v = self.split(x)
        dropout = self.dropout if self.training else 0.0
        x = F.scaled_dot_product_attention(q[:, :, :queries], k, v, dropout_p=dropout)
        return self.proj(x.transpose(1, 2).flatten(2))

    def probabilities(self, x: torch.Tensor) -> torch.Tensor:
        """Attention weights (B,heads,T,T), for inspection."""
        q, k, _ = self.split(x)
        return (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1)


class Block(nn.Module):
    """Pre-norm encoder block, eqs. 2 and 3."""

    keep: torch.Tensor
    keep_products: bool

    def __init__(self, shape: Variant, dropout: float, attention_dropout: float, drop_path: float, **options):
        super().__init__()
        ln_eps = options["ln_eps"]
        self.norm1 = nn.LayerNorm(shape.width, eps=ln_eps)
        self.attn = Attention(shape.width, shape.heads, attention_dropout, options["qk_norm"], ln_eps)
        self.norm2 = nn.LayerNorm(shape.width, eps=ln_eps)
        self.mlp = Mlp(shape.width, shape.mlp, options["gelu"], dropout)
        self.dropout = nn.Dropout(dropout)
        self.drop_path = drop_path
        self.keep_products = False
        # The rate differs between blocks. As a tensor it is an input, so all blocks share one compilation; as a number,
        # torch would compile each block separately and give up after eight.
        self.register_buffer("keep", torch.tensor(1.0 - drop_path), persistent=False)

    def forward(self, x: torch.Tensor, queries: int | None = None) -> torch.Tensor:
        """(B,T,D) -> (B,T,D), or only its first `queries` tokens."""
        if self.keep_products and self.training:  # inside the block, so that it is part of the compiled graph
            keep = partial(create_selective_checkpoint_contexts, PRODUCTS)
            return checkpoint(self.compute, x, queries, use_reentrant=False, context_fn=keep)
        return self.compute(x, queries)

    def compute(self, x: torch.Tensor, queries: int | None = None) -> torch.Tensor:
        x = x[:, :queries] + self.stochastic_depth(self.dropout(self.attn(self.norm1(x), queries)))
        return x + self.stochastic_depth(self.mlp(self.norm2(x)))

    def stochastic_depth(self, branch: torch.Tensor) -> torch.Tensor:
        """Drops the branch for some samples of a training batch and scales up the others (arXiv 1603.09382)."""
        if not self.training or self.drop_path == 0.0:
            return branch
        kept = torch.rand(branch.shape[0], 1, 1, device=branch.device) < self.keep
        return branch * (kept / self.keep).to(branch.dtype)


class VisionTransformer(nn.Module):
    """ViT and hybrid. `forward` gives logits, `features` the representation below the head, `encode` all tokens.

    The parameters are the options of `create_model`; flags, recipes and config.json use the same names.

    pool: "token" (class token), "gap" (mean of the patch tokens) or "map" (attention pooling); the last two have no
        class token.
    posemb: "learn" (1-D, of the paper), "sincos2d" (fixed) or "none".
    pre_logits: the tanh layer that the paper's head has in pre-training.
    registers: extra learned tokens without position (arXiv 2309.16588). qk_norm: LayerNorm on queries and keys
        (arXiv 2302.05442). fc_norm: the final LayerNorm after the mean and not before, timm's default for "gap".
    dropout: after every dense layer but q, k, v, and after adding positions. drop_path: stochastic depth, rising
        linearly to this rate in the last block.
    gelu: "tanh", which `jax.nn.gelu` and so all of Google's weights compute, or "exact", which timm and Hugging Face
        compute with the same weights; they differ by at most 4.7e-4 per activation. ln_eps: 1e-6, flax's; Hugging Face 1e-12.
    epsilons: of a hybrid's stem, "google" or "timm" (see models.resnet).
    head_bias: initial bias of the head; -10 for sigmoid losses over thousands of classes.
    width, depth, heads, mlp: override the named variant, for ablations.
    Raises UserError for options that contradict each other.
    """

    def __init__(
        self,
        variant: str,
        num_classes: int,
        image_size: int = 224,
        *,
        channels: int = 3,
        pool: str = "token",
        posemb: str = "learn",
        pre_logits: bool = False,
        registers: int = 0,
        qk_norm: bool = False,
        fc_norm: bool = False,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        drop_path: float = 0.0,
        gelu: str = "tanh",
        ln_eps: float = 1e-6,
        epsilons: str = "google",
        head_bias: float = 0.0,
        width: int | None = None,
        depth: int | None = None,
        heads: int | None = None,
        mlp: int | None = None,
    ):
        super().__init__()
        self.config = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        shape = self.shape = override_sizes(parse_variant(variant), width, depth, heads, mlp)
        _check_options(self.config, shape)
        self.checkpointed_blocks = 0
        self.patch_embed: PatchEmbed | HybridEmbed
        if shape.stem is None:
            self.patch_embed = PatchEmbed(channels, shape.width, shape.patch)
        else:
            self.patch_embed = HybridEmbed(shape, channels, epsilons)
        self.grid = _grid(self.patch_embed, variant, image_size)
        self._add_tokens_and_positions()
        self.pos_drop = nn.Dropout(dropout)
        rates = [drop_path * i / max(1, shape.depth - 1) for i in range(shape.depth)]
        self.blocks = nn.ModuleList(
            Block(shape, dropout, attention_dropout, rate, qk_norm=qk_norm, ln_eps=ln_eps, gelu=gelu) for rate in rates
        )
        self.norm = nn.Identity() if fc_norm else nn.LayerNorm(shape.width, eps=ln_eps)
        self.attn_pool = AttentionPool(shape.width, shape.heads, shape.mlp, gelu, ln_eps) if pool == "map" else None
        self.fc_norm = nn.LayerNorm(shape.width, eps=ln_eps) if fc_norm else nn.Identity()
        self.pre_logits = PreLogits(shape.width) if pre_logits else nn.Identity()
        self.head = linear_head(shape.width, num_classes, head_bias)

    def _add_tokens_and_positions(self) -> None:
        """Adds class token, registers and position embeddings according to `config`."""
        width, registers = self.shape.width, self.config["registers"]
        has_cls = self.config["pool"] == "token"
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width)) if has_cls else None
        self.reg_token = nn.Parameter(torch.empty(1, registers, width).normal_(std=0.02)) if registers else None
        self.pos_embed: torch.Tensor | None
        if self.config["posemb"] == "learn":
            rows = self.grid**2 + has_cls  # the class token has a position embedding, registers have none
            self.pos_embed = nn.Parameter(torch.empty(1, rows, width).normal_(std=0.02))
        elif self.config["posemb"] == "sincos2d":
            self.fix_positions()
        else:
            self.pos_embed = None

    @property
    def prefix(self) -> int:
        """Number of tokens before the patches: class token and registers."""
        return (self.cls_token is not None) + self.config["registers"]

    def embed(self, x: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
        """z_0 of eq. 1: (B,T,D), patches embedded, tokens prepended, positions added."""
        self._check_input(x, positions)
        return self.assemble(self.patch_embed(x, positions), positions)

    def assemble(self, x: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
        """Patch embeddings (B,N,D) -> (B,T,D) with tokens and positions."""
        batch, cls = x.shape[0], self.cls_token is not None
        tokens = []
        pos_embed = self.pos_embed
        if pos_embed is not None:
            # a fixed table is a buffer, and DeepSpeed changes the precision of parameters only
            pos_embed = pos_embed.to(self.patch_embed.proj.weight.dtype)
            table = pos_embed[:, int(cls) :]
            if positions is not None:
                table = table.expand(batch, -1, -1).gather(1, positions[:, :, None].expand(-1, -1, table.shape[2]))
            x = x + table
        if self.cls_token is not None:
            token = self.cls_token if pos_embed is None else self.cls_token + pos_embed[:, :1]
            tokens.append(token.expand(batch, -1, -1))
        if self.reg_token is not None:
            tokens.append(self.reg_token.expand(batch, -1, -1))
        return self.pos_drop(torch.cat([*tokens, x], dim=1) if tokens else x)

    def encode(
        self, x: torch.Tensor, positions: torch.Tensor | None = None, queries: int | None = None
    ) -> torch.Tensor:
        """Final tokens (B,T,D) after the last LayerNorm, or the first `queries` of them."""
        return self.run_blocks(self.embed(x, positions), queries)

    def run_blocks(self, x: torch.Tensor, queries: int | None = None) -> torch.Tensor:
        last = len(self.blocks) - 1
        for i, block in enumerate(self.blocks):
            wanted = queries if i == last else None
            if i < self.checkpointed_blocks and self.training and not block.keep_products:
                x = checkpoint(block, x, wanted, use_reentrant=False)
            else:
                x = block(x, wanted)
        return self.norm(x)

    def features(
        self, x: torch.Tensor, positions: torch.Tensor | None = None, every_token: bool = False
    ) -> torch.Tensor:
        """The representation below the head, (B,D); after the tanh layer if there is one.

        With a class token, the last block computes only this token, because the others are not used: the same result
        for 6% less work in B/16. `every_token` computes all tokens.
        """
        alone = self.cls_token is not None and not every_token
        tokens = self.encode(x, positions, queries=1 if alone else None)
        if self.attn_pool is not None:
            pooled = self.attn_pool(tokens[:, self.prefix :])
        elif self.cls_token is not None:
            pooled = tokens[:, 0]
        else:
            pooled = tokens[:, self.prefix :].mean(dim=1)
        return self.pre_logits(self.fc_norm(pooled))

    def forward(self, x: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
        """Logits (B,K).

        x: uint8 images (B,H,W,C) or (B,C,H,W), float images (B,C,H,W) in [-1, 1], or patches (B,N,P*P*C), uint8 or
        float. positions: (B,n) int64, the row-major index of each patch, if some were dropped.
        """
        return self.head(self.features(x, positions))

    def replace_head(self, num_classes: int) -> None:
        """Replaces the tanh layer and the head by a zero-initialised linear head (section 3.2)."""
        reference = next(self.blocks.parameters())
        self.pre_logits = nn.Identity()
        self.head = linear_head(self.shape.width, num_classes).to(reference)
        self.config |= {"num_classes": num_classes, "pre_logits": False, "head_bias": 0.0}

    def set_image_size(self, size: int) -> None:
        """Changes the resolution at the same patch size: more or fewer tokens, positions interpolated (section 3.2)."""
        grid = _grid(self.patch_embed, self.config["variant"], size)
        self.config["image_size"] = size
        if grid == self.grid:
            return
        self.grid = grid
        if self.config["posemb"] == "sincos2d":
            self.fix_positions()
        elif self.pos_embed is not None:
            with torch.no_grad():
                resized = posemb.resize(self.pos_embed, grid, prefix=int(self.cls_token is not None))
            self.pos_embed = nn.Parameter(resized, requires_grad=self.pos_embed.requires_grad)

    def set_grad_checkpointing(
        self, enabled: bool = True, blocks: int | None = None, keep_products: bool = False
    ) -> None:
        """Recompute each of the first `blocks` blocks (all by default) in the backward pass instead of keeping its activations.

        keep_products: keep the results of matrix products and attention, and recompute the rest: norms, GELU, dropout.
        The stem of a hybrid is recomputed, too, unless `blocks` is given.
        """
        self.checkpointed_blocks = (len(self.blocks) if blocks is None else blocks) if enabled else 0
        for number, block in enumerate(self.blocks):
            setattr(block, "keep_products", keep_products and number < self.checkpointed_blocks)  # noqa: B010
        if isinstance(self.patch_embed, HybridEmbed):
            self.patch_embed.backbone.set_grad_checkpointing(enabled and blocks is None)

    def compiled_parts(self) -> list[nn.Module]:
        """The modules that torch.compile compiles separately: blocks, which share one
        compilation, and the units of a hybrid's stem."""
        stem = self.patch_embed.backbone.compiled_parts() if isinstance(self.patch_embed, HybridEmbed) else []
        return [*stem, *self.blocks]

    def fix_positions(self) -> None:
        # a buffer outside the state dict, because the configuration determines it
        table = posemb.sincos2d(self.grid, self.shape.width)
        if self.cls_token is not None:
            table = F.pad(table, (0, 0, 1, 0))
        reference = self.patch_embed.proj.weight
        self.register_buffer("pos_embed", table.to(reference.device, reference.dtype), persistent=False)

    def _check_input(self, x: torch.Tensor, positions: torch.Tensor | None) -> None:
        if x.dim() == 4:
            size = self.config["image_size"]
            sides = x.shape[1:3] if channels_last(x, self.config["channels"]) else x.shape[2:4]
            if sides[0] != size or sides[1] != size:
                raise ValueError(
                    f"images of {sides[0]}x{sides[1]} pixels in a model for {size}x{size}; call set_image_size"
                )
        elif x.dim() == 3:
            values = self.shape.patch**2 * self.config["channels"]
            if self.shape.stem is None and x.shape[2] != values:
                raise ValueError(f"patches of {x.shape[2]} values in {self.config['variant']}; expected {values}")
            if positions is None and x.shape[1] != self.grid**2:
                raise ValueError(
                    f"{x.shape[1]} patches in a model for {self.grid**2}; give their positions if some were dropped"
                )
        else:
            raise ValueError(f"input of shape {tuple(x.shape)}; expected images (4 axes) or patches (B,N,P*P*C)")


def _grid(embed: PatchEmbed | HybridEmbed, variant: str, image_size: int) -> int:
    """Patches per side. Raises UserError for images smaller than a patch."""
    grid = embed.grid(image_size)
    if grid < 1:
        raise UserError(
            f"an image of {image_size} pixels is smaller than one patch of {variant}; enlarge it or use a smaller patch"
        )
    return grid


def _check_options(config: dict, shape: Variant) -> None:
    choices = {"pool": ("token", "gap", "map"), "posemb": ("learn", "sincos2d", "none"), "gelu": ("tanh", "exact")}
    for name, valid in choices.items():
        if config[name] not in valid:
            raise UserError(f'{name}="{config[name]}" is not one of {", ".join(valid)}')
    if shape.width % shape.heads:
        raise UserError(f"{shape.name}: width {shape.width} is not divisible by {shape.heads} heads")
    if config["fc_norm"] and config["pool"] != "gap":
        raise UserError('fc_norm places the LayerNorm after the mean; it needs pool="gap"')
    if config["posemb"] == "sincos2d" and shape.width % 4:
        raise UserError(f"{shape.name}: 2-D sine-cosine positions need a width divisible by 4, not {shape.width}")


def option_names(kind: type) -> list[str]:
    """Keyword options of a model class and of the classes it passes options to,
    without variant, num_classes and image_size."""
    makers = [base.__init__ for base in kind.__mro__ if issubclass(base, nn.Module) and base is not nn.Module]
    parameters = [p for maker in makers for p in inspect.signature(maker).parameters.values()]
    return list(dict.fromkeys(p.name for p in parameters if p.kind is p.KEYWORD_ONLY))
