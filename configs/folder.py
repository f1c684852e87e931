"""Any folder of captioned images; the numbers are for the handwritten digits, on two CPU cores.

    dalle2 data digits runs/digits-data
    for stage in clip prior decoder; do
        python train.py --config configs/folder.py:$stage --workdir runs/digits --config.data.path=runs/digits-data
    done

1,797 real scans, 10 classes, 32x32 images on an 8x8 grid of 4x4 pixels. For your own
images: the same commands with your folder, a larger --config.data.resolution and
--config.model.unet.image_size, more channels and more steps.
"""

from ml_collections import ConfigDict

from dalle2_jax.config.page_defaults import machine_config
from dalle2_jax.errors import choose


def get_config(which: str) -> ConfigDict:
    """Returns the config of one stage."""
    config = choose("config of configs/folder.py", which, STAGES)()
    config.stage = which
    return config


def common(total_steps: int, batch_size: int, lr: float) -> ConfigDict:
    """Returns what every stage shares."""
    data = {"kind": "folder", "path": "", "resolution": 32, "crop": "center"}
    return machine_config(total_steps, batch_size, data, {"vocab_size": 320, "context_length": 16}, lr)


def clip() -> ConfigDict:
    """A ViT of 16 patches and a text encoder of 2 layers."""
    config = common(400, 64, 1e-3)
    config.model = {
        "embed_dim": 64,
        "text": {"width": 64, "layers": 2, "heads": 4},
        "vision": {"kind": "vit", "image_size": 32, "patch_size": 8, "width": 96, "layers": 4, "heads": 4},
        "image_mean": (0.5, 0.5, 0.5),
        "image_std": (0.25, 0.25, 0.25),
    }
    config.embedding = {"normalisation": "unit", "scale": 4.3}  # 0.54 a dimension, as the paper's 17.2 at 1,024
    return config


def prior() -> ConfigDict:
    """4 layers of width 128; it predicts the embedding."""
    config = common(1000, 64, 1e-3)
    config.model = {"width": 128, "layers": 4, "heads": 4, "text_input": "tokens"}
    config.conditioning = {"drop_text": 0.1}
    config.diffusion = {"schedule": "cosine", "num_steps": 1000, "prediction": "x0"}
    config.sampling = {"name": "ddpm", "steps": 32, "clip_sample": None}
    return config


def decoder() -> ConfigDict:
    """A U-Net on the 8x8 grid; it predicts the image."""
    config = common(4000, 16, 1.5e-3)
    config.model = {
        "unet": {
            "image_size": 32,
            "patch_size": 4,
            "channels": 64,
            "channel_mult": (1, 2),
            "num_res_blocks": 1,
            "attention_resolutions": (8, 4),
            "head_channels": 32,
            "norm_groups": 16,
            "context_dim": 64,
            "input_skip": True,
        },
        "image_tokens": 4,
        "text_input": "tokens",
        "text": {"width": 64, "layers": 2, "heads": 4, "activation": "gelu"},
    }
    config.conditioning = {"drop_image": 0.1, "drop_text": 0.5}
    config.diffusion = {"schedule": "cosine", "num_steps": 1000, "prediction": "x0", "weighting": "snr"}
    config.sampling = {"name": "ddim", "steps": 25, "guidance": 2.0}
    return config


STAGES = {"clip": clip, "prior": prior, "decoder": decoder}
