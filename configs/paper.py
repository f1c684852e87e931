"""DALL-E 2 as published: Ramesh et al. 2022 (arXiv 2204.06125), Appendix C and Table 3.

    python train.py --config configs/paper.py:decoder --workdir runs/paper --multihost --config.mesh.fsdp=16

| Table 3               | prior      | decoder   | upsampler_1 | upsampler_2 | AR prior   |
| --------------------- | ---------- | --------- | ----------- | ----------- | ---------- |
| diffusion steps       | 1000       | 1000      | 1000        | 1000        | -          |
| noise schedule        | cosine     | cosine    | cosine      | linear      | -          |
| sampling steps        | 64         | 250       | 27          | 15          | -          |
| sampling variance     | analytic   | learned   | DDIM        | DDIM        | -          |
| crop fraction         | -          | -         | 0.25        | 0.25        | -          |
| model size            | 1B         | 3.5B      | 700M        | 300M        | 1B         |
| channels              | -          | 512       | 320         | 192         | -          |
| res blocks            | -          | 3         | 3           | 2           | -          |
| channel multiples     | -          | 1,2,3,4   | 1,2,3,4     | 1,1,2,2,4,4 | -          |
| channels a head       | -          | 64        | -           | -           | -          |
| attention at          | -          | 32,16,8   | -           | -           | -          |
| text context          | 256        | 256       | -           | -           | 256        |
| text width            | 2048       | 2048      | -           | -           | 2048       |
| text depth            | 24         | 24        | -           | -           | 24         |
| text heads            | 32         | 32        | -           | -           | 32         |
| latent context        | -          | -         | -           | -           | 384        |
| latent width          | -          | -         | -           | -           | 1664       |
| latent depth          | -          | -         | -           | -           | 24         |
| latent heads          | -          | -         | -           | -           | 26         |
| dropout               | -          | 0.1       | 0.1         | -           | -          |
| weight decay          | 6.0e-2     | -         | -           | -           | 4.0e-2     |
| batch size            | 4096       | 2048      | 1024        | 512         | 4096       |
| iterations            | 600K       | 800K      | 1M          | 1M          | 1M         |
| learning rate         | 1.1e-4     | 1.2e-4    | 1.2e-4      | 1.0e-4      | 1.6e-4     |
| Adam beta2            | 0.96       | 0.999     | 0.999       | 0.999       | 0.91       |
| Adam eps              | 1.0e-6     | 1.0e-8    | 1.0e-8      | 1.0e-8      | 1.0e-10    |
| EMA decay             | 0.9999     | 0.9999    | 0.9999      | 0.9999      | 0.999      |
"""

from ml_collections import ConfigDict

from dalle2_jax.config.page_defaults import pod_config
from dalle2_jax.errors import choose


def get_config(which: str) -> ConfigDict:
    """Returns the config of one stage."""
    config = choose("config of configs/paper.py", which, STAGES)()
    config.stage = which
    return config


def common(total_steps: int, batch_size: int, resolution: int, optim: dict) -> ConfigDict:
    """Returns what every stage shares. All models use Adam with decoupled weight decay, beta1 0.9 (App. C)."""
    text = {"kind": "clip", "vocab_size": 49_408, "context_length": 256}
    return pod_config(total_steps, batch_size, resolution, text, {"clip_norm": 1.0, **optim})


def clip() -> ConfigDict:
    """ViT-H/16 at 256x256 (App. C); what App. C leaves out is as Radford et al. 2021, Tables 18-20.

    650 M pairs, 32 epochs of batches of 32,768.
    """
    optim = {"lr": 3e-4, "warmup_steps": 2000, "schedule": "cosine", "beta2": 0.98, "eps": 1e-6, "weight_decay": 0.2}
    config = common(634_000, 32_768, 256, optim)
    config.text.context_length = 77
    config.model = {
        "embed_dim": 1024,
        "text": {"width": 1024, "layers": 24, "heads": 16},
        "vision": {"kind": "vit", "image_size": 256, "patch_size": 16, "width": 1280, "layers": 32, "heads": 16},
        "remat": "blocks",
        "dtype": "bfloat16",
    }
    config.embedding = {"normalisation": "unit", "scale": 17.2}
    return config


