"""Karlo v1-alpha in the files in which it was first released. Each file is a part of the system.

| file                                        | holds                                                |
| ------------------------------------------- | ---------------------------------------------------- |
| ViT-L-14.pt                                 | CLIP, in OpenAI's format (`clip.openai`)             |
| prior-ckpt-step=01000000-of-01000000.ckpt   | the prior                                            |
| ViT-L-14_stats.th                           | mean and std of the whitened space of the prior      |
| decoder-ckpt-step=01000000-of-01000000.ckpt | the decoder, with the projections of its conditioning |
| improved-sr-ckpt-step=1.2M.ckpt             | both networks of the upsampler                       |

The U-Nets have the names of guided-diffusion. Sizes are read from shapes; attention heads have 64 channels. The
diffusion and sampling settings (`_DIFFUSION`) are those of Karlo's code.
"""

from typing import Any

from dalle2_jax.errors import WeightsError
from dalle2_jax.models.decoder import DecoderConfig
from dalle2_jax.models.priors.prior import PriorConfig
from dalle2_jax.models.unet import UNetConfig
from dalle2_jax.weights.component import Component, Source
from dalle2_jax.weights.families import guided_diffusion
from dalle2_jax.weights.karlo.diffusers import (
    CONDITIONING,
    conditioning_rules,
    decoder_sections,
    upsampler_sections,
)
from dalle2_jax.weights.karlo.priors import GUIDANCE, STEPS, prior_sections
from dalle2_jax.weights.rules import (
    Rule,
    dense,
    fused,
    leading,
    leaf,
    merged_heads,
    norm,
    positive_std,
    stacked,
    under,
)
from dalle2_jax.weights.tensors import strip_prefix

VOCAB_SIZE = 49_408
"""Size of the vocabulary of OpenAI's tokenizer."""

HEAD_CHANNELS = 64
"""Width of every attention head."""

_DIFFUSION = {
    "prior": ({"prediction": "x0"}, {"clip_sample": 10.0, "steps": STEPS, "guidance": GUIDANCE}),
    "decoder": ({"prediction": "eps", "variance": "learned_range", "loss": "hybrid"}, {"clip_sample": 1.0}),
    "upsampler_1": ({"prediction": "eps"}, {"clip_sample": 1.0}),
}
"""Settings that the files do not contain: fields of the sections (diffusion, sampling)."""

_KARLO_NAMES = {
    "null_image_emb": "cf_param",
    "image_emb_proj": "clip_emb",
    "image_token_proj": "clip_tok_proj",
    "text_emb_proj": "text_feat_proj",
    "text_seq_proj": "text_seq_proj.0",
    "text_seq_norm": "text_seq_proj.1",
}
"""Parameters of the decoder's conditioning: our names, and Karlo's."""


def decoder_rules(config: DecoderConfig) -> list[Rule]:
    """Returns the table of the decoder."""
    unet = under("unet", "", guided_diffusion.unet_rules(config.unet))
    return under("", "model.", [*unet, *conditioning_rules(config, _KARLO_NAMES)])


def prior_rules(config: PriorConfig) -> list[Rule]:
    """Returns the table of the prior, whose attention projections are ordered head by head."""
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


def detect(source: Source) -> list[Component]:
    """Returns the component in one of the files; [] for anything else.

    Raises:
        WeightsError: a tensor from which a size is read is missing.
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
        what = f"{source.path} lacks tensor {key}: the file is cut short or of another family"
        raise WeightsError(what, source.path, [key])
    return source.tensors[key].shape


def _scheduler(stage: str) -> dict[str, dict[str, Any]]:
    diffusion, sampling = _DIFFUSION[stage]
    return {
        "diffusion": {"schedule": "cosine", "num_steps": 1000, **diffusion},
        "sampling": {"name": "ddpm", **sampling},
    }


def _prior(source: Source) -> Component:
    embed_dim, width = _shape(source, "model.out_proj.weight")
    positions = _shape(source, "model.positional_embedding")[1]
    blocks = strip_prefix("model.transformer.resblocks.", source.tensors)
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
        config={**prior_sections(model, VOCAB_SIZE, _scheduler("prior")), "conditioning": dict(CONDITIONING["prior"])},
        tensors=source.tensors,
        params=prior_rules(model),
        ignored=(r"model\.causal_attention_mask",),
        completed_by="ViT-L-14_stats.th",
    )


def _stats(source: Source, ones: int) -> Component:
    return Component(
        stage="prior",
        family="Karlo statistics",
        where=str(source.path),
        config={"conditioning": {"whiten": True}},
        tensors=source.tensors,
        stats=[*leaf("mean", "0", leading(ones)), *leaf("std", "1", positive_std(ones))],
        completed_by="the prior",
    )


def _decoder(source: Source) -> Component:
    unet = guided_diffusion.unet_sizes(strip_prefix("model.", source.tensors))
    rows, width = _shape(source, "model.clip_tok_proj.weight")
    tokens = rows // (unet["context_dim"] or rows)
    model = DecoderConfig(UNetConfig(**unet), width, tokens, "clip", text_width=width, text_emb_proj=True)
    text = {"context_length": 77, "vocab_size": VOCAB_SIZE}
    return Component(
        stage="decoder",
        family="Karlo decoder",
        where=str(source.path),
        config=decoder_sections(unet, tokens, text, _scheduler("decoder")),
        tensors=source.tensors,
        params=decoder_rules(model),
    )


def _upsampler(source: Source) -> Component:
    tensors = strip_prefix("model_first_steps.", source.tensors)
    small = guided_diffusion.unet_sizes(tensors)["image_size"]
    unet = guided_diffusion.unet_sizes(tensors, 4 * small)
    rules = {
        name: guided_diffusion.unet_rules(UNetConfig(**unet), f"model_{name}.") for name in ("first_steps", "last_step")
    }
    last = any(key.startswith("model_last_step.") for key in source.tensors)
    return Component(
        stage="upsampler_1",
        family="Karlo super-resolution",
        where=str(source.path),
        config=upsampler_sections(unet, small, last, _scheduler("upsampler_1")),
        tensors=source.tensors,
        params=rules["first_steps"],
        stats=under("last", "", rules["last_step"]) if last else (),
    )
