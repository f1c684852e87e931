"""Karlo v1-alpha in the files that it was published in, each a part of the system.

| file                                        | holds                                                |
| ------------------------------------------- | ---------------------------------------------------- |
| ViT-L-14.pt                                 | CLIP, OpenAI's own file (``clip_openai``)            |
| prior-ckpt-step=01000000-of-01000000.ckpt   | the prior                                            |
| ViT-L-14_stats.th                           | mean and deviation of the space that the prior is in |
| decoder-ckpt-step=01000000-of-01000000.ckpt | the decoder, with what it makes of CLIP's embeddings |
| improved-sr-ckpt-step=1.2M.ckpt             | both networks of the upsampler                       |

Their U-Nets are of guided-diffusion's grammar. Sizes are read from shapes; heads have 64 channels. How to diffuse and
to sample is in Karlo's code: `_DIFFUSION`.
"""

from typing import Any

from dalle2_jax.models.decoder import DecoderConfig
from dalle2_jax.models.prior import PriorConfig
from dalle2_jax.models.unet import UNetConfig
from dalle2_jax.types import UserError
from dalle2_jax.weights import guided
from dalle2_jax.weights.component import Component, Source
from dalle2_jax.weights.karlo import CONDITIONING, decoder_sections, told_rules, upsampler_sections
from dalle2_jax.weights.priors import GUIDANCE, STEPS, prior_sections
from dalle2_jax.weights.rules import Rule, dense, fused, leading, leaf, merged_heads, norm, stacked, under
from dalle2_jax.weights.tensors import within

VOCAB_SIZE = 49_408
"""Of OpenAI's tokenizer."""

HEAD_CHANNELS = 64
"""Of every attention."""

_DIFFUSION = {
    "prior": ({"prediction": "x0"}, {"clip": 10.0, "steps": STEPS, "guidance": GUIDANCE}),
    "decoder": ({"prediction": "eps", "variance": "learned_range", "loss": "hybrid"}, {"clip": 1.0}),
    "upsampler_1": ({"prediction": "eps"}, {"clip": 1.0}),
}
"""What the files do not say: (diffusion, sampling)."""

_TOLD = {
    "null_image_emb": "cf_param",
    "image_emb_proj": "clip_emb",
    "image_token_proj": "clip_tok_proj",
    "text_emb_proj": "text_feat_proj",
    "text_seq_proj": "text_seq_proj.0",
    "text_seq_norm": "text_seq_proj.1",
}
"""Our names of what is made of CLIP's embeddings, and theirs."""


def decoder_rules(config: DecoderConfig) -> list[Rule]:
    """The table of the decoder."""
    unet = under("unet", "", guided.unet_rules(config.unet))
    return under("", "model.", [*unet, *told_rules(config, _TOLD)])


def prior_rules(config: PriorConfig) -> list[Rule]:
    """The table of the prior; queries, keys and values lie head by head."""
    heads = config.heads
    block = [
        *norm("ln_1", "ln_1"),
        *leaf("attn/qkv/kernel", "attn.c_qkv.weight", fused(3, heads, heads_first=True)),
        *leaf("attn/qkv/bias", "attn.c_qkv.bias", fused(3, heads, bias=True, heads_first=True)),
        *dense("attn/out", "attn.c_proj", merged_heads(heads)),
        *norm("ln_2", "ln_2"),
        *dense("fc", "mlp.c_fc"),
        *dense("proj", "mlp.c_proj"),
    ]
    rules = [
        *(rule for i in (1, 2) for rule in dense(f"time_mlp/fc_{i}", f"time_embed.{2 * i - 2}")),
        *dense("image_emb_proj", "clip_img_proj"),
        *dense("text_emb_proj", "text_emb_proj"),
        *dense("text_seq_proj", "text_enc_proj"),
        *leaf("positional_embedding", "positional_embedding", leading(1)),
        *leaf("query", "prd_emb", leading(2)),
        *stacked(*(under("transformer/blocks", f"transformer.resblocks.{i}.", block) for i in range(config.layers))),
        *norm("ln_final", "final_ln"),
        *dense("out_proj", "out_proj"),
    ]
    return under("", "model.", rules)


