"""A complete system small enough for tests: a config file like those in ``configs/``; every stage trains in seconds.

    python train.py --config tests/support/tiny_system.py:clip --workdir runs/tiny

Shapes at 8x8, 16x16 after the upsampler. Its images are noise: tests ask whether they are the same
noise, not whether they are good.
"""

from ml_collections import ConfigDict

from dalle2_jax.errors import choose

STEPS, CHECKPOINT_EVERY = 24, 4
"""Of every stage."""

UPSAMPLER_STEPS = 8
"""Of the upsampler's diffusion."""


def get_config(which: str) -> ConfigDict:
    """Returns the config of one stage."""
    config = choose("config of tests/support/tiny_system.py", which, STAGES)()
    config.stage = which
    return config


def sweep(which: str) -> list[dict]:
    """Two short runs, and between them one that cannot be."""
    return [{"optim.lr": 1e-3, "total_steps": 4}, {"optim.lr": 1e-2, "batch_size": 0}, {"total_steps": 6}]


def common(resolution: int) -> ConfigDict:
    """What every stage's config has."""
    return ConfigDict(
        {
            "seed": 0,
            "total_steps": STEPS,
            "batch_size": 8,
            "log_every": 2,
            "checkpoint_every": CHECKPOINT_EVERY,
            "keep_checkpoints": 2,
            "sample_every": 0,
            "workers": 0,
            "data": {"kind": "shapes", "resolution": resolution, "max_objects": 1, "num_examples": 64},
            "text": {"vocab_size": 300, "context_length": 32},
            "optim": {"lr": 1e-3, "warmup_steps": 2, "schedule": "cosine", "weight_decay": 0.01, "ema_decay": 0.9},
            "mesh": {"data": -1, "fsdp": 1, "tensor": 1},
        }
    )


def clip() -> ConfigDict:
    """An 8x8 ViT of four patches and one layer of text."""
    config = common(8)
    config.model = {
        "embed_dim": 8,
        "text": {"width": 16, "layers": 1, "heads": 2},
        "vision": {"kind": "vit", "image_size": 8, "patch_size": 4, "width": 16, "layers": 1, "heads": 2},
    }
    config.embedding = {"normalisation": "unit", "scale": 1.5}
    return config


def diffused(resolution: int, prediction: str, num_steps: int = 100, **fields) -> ConfigDict:
    """What the config of every diffusion stage has."""
    config = common(resolution)
    config.diffusion = {"schedule": "cosine", "num_steps": num_steps, "prediction": prediction, **fields}
    return config


def prior() -> ConfigDict:
    """One layer."""
    config = diffused(8, "x0")
    config.model = {"width": 16, "layers": 1, "heads": 2, "text_input": "tokens"}
    config.conditioning = {"drop_text": 0.1}
    config.sampling = {"name": "ddpm", "steps": 4, "clip_sample": None}
    return config


def unet(**fields) -> dict:
    """A U-Net of one level."""
    return {"channels": 8, "channel_mult": (1,), "num_res_blocks": 1, "norm_groups": 4, **fields}


def decoder() -> ConfigDict:
    """A 4x4 grid of 2x2 pixels, with attention to an embedding and a caption; it learns its variance."""
    config = diffused(8, "v", variance="learned_range", loss="hybrid")
    sizes = {"image_size": 8, "out_channels": 6, "patch_size": 2, "context_dim": 8}
    config.model = {
        "unet": unet(**sizes, attention_resolutions=(4,), head_channels=8),
        "image_tokens": 2,
        "text_input": "tokens",
        "text": {"width": 8, "layers": 1, "heads": 2},
    }
    config.conditioning = {"drop_image": 0.1, "drop_text": 0.5}
    config.sampling = {"name": "ddim", "steps": 4, "guidance": 2.0}
    return config


def upsampler_1() -> ConfigDict:
    """8x8 to 16x16, by so few steps that their losses decide which are trained before the run is over."""
    config = diffused(16, "v", UPSAMPLER_STEPS, timesteps="loss_second_moment")
    config.model = unet(image_size=16, in_channels=6, attention_resolutions=(), middle_attention=False)
    config.conditioning = {"low_size": 8, "crop_fraction": 0.5}
    config.sampling = {"name": "ddim", "steps": 3}
    return config


def ar_prior() -> ConfigDict:
    """Four codes of eight buckets, in place of the diffusion prior."""
    config = common(8)
    config.model = {
        "text": {"width": 8, "layers": 1, "heads": 2},
        "width": 16,
        "layers": 1,
        "heads": 2,
        "context_length": 6,
        "components": 4,
        "buckets": 8,
    }
    config.conditioning = {"drop_text": 0.1, "calibration_examples": 64}
    return config


STAGES = {"clip": clip, "prior": prior, "ar_prior": ar_prior, "decoder": decoder, "upsampler_1": upsampler_1}