def prior() -> ConfigDict:
    """The diffusion prior: 24 layers of width 2048 over 256 text tokens and four more.

    Analytic-DPM asks for statistics of the trained network; measure them once before sampling:

        dalle2 evaluate runs/paper --measures noise_statistics --stage prior --num 1024
    """
    optim = {"lr": 1.1e-4, "beta2": 0.96, "eps": 1e-6, "weight_decay": 6e-2, "ema_decay": 0.9999}
    config = common(600_000, 4096, 256, optim)
    config.model = {
        "width": 2048,
        "layers": 24,
        "heads": 32,
        "text_input": "tokens",
        "remat": "blocks",
        "dtype": "bfloat16",
    }
    config.conditioning = {"drop_text": 0.1}
    config.diffusion = {"schedule": "cosine", "num_steps": 1000, "prediction": "x0"}
    config.sampling = {"name": "ddpm", "steps": 64, "variance": "analytic", "clip_sample": None}
    return config


def decoder() -> ConfigDict:
    """3.5B: the 2.3B U-Net of GLIDE and its 1.2B text encoder, with a CLIP image embedding and a learned variance."""
    config = common(800_000, 2048, 256, {"lr": 1.2e-4, "eps": 1e-8, "ema_decay": 0.9999})
    config.model = {
        "unet": {
            "image_size": 64,
            "out_channels": 6,
            "channels": 512,
            "channel_mult": (1, 2, 3, 4),
            "num_res_blocks": 3,
            "attention_resolutions": (32, 16, 8),
            "head_channels": 64,
            "dropout": 0.1,
            "context_dim": 2048,
            "remat": "blocks",
            "dtype": "bfloat16",
        },
        "image_tokens": 4,
        "text_input": "tokens",
        "text": {"width": 2048, "layers": 24, "heads": 32, "activation": "gelu"},
    }
    config.conditioning = {"drop_image": 0.1, "drop_text": 0.5}
    config.diffusion = {
        "schedule": "cosine",
        "num_steps": 1000,
        "prediction": "eps",
        "variance": "learned_range",
        "loss": "hybrid",
    }
    config.sampling = {"name": "ddpm", "steps": 250, "guidance": 1.25}
    return config


def _upsampler(config: ConfigDict, schedule: str, steps: int, low_size: int, **model) -> ConfigDict:
    config.model = {
        "image_size": 4 * low_size,
        "in_channels": 6,
        "attention_resolutions": (),
        "middle_attention": False,
        "remat": "blocks",
        "dtype": "bfloat16",
        **model,
    }
    config.conditioning = {"low_size": low_size, "crop_fraction": 0.25}
    config.diffusion = {"schedule": schedule, "num_steps": 1000, "prediction": "eps"}
    config.sampling = {"name": "ddim", "steps": steps}
    return config


def upsampler_1() -> ConfigDict:
    """64 -> 256, after a Gaussian blur, kernel 3, of sigma 0.6."""
    config = common(1_000_000, 1024, 256, {"lr": 1.2e-4, "eps": 1e-8, "ema_decay": 0.9999})
    shape = {"channels": 320, "channel_mult": (1, 2, 3, 4), "num_res_blocks": 3, "dropout": 0.1}
    config = _upsampler(config, "cosine", 27, 64, **shape)
    config.conditioning.blur_sigma = 0.6
    return config


def upsampler_2() -> ConfigDict:
    """256 -> 1024, after the degradations of BSRGAN as latent diffusion has them (section 2.1)."""
    config = common(1_000_000, 512, 1024, {"lr": 1e-4, "eps": 1e-8, "ema_decay": 0.9999})
    shape = {"channels": 192, "channel_mult": (1, 1, 2, 2, 4, 4), "num_res_blocks": 2}
    config = _upsampler(config, "linear", 15, 256, **shape)
    config.conditioning.degradation = "bsr"
    return config


def ar_prior() -> ConfigDict:
    """The autoregressive prior, in place of the diffusion prior: 319 codes of 1,024 buckets each (section 2.2).

    The dot products asked for are the training pairs' upper half. How many pairs components and buckets
    are estimated from is not published: 256 a bucket here.
    """
    optim = {"lr": 1.6e-4, "beta2": 0.91, "eps": 1e-10, "weight_decay": 4e-2, "ema_decay": 0.999}
    config = common(1_000_000, 4096, 256, optim)
    config.model = {
        "text": {"width": 2048, "layers": 24, "heads": 32, "activation": "gelu"},
        "width": 1664,
        "layers": 24,
        "heads": 26,
        "context_length": 384,
        "components": 319,
        "buckets": 1024,
        "remat": True,
        "dtype": "bfloat16",
    }
    config.conditioning = {"drop_text": 0.1, "calibration_examples": 262_144}
    config.sampling = {"guidance": 1.0, "dot_quantile": 0.5}
    return config


STAGES = {
    "clip": clip,
    "prior": prior,
    "ar_prior": ar_prior,
    "decoder": decoder,
    "upsampler_1": upsampler_1,
    "upsampler_2": upsampler_2,
}