def recognise(source: Source) -> list[Component]:
    """Returns the part that one of the files holds; [] for something else.

    Raises:
        UserError: it is one, and lacks a tensor that says a size.
    """
    readers = {
        "model.prd_emb": _prior,
        "model.cf_param": _decoder,
        "model_first_steps.input_blocks.0.0.weight": _upsampler,
    }
    for key, read in readers.items():
        if key in source.tensors:
            return [read(source)]
    shapes = {key: tensor.shape for key, tensor in source.tensors.items()}
    if shapes.keys() == {"0", "1"} and shapes["0"] == shapes["1"] and len(shapes["0"]) <= 2:
        return [_stats(source, len(shapes["0"]) - 1)]
    return []


def _shape(source: Source, key: str) -> tuple[int, ...]:
    if key not in source.tensors:
        raise UserError(f"{source.path} lacks tensor {key}: it is cut short or of another family")
    return source.tensors[key].shape


def _said(stage: str) -> dict[str, dict[str, Any]]:
    diffusion, sampling = _DIFFUSION[stage]
    return {
        "diffusion": {"schedule": "cosine", "num_steps": 1000, **diffusion},
        "sampling": {"name": "ddpm", **sampling},
    }


def _prior(source: Source) -> Component:
    embed_dim, width = _shape(source, "model.out_proj.weight")
    positions = _shape(source, "model.positional_embedding")[1]
    blocks = within("model.transformer.resblocks.", source.tensors)
    model = PriorConfig(
        width=width,
        layers=len({key.split(".")[0] for key in blocks}),
        heads=max(1, width // HEAD_CHANNELS),
        embed_dim=embed_dim,
        context_length=positions - 4,
        text_input="clip",
        text_width=_shape(source, "model.text_enc_proj.weight")[1],
        learned_null=False,
    )
    return Component(
        stage="prior",
        family="Karlo prior",
        where=str(source.path),
        config={**prior_sections(model, VOCAB_SIZE, _said("prior")), "conditioning": dict(CONDITIONING["prior"])},
        tensors=source.tensors,
        params=prior_rules(model),
        ignored=(r"model\.causal_attention_mask",),
        needs="ViT-L-14_stats.th",
    )


def _stats(source: Source, ones: int) -> Component:
    layout = leading(ones)
    return Component(
        stage="prior",
        family="Karlo statistics",
        where=str(source.path),
        config={"conditioning": {"whiten": True}},
        tensors=source.tensors,
        stats=[*leaf("mean", "0", layout), *leaf("std", "1", layout)],
        needs="the prior",
    )


def _decoder(source: Source) -> Component:
    unet = guided.unet_sizes(within("model.", source.tensors))
    rows, width = _shape(source, "model.clip_tok_proj.weight")
    tokens = rows // (unet["context_dim"] or rows)
    model = DecoderConfig(UNetConfig(**unet), width, tokens, "clip", text_width=width, text_emb_proj=True)
    text = {"context_length": 77, "vocab_size": VOCAB_SIZE}
    return Component(
        stage="decoder",
        family="Karlo decoder",
        where=str(source.path),
        config=decoder_sections(unet, tokens, text, _said("decoder")),
        tensors=source.tensors,
        params=decoder_rules(model),
    )


def _upsampler(source: Source) -> Component:
    tensors = within("model_first_steps.", source.tensors)
    small = guided.unet_sizes(tensors)["image_size"]
    unet = guided.unet_sizes(tensors, 4 * small)
    rules = {name: guided.unet_rules(UNetConfig(**unet), f"model_{name}.") for name in ("first_steps", "last_step")}
    last = any(key.startswith("model_last_step.") for key in source.tensors)
    return Component(
        stage="upsampler_1",
        family="Karlo super-resolution",
        where=str(source.path),
        config=upsampler_sections(unet, small, last, _said("upsampler_1")),
        tensors=source.tensors,
        params=rules["first_steps"],
        stats=under("last", "", rules["last_step"]) if last else (),
    )
