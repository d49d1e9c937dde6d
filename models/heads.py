"""Layers after the encoder (attention pooling, the tanh layer of pre-training,
the linear head), and the MLP of encoder and pooling."""

import torch
import torch.nn.functional as F
from torch import nn


def lecun_normal_(weight: torch.Tensor) -> torch.Tensor:
    """Truncated normal of variance 1/fan_in, cut at two standard deviations: the default kernel initialiser of flax."""
    # a unit normal truncated at +-2 has a standard deviation of 0.8796
    std = weight[0].numel() ** -0.5 / 0.87962566103423978
    return nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)


class Mlp(nn.Module):
    """Dense -> GELU -> dropout -> Dense -> dropout (arXiv 2010.11929, section 3.1 and appendix B.1)."""

    def __init__(self, width: int, hidden: int, gelu: str, dropout: float = 0.0):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.act = nn.GELU(approximate="tanh" if gelu == "tanh" else "none")
        self.fc2 = nn.Linear(hidden, width)
        self.dropout = nn.Dropout(dropout)
        for layer in (self.fc1, self.fc2):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.normal_(layer.bias, std=1e-6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.fc2(self.dropout(self.act(self.fc1(x)))))


class AttentionPool(nn.Module):
    """Multi-head attention pooling (MAP): one learned query attends to all tokens, then a residual MLP.

    The head of arXiv 2106.04560 (g/14, G/14), with timm's parameter names. (B,T,D) -> (B,D).
    """

    def __init__(self, width: int, heads: int, mlp: int, gelu: str, ln_eps: float):
        super().__init__()
        self.heads = heads
        self.latent = nn.Parameter(torch.empty(1, 1, width))
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=ln_eps)
        self.mlp = Mlp(width, mlp, gelu)
        bound = (3 / width) ** 0.5  # Xavier for each width x width matrix, also for the two fused in kv
        for layer in (self.q, self.kv, self.proj):
            nn.init.uniform_(layer.weight, -bound, bound)
            nn.init.zeros_(layer.bias)
        bound = (6 / (1 + width)) ** 0.5  # Xavier with flax's fans, from the last two axes
        nn.init.uniform_(self.latent, -bound, bound)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        batch, length, width = tokens.shape
        q = self.q(self.latent.expand(batch, -1, -1)).reshape(batch, 1, self.heads, -1).transpose(1, 2)
        k, v = self.kv(tokens).reshape(batch, length, 2, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        x = self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, 1, width))
        return (x + self.mlp(self.norm(x)))[:, 0]


class PreLogits(nn.Module):
    """The hidden layer of the pre-training head: Dense, then tanh (section 3.1)."""

    def __init__(self, width: int):
        super().__init__()
        self.fc = nn.Linear(width, width)
        lecun_normal_(self.fc.weight)
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.fc(x))


def linear_head(width: int, num_classes: int, bias: float = 0.0) -> nn.Module:
    """A zero-initialised linear classifier, or Identity for 0 classes."""
    if num_classes == 0:
        return nn.Identity()
    head = nn.Linear(width, num_classes)
    nn.init.zeros_(head.weight)
    nn.init.constant_(head.bias, bias)
    return head
