"""GLIDE's released files: base, upsampler, and both inpainting networks (Nichol et al. 2021, arXiv 2112.10741).

Each is one state dict: guided-diffusion's U-Net beside a transformer over the caption. The channels that the U-Net
reads tell them apart:

     3   base          x_t
     6   upsampler     x_t, the small picture enlarged
     7   base          x_t, the known picture, its mask
    10   upsampler     x_t, the known picture, its mask, the small picture enlarged
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from dalle2_jax.models.decoder import DecoderConfig
from dalle2_jax.models.transformer import TextConfig
from dalle2_jax.models.unet import UNetConfig
from dalle2_jax.text import Tokenizer, glide_tokenizer
from dalle2_jax.types import UserError
from dalle2_jax.weights.component import Component, Source
from dalle2_jax.weights.guided import HEAD_CHANNELS, UPSCALED, heads_of, learned_range, unet_rules, unet_sizes
from dalle2_jax.weights.rules import Rule, dense, leaf, merged_heads, norm, projections, stacked, under
from dalle2_jax.weights.tensors import Tensor

_KINDS = {
    # channels: what it is, its stage, whether it inpaints
    3: ("GLIDE base", "decoder", False),
    6: ("GLIDE upsampler", "upsampler_1", False),
    7: ("GLIDE base, inpainting", "decoder", True),
    10: ("GLIDE upsampler, inpainting", "upsampler_1", True),
}


def recognise(source: Source) -> list[Component]:
    """Returns the stage that a file of GLIDE's holds; [] where it is something else.

    A smaller vocabulary than the released one is taken for the first of its merges.

    Raises:
      UserError: it is one, but not of this shape.
    """
    tensors, where = source.tensors, str(source.path)
    if not {"input_blocks.0.0.weight", "transformer_proj.weight", "padding_embedding"} <= tensors.keys():
        return []
    channels = tensors["input_blocks.0.0.weight"].shape[1]
    if channels not in _KINDS:
        raise UserError(f"{where} is a GLIDE network that reads {channels} channels: none of the released ones does")
    family, stage, inpaint = _KINDS[channels]
    model = read_sizes(tensors, where, source.hints.head_channels or HEAD_CHANNELS, source.hints.image_size)
    return [
        Component(
            stage=stage,
            family=family,
            where=where,
            config=_sections(model, stage, inpaint),
            tensors=tensors,
            params=glide_rules(model),
            tokenizer=_tokenizer(model.text.vocab_size),
        )
    ]


def _tokenizer(vocab_size: int) -> Tokenizer | None:
    try:
        return glide_tokenizer(vocab_size)
    except UserError:  # too few for the bytes: no text can be read so
        return None


def read_sizes(
    tensors: Mapping[str, Tensor], where: str, head_channels: int = HEAD_CHANNELS, image_size: int | None = None
) -> DecoderConfig:
    """Returns the network that a state dict holds, by the shapes of its tensors.

    Heads leave no trace: those of the transformer and of the U-Net are all of ``head_channels``.

    Raises:
      UserError: a tensor that says a size is missing.
    """
    for key in ("token_embedding.weight", "positional_embedding", "transformer.resblocks.0.mlp.c_fc.weight"):
        if key not in tensors:
            raise UserError(f"{where} lacks tensor {key}: it is cut short or of another family")
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


def glide_rules(model: DecoderConfig) -> list[Rule]:
    """Returns the table of any of the four."""
    return [
        *under("unet", "", unet_rules(model.unet)),
        *under("caption_encoder", "", _caption_encoder(model.text)),
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
    """The stage's config. Guidance, steps and samplers are those of the notebooks released with the weights."""
    text, upsamples = model.text, stage != "decoder"
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
