"""Recognises state dicts that no model of this project can hold, so that the error can name them."""

from collections.abc import Iterable

# (parts of a tensor's name, what the file is). The first that is found decides.
SIGNS: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        ("visual.class_embedding", "embeddings.class_embedding", "ln_pre.", "pre_layrnorm.", "norm_pre."),
        "CLIP's image tower, which normalises before its first block; this model does not",
    ),
    (("dist_token", "distillation_token"), "a distilled DeiT, with a second token and a second head"),
    (("relative_position",), "a model with relative positions (Swin, BEiT), which this model has not"),
    (("rope_embed.", "rope."), "a model with rotary positions (DINOv3, EVA-02), which this model has not"),
    (("lambda_1", "gamma_1"), "BEiT or a model like it, which this model is not"),
    (("mlp.w12.", "mlp.w1.", "mlp.weights_in.", "mlp.fc1_g."), "a model with SwiGLU, which this model has not"),
    (("conv_proj.0.", "conv_bn_relu"), "a ViT with a stem of plain convolutions, which this model has not"),
    (("downsample.reduction.",), "Swin, whose windows this model has not"),
    (("dwconv.", "conv_dw."), "ConvNeXt, a convolutional network"),
    (("layer1.0.conv1.", "layer1.0.bn1."), "a ResNet with batch normalisation; the ResNets here are BiT (GroupNorm)"),
    (("lm_head.", "token_embedding.", "word_embeddings.", "embed_tokens."), "a language model"),
)
# (begin of a name of a missing or unknown tensor, the option that explains it)
OPTIONS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("cls_token", "attn_pool."), 'is the pooling the same? (options: pool="token", "gap" or "map")'),
    (("fc_norm.", "norm."), "is the final LayerNorm after the mean? (option: fc_norm)"),
)


def recognize(names: Iterable[str]) -> str | None:
    """What the file is, judged by the names of its tensors; None when they do not show it."""
    names = list(names)
    for signs, what in SIGNS:
        if any(sign in name for name in names for sign in signs):
            return what
    return None


def hint(names: Iterable[str], misshapen: Iterable[str]) -> str:
    """'; is it ...?' for an error that lists tensors which do not fit; '' when nothing explains them."""
    names = list(names)
    if what := recognize(names):
        return f"; it is {what}"
    for begins, question in OPTIONS:
        if any(name.startswith(begins) for name in names):
            return f"; {question}"
    if any(line.startswith(("patch_embed.proj.weight", "blocks.0.")) for line in misshapen):
        return "; is it the same variant?"
    return ""
