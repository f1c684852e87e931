"""GLIDE's released files: base, upsampler, and their inpainting variants (Nichol et al. 2021, arXiv 2112.10741).

Each is one state dict: guided-diffusion's U-Net and a transformer over the caption. The number of input channels of the
U-Net distinguishes them:

     3   base          x_t
     6   upsampler     x_t, the enlarged low-resolution image
     7   base          x_t, the known image, its mask
    10   upsampler     x_t, the known image, its mask, the enlarged low-resolution image
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from dalle2_jax.errors import UserError, WeightsError
from dalle2_jax.models.decoder import DecoderConfig
from dalle2_jax.models.transformer import TextConfig
from dalle2_jax.models.unet import UNetConfig
from dalle2_jax.text import Tokenizer, glide_tokenizer
from dalle2_jax.weights.component import Component, Source
from dalle2_jax.weights.config_files import warn
from dalle2_jax.weights.families.guided_diffusion import (
    HEAD_CHANNELS,
    UPSCALED,
    heads_of,
    learned_range,
    unet_rules,
    unet_sizes,
)
from dalle2_jax.weights.rules import (
    Rule,
    dense,
    leaf,
    merged_heads,
    norm,
    projections,
    stacked,
    under,
)
from dalle2_jax.weights.tensors import Tensor

_KINDS = {
    # input channels: family, stage, whether it is an inpainting network
    3: ("GLIDE base", "decoder", False),
    6: ("GLIDE upsampler", "upsampler_1", False),
    7: ("GLIDE base, inpainting", "decoder", True),
    10: ("GLIDE upsampler, inpainting", "upsampler_1", True),
}


def detect(source: Source) -> list[Component]:
    """Returns the stage in a GLIDE file; [] for anything else.

    A vocabulary smaller than the released one is assumed to have its first merges.

    Raises:
      WeightsError: a tensor is missing, or the architecture is not supported.
    """
    tensors, where = source.tensors, str(source.path)
    if not {"input_blocks.0.0.weight", "transformer_proj.weight", "padding_embedding"} <= tensors.keys():
        return []
    channels = tensors["input_blocks.0.0.weight"].shape[1]
    if channels not in _KINDS:
        what = f"must have {', '.join(map(str, _KINDS))} input channels, got {channels}"
        raise WeightsError(f"{where}: a GLIDE network {what}", where)
    family, stage, inpaint = _KINDS[channels]
    if source.hints.head_channels is None:
        assumed = f"attention heads of {HEAD_CHANNELS} channels are assumed, as in the released files"
        warn(f"{where}: {assumed}; give head_channels for another network")
    model = read_sizes(tensors, where, source.hints.head_channels or HEAD_CHANNELS, source.hints.image_size)
    return [
        Component(
            stage=stage,
            family=family,
            where=where,
            config=_sections(model, stage, inpaint),
            tensors=tensors,
            params=glide_rules(model),
            tokenizer=_tokenizer(text_config(model).vocab_size),
        )
    ]


def _tokenizer(vocab_size: int) -> Tokenizer | None:
    try:
        return glide_tokenizer(vocab_size)
    except UserError:  # fewer tokens than bytes: no tokenizer has this vocabulary
        return None


def read_sizes(
    tensors: Mapping[str, Tensor], where: str, head_channels: int = HEAD_CHANNELS, image_size: int | None = None
) -> DecoderConfig:
    """Returns the config of the network in a state dict, from the shapes of its tensors.

    Args:
      tensors: the tensors, by key.
      where: name of the file, for errors.
      head_channels: width of the attention heads of transformer and U-Net, which shapes do not show.
      image_size: side of its images; None for 2^(levels + 2).

    Raises:
      WeightsError: a tensor from which a size is read is missing.
    """
    for key in ("token_embedding.weight", "positional_embedding", "transformer.resblocks.0.mlp.c_fc.weight"):
        if key not in tensors:
            raise WeightsError(f"{where} lacks tensor {key}: the file is cut short or of another family", where, [key])
    vocab_size, width = tensors["token_embedding.weight"].shape
    text = TextConfig(
        vocab_size=vocab_size,
        context_length=tensors["positional_embedding"].shape[0],
        width=width,
        layers=len({key.split(".")[2] for key in tensors if key.startswith("transformer.resblocks.")}),
        heads=max(1, width // head_channels),
        activation="gelu",
        mlp_ratio=tensors["transformer.resblocks.0.mlp.c_fc.weight"].shape[0] / width,
    )
    unet = UNetConfig(**unet_sizes(tensors, image_size, where), **heads_of(tensors, head_channels, where), dropout=0.1)
    return DecoderConfig(unet, image_emb_dim=None, text_input="tokens", text=text)


def text_config(model: DecoderConfig) -> TextConfig:
    """Returns the config of the transformer over the caption, which every GLIDE network has."""
    assert model.text is not None
    return model.text


def glide_rules(model: DecoderConfig) -> list[Rule]:
    """Returns the table of any of the four networks."""
    return [
        *under("unet", "", unet_rules(model.unet)),
        *under("caption_encoder", "", _caption_encoder(text_config(model))),
        *dense("caption_emb_proj", "transformer_proj"),
    ]


def _caption_encoder(text: TextConfig) -> list[Rule]:
    block = [
        *norm("ln_1", "ln_1"),
        *projections("attn/qkv", ["attn.c_qkv"], text.heads, parts=3, heads_first=True),
        *dense("attn/out", "attn.c_proj", merged_heads(text.heads)),
        *norm("ln_2", "ln_2"),
        *dense("fc", "mlp.c_fc"),
        *dense("proj", "mlp.c_proj"),
    ]
    return [
        *leaf("token_embedding/embedding", "token_embedding.weight"),
        *leaf("positional_embedding", "positional_embedding"),
        *leaf("padding_embedding", "padding_embedding"),
        *stacked(*(under("transformer/blocks", f"transformer.resblocks.{i}.", block) for i in range(text.layers))),
        *norm("ln_final", "final_ln"),
    ]


def _sections(model: DecoderConfig, stage: str, inpaint: bool) -> dict[str, Any]:
    """Returns the sections of the stage's config; sampling is that of the notebooks released with the weights."""
    text, upsamples = text_config(model), stage != "decoder"
    conditioning = {"drop_text": 0.2, "inpaint": inpaint}
    if upsamples:
        conditioning |= UPSCALED | {"low_size": model.unet.image_size // 4}
        sampling = {"name": "ddpm" if inpaint else "ddim", "steps": "fast27", "temperature": 0.997}
    else:
        sampling = {"name": "ddpm", "steps": 100, "guidance": 5.0 if inpaint else 3.0}
    return {
        "model": {
            "unet": dataclasses.asdict(model.unet),
            "image_emb_dim": None,
            "text_input": "tokens",
            "text": {
                "width": text.width,
                "layers": text.layers,
                "heads": text.heads,
                "activation": text.activation,
                "mlp_ratio": text.mlp_ratio,
            },
        },
        "text": {"vocab_size": text.vocab_size, "context_length": text.context_length},
        "conditioning": conditioning,
        "diffusion": learned_range("linear" if upsamples else "cosine"),
        "sampling": sampling,
    }
