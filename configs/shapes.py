"""The embedded data set of captioned shapes: the whole cascade on two CPU cores, or one GPU.

    for stage in clip prior decoder upsampler_1; do
        python train.py --config configs/shapes.py:$stage --workdir runs/demo
    done

One object a picture, 32x32 base, 64x64 after the upsampler. Pictures enter the U-Nets folded: 2x2
(4x4) pixels to a position.
"""

from ml_collections import ConfigDict

from dalle2_jax.types import choose


def get_config(which: str) -> ConfigDict:
    """Returns the config of one stage."""
    config = choose("config of configs/shapes.py", which, STAGES)()
    config.stage = which
    return config


def common(total_steps: int, batch_size: int, lr: float, resolution: int) -> ConfigDict:
    """What every stage's config has."""
    return ConfigDict(
        {
            "seed": 0,
            "total_steps": total_steps,
            "batch_size": batch_size,
            "log_every": 25,
            "checkpoint_every": 200,
            "keep_checkpoints": 2,
            "sample_every": 0,
            "workers": 0,
            "data": {"kind": "shapes", "resolution": resolution, "max_objects": 1},
            "text": {"vocab_size": 400, "context_length": 24},
            "optim": {
                "lr": lr,
                "warmup_steps": total_steps // 20,
                "schedule": "cosine",
                "beta2": 0.99,
                "weight_decay": 0.01,
                "ema_decay": 0.995,
            },
            "mesh": {"data": -1, "fsdp": 1, "tensor": 1},
        }
    )


def clip() -> ConfigDict:
    config = common(600, 128, 1e-3, resolution=32)
    config.model = {
        "embed_dim": 64,
        "text": {"width": 96, "layers": 3, "heads": 4},
        "vision": {"kind": "vit", "image_size": 32, "patch_size": 4, "width": 96, "layers": 4, "heads": 4},
        "image_mean": (0.5, 0.5, 0.5),
        "image_std": (0.25, 0.25, 0.25),
    }
    config.embedding = {"normalisation": "unit", "scale": 4.3}  # 0.54 a dimension, as the paper's 17.2 at 1,024
    return config


def prior() -> ConfigDict:
    config = common(1000, 128, 1e-3, resolution=32)
    config.model = {"width": 128, "layers": 4, "heads": 4, "text_input": "tokens"}
    config.conditioning = {"drop_text": 0.1}
    config.diffusion = {"schedule": "cosine", "num_steps": 1000, "prediction": "x0"}
    config.sampling = {"name": "ddpm", "steps": 32, "clip": None, "guidance": 1.0}
    return config


def decoder() -> ConfigDict:
    config = common(1500, 32, 1e-3, resolution=32)
    config.model = {
        "unet": {
            "image_size": 32,
            "patch_size": 2,
            "channels": 48,
            "channel_mult": (1, 2),
            "num_res_blocks": 2,
            "attention_resolutions": (8,),
            "head_channels": 32,
            "norm_groups": 16,
            "context_dim": 64,
        },
        "image_tokens": 4,
        "text_input": "tokens",
        "text": {"width": 64, "layers": 2, "heads": 4, "activation": "gelu"},
    }
    config.conditioning = {"drop_image": 0.1, "drop_text": 0.5}
    config.diffusion = {"schedule": "cosine", "num_steps": 1000, "prediction": "v"}
    config.sampling = {"name": "ddim", "steps": 25, "guidance": 2.0}
    return config


def upsampler_1() -> ConfigDict:
    config = common(400, 32, 1e-3, resolution=64)
    config.model = {
        "image_size": 64,
        "in_channels": 6,
        "patch_size": 2,
        "channels": 32,
        "channel_mult": (1, 2),
        "num_res_blocks": 1,
        "attention_resolutions": (),
        "middle_attention": False,
        "norm_groups": 8,
        "scale_shift": False,
    }
    config.conditioning = {"low_size": 32, "crop_fraction": 0.5}
    config.diffusion = {"schedule": "cosine", "num_steps": 1000, "prediction": "v"}
    config.sampling = {"name": "ddim", "steps": 8}
    return config


STAGES = {"clip": clip, "prior": prior, "decoder": decoder, "upsampler_1": upsampler_1}
