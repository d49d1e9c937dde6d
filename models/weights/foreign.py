"""Recognises state dicts of unsupported architectures, so that the error can name them."""

from collections.abc import Iterable

# (parts of a tensor name, description of the file). The first match is used.
SIGNS: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        ("visual.class_embedding", "embeddings.class_embedding", "ln_pre.", "pre_layrnorm.", "norm_pre."),
        "the image tower of CLIP, which has a normalisation before its first block; this is not supported",
    ),
    (
        ("lora_A.", "lora_B.", "lora_down.", "lora_up."),
        "a LoRA adapter; merge it into its model and save that (PEFT: merge_and_unload)",
    ),
    ((".SCB", ".absmax", ".qweight", ".quant_state"), "a quantised model; save it in float32, float16 or bfloat16"),
    (("rel_pos_h", "rel_pos_w"), "a ViT with relative positions and windows (SAM, ViTDet), which are not supported"),
    (("blocks_token_only.",), "CaiT, whose class attention is not supported"),
    (("positional_embedding.pos_embedding", ".attn.proj_q."), "a ViT of pytorch_pretrained_vit; use the files of timm"),
    (
        ("transformer.embeddings.patch_embeddings.",),
        "a ViT of ViT-pytorch (jeonsworth); use Google's .npz that it was made from",
    ),
    (
        ("patch_embed.projection.",),
        "a ViT of mmpretrain or mmseg; use the weights that it was converted from, or timm's",
    ),
    (("dist_token", "distillation_token"), "a distilled DeiT with two tokens and two heads, which is not supported"),
    (("relative_position", "cpb_mlp."), "a model with relative positions (Swin, BEiT), which are not supported"),
    (
        ("rope_embed.", "rope_embeddings.", "rope."),
        "a model with rotary positions (DINOv3, EVA-02), which are not supported",
    ),
    (("lambda_1", "gamma_1"), "BEiT or a similar model, which is not supported"),
    (("mlp.w12.", "mlp.w1.", "mlp.weights_in.", "mlp.fc1_g."), "a model with SwiGLU, which is not supported"),
    (("conv_proj.0.", "conv_bn_relu"), "a ViT with a stem of plain convolutions, which is not supported"),
    (("downsample.reduction.",), "Swin, whose windows are not supported"),
    (("dwconv.", "conv_dw."), "ConvNeXt, a convolutional network"),
    (("conv_stem.", "features.0.0.weight"), "a convolutional network (EfficientNet, MobileNet, ConvNeXt)"),
    (("layer1.0.conv1.", "layer1.0.bn1."), "a ResNet with batch normalisation; the ResNets here are BiT (GroupNorm)"),
    (("text_encoder.", "text_decoder."), "a model of images and text (BLIP, ALBEF)"),
    (("lm_head.", "token_embedding.", "word_embeddings.", "embed_tokens."), "a language model"),
)
# (prefix of a missing or unknown tensor, the option that explains it)
OPTIONS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("cls_token", "attn_pool."), 'is the pooling the same? (options: pool="token", "gap" or "map")'),
    (("fc_norm.", "norm."), "is the final LayerNorm after the mean? (option: fc_norm)"),
)


def recognize(names: Iterable[str]) -> str | None:
    """A description of the file from the names of its tensors; None if they are unknown."""
    names = list(names)
    for signs, what in SIGNS:
        if any(sign in name for name in names for sign in signs):
            return what
    return None


def hint(names: Iterable[str], misshapen: Iterable[str]) -> str:
    """A question '; is it ...?' for an error that lists mismatched tensors; '' if there is no explanation."""
    names = list(names)
    if what := recognize(names):
        return f"; it is {what}"
    for begins, question in OPTIONS:
        if any(name.startswith(begins) for name in names):
            return f"; {question}"
    if any(line.startswith(("patch_embed.proj.weight", "blocks.0.")) for line in misshapen):
        return "; is it the same variant?"
    return ""
