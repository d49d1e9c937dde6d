"""A reference Vision Transformer in float64 NumPy, written from the equations of the paper.

Shares no code with `models`: it cuts images into patches itself, computes attention per query and head, and takes only
a state dict and the options. For small models."""

import math

import numpy as np


def forward(state: dict, image_HWC: np.ndarray, *, patch: int, depth: int, heads: int, **options) -> np.ndarray:
    """Logits (K,) of one uint8 image. options: the options of VisionTransformer that affect the result."""
    weights = {name: np.asarray(value, dtype=np.float64) for name, value in state.items()}
    eps, tanh_gelu = options.get("ln_eps", 1e-6), options.get("gelu", "tanh") == "tanh"
    pixels = image_HWC.astype(np.float64) / 127.5 - 1.0
    rows, columns = pixels.shape[0] // patch, pixels.shape[1] // patch
    kernel = weights["patch_embed.proj.weight"]  # (D, C, P, P)
    embedded = []
    for r in range(rows):
        for c in range(columns):
            window = pixels[r * patch : (r + 1) * patch, c * patch : (c + 1) * patch]
            embedded.append(np.einsum("dcij,ijc->d", kernel, window) + weights["patch_embed.proj.bias"])
    tokens = np.stack(embedded)
    table = positions(options.get("posemb", "learn"), weights, rows, tokens.shape[1])
    registers = list(weights["reg_token"][0]) if "reg_token" in weights else []
    if "cls_token" in weights:
        cls_position = table[0] if len(table) == len(tokens) + 1 else 0.0
        tokens = np.stack([weights["cls_token"][0, 0] + cls_position, *registers, *(tokens + table[-len(tokens) :])])
    else:
        tokens = np.stack([*registers, *(tokens + table)])
    for i in range(depth):
        block = {name.removeprefix(f"blocks.{i}."): w for name, w in weights.items() if name.startswith(f"blocks.{i}.")}
        tokens = tokens + attention(layer_norm(tokens, block, "norm1", eps), block, heads, eps)
        tokens = tokens + mlp(layer_norm(tokens, block, "norm2", eps), block, "mlp", tanh_gelu)
    if "norm.weight" in weights:
        tokens = layer_norm(tokens, weights, "norm", eps)
    patches = tokens[len(tokens) - rows * columns :]
    pool = options.get("pool", "token")
    if pool == "token":
        pooled = tokens[0]
    elif pool == "gap":
        pooled = patches.mean(axis=0)
    else:
        pooled = attention_pool(patches, weights, heads, eps, tanh_gelu)
    if "fc_norm.weight" in weights:
        pooled = layer_norm(pooled[None], weights, "fc_norm", eps)[0]
    if "pre_logits.fc.weight" in weights:
        pooled = np.tanh(dense(pooled, weights, "pre_logits.fc"))
    return dense(pooled, weights, "head")


def dense(x: np.ndarray, weights: dict, name: str) -> np.ndarray:
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def layer_norm(x: np.ndarray, weights: dict, name: str, eps: float) -> np.ndarray:
    centred = x - x.mean(axis=-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + eps)
    return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max())
    return e / e.sum()


def attention(x: np.ndarray, block: dict, heads: int, eps: float) -> np.ndarray:
    width = x.shape[1]
    size = width // heads
    out = np.zeros_like(x)
    for h in range(heads):
        q, k, v = (
            x @ block["attn.qkv.weight"][part * width + h * size : part * width + (h + 1) * size].T
            + block["attn.qkv.bias"][part * width + h * size : part * width + (h + 1) * size]
            for part in range(3)
        )
        if "attn.q_norm.weight" in block:
            q, k = layer_norm(q, block, "attn.q_norm", eps), layer_norm(k, block, "attn.k_norm", eps)
        for t in range(len(x)):
            out[t, h * size : (h + 1) * size] = softmax(k @ q[t] / math.sqrt(size)) @ v
    return dense(out, block, "attn.proj")


def gelu(x: np.ndarray, tanh: bool) -> np.ndarray:
    if tanh:
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def mlp(x: np.ndarray, weights: dict, name: str, tanh_gelu: bool) -> np.ndarray:
    return dense(gelu(dense(x, weights, f"{name}.fc1"), tanh_gelu), weights, f"{name}.fc2")


def attention_pool(patches: np.ndarray, weights: dict, heads: int, eps: float, tanh_gelu: bool) -> np.ndarray:
    width = patches.shape[1]
    size = width // heads
    query = dense(weights["attn_pool.latent"][0, 0], weights, "attn_pool.q")
    both = dense(patches, weights, "attn_pool.kv")
    k, v = both[:, :width], both[:, width:]
    seen = np.concatenate(
        [
            softmax(k[:, h * size : (h + 1) * size] @ query[h * size : (h + 1) * size] / math.sqrt(size))
            @ v[:, h * size : (h + 1) * size]
            for h in range(heads)
        ]
    )
    x = dense(seen, weights, "attn_pool.proj")
    return x + mlp(layer_norm(x[None], weights, "attn_pool.norm", eps), weights, "attn_pool.mlp", tanh_gelu)[0]


def positions(kind: str, weights: dict, grid: int, width: int) -> np.ndarray:
    """(N or 1+N, D)."""
    if kind == "learn":
        return weights["pos_embed"][0]
    if kind == "none":
        return np.zeros((grid * grid, width))
    quarter = width // 4
    table = np.zeros((grid * grid, width))
    for y in range(grid):
        for x in range(grid):
            for i in range(quarter):
                omega = 10000.0 ** (-i / (quarter - 1))
                row = table[y * grid + x]
                row[i], row[quarter + i] = math.sin(x * omega), math.cos(x * omega)
                row[2 * quarter + i], row[3 * quarter + i] = math.sin(y * omega), math.cos(y * omega)
    return table
