"""Ablations of the paper's choices on the embedded data set of shapes, each a change of `configs/shapes.py:…,adamw`.

    python train.py --config configs/ablations.py:decoder,text_emb --workdir runs/demo-text
    dalle2 sweep --config configs/ablations.py:decoder,drops --system shapes --out runs/drops --measure attributes

| config                     | what differs between its runs, or from the included system                    |
| -------------------------- | ----------------------------------------------------------------------------- |
| decoder,drops              | whether the image embedding and the caption are dropped in training           |
| decoder,without_captions   | the image embedding alone                                                     |
| decoder,text_emb           | CLIP's text embedding and text states alone, without the image embedding      |
| decoder,learned_variance   | a fixed variance, and a learned one with the hybrid loss; sampled by DDPM     |
| decoder,attention          | cross-attention to the caption after the image's own, in place of joined      |
| upsampler_1,corruption     | how the low-resolution image is corrupted in training                         |

A sweep trains every run of a config and links it to the other stages of ``--system``. Decoders are trained for half of
the steps of ``configs/shapes.py:decoder,adamw``, 8 minutes each on two CPU cores; `benchmarks/ablations.py` makes the
tables of docs/paper.md from all of them.
"""

from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from dalle2_jax.config.pages import call_config_page
from dalle2_jax.errors import choose


def get_config(which: str) -> ConfigDict:
    """Returns the config of one stage."""
    change, _ = choose("config of configs/ablations.py", which, STAGES)
    config = call_config_page(f"shapes:{which.partition(',')[0]},adamw")
    if config.stage == "decoder":
        config.total_steps //= 2
    change(config)
    return config


def sweep(which: str) -> Iterator[dict[str, Any]]:
    """Yields the runs of an ablation, each as fields and their values."""
    _, runs = choose("config of configs/ablations.py", which, STAGES)
    yield from runs


def unchanged(config: ConfigDict) -> None:
    """The runs alone make the difference."""


def without_captions(config: ConfigDict) -> None:
    """The decoder reads no caption: four image tokens are its whole context."""
    with config.unlocked():
        config.model["text_input"] = None
    config.model.text_emb_proj = False


def text_emb(config: ConfigDict) -> None:
    """The decoder reads CLIP's text embedding and states, and no image embedding: a system without a prior."""
    with config.unlocked():
        config.model["image_emb_dim"] = None


def learned_variance(config: ConfigDict) -> None:
    """Sampled by DDPM, which uses the variance."""
    config.sampling.update(name="ddpm", steps="25")


ONE_RUN = ({"seed": 0},)

DROPS = tuple(
    {"conditioning.drop_image": image, "conditioning.drop_text": text} for image in (0.5, 0.0) for text in (0.1, 0.0)
)

VARIANCES = (
    {"diffusion.variance": "fixed_small"},
    {"model.unet.out_channels": 6, "diffusion.variance": "learned_range", "diffusion.loss": "hybrid"},
)

CROSS_ATTENTION = ({"model.unet.context_attention": "cross"},)

CORRUPTIONS = (
    {"conditioning.blur_rate": 0.0},
    {"conditioning.blur_rate": 1.0},
    {"conditioning.blur_rate": 0.0, "conditioning.noise_augmentation": 0.1},
    {"conditioning.degradation": "bsr_light"},
    {"conditioning.degradation": "bsr"},
)

STAGES = {
    # name: (what it changes in the config of configs/shapes.py:...,adamw, its runs)
    "clip,drops": (unchanged, ONE_RUN),
    "clip,without_captions": (unchanged, ONE_RUN),
    "clip,text_emb": (unchanged, ONE_RUN),
    "clip,learned_variance": (unchanged, ONE_RUN),
    "clip,attention": (unchanged, ONE_RUN),
    "decoder,drops": (unchanged, DROPS),
    "decoder,without_captions": (without_captions, ONE_RUN),
    "decoder,text_emb": (text_emb, ONE_RUN),
    "decoder,learned_variance": (learned_variance, VARIANCES),
    "decoder,attention": (unchanged, CROSS_ATTENTION),
    "upsampler_1,corruption": (unchanged, CORRUPTIONS),
}
