"""ADM on ImageNet, class-conditional: Dhariwal & Nichol 2021 (arXiv 2105.05233), Tables 11 and 13.

    for stage in decoder upsampler_1; do
        python train.py --config configs/adm.py:$stage --workdir runs/adm --multihost --config.data.path=IMAGENET
    done

A class stands where other decoders have a caption: the captions of the data are the classes' numbers, 0 to 999, and
``sample.py text2image --prompt 207`` samples class 207. Any other prompt is no class and is conditioned on the mean of
all classes, so "upsampler_1" also works after a decoder with other conditioning.

|                     | decoder     | decoder,256 | upsampler_1 |
| ------------------- | ----------- | ----------- | ----------- |
| parameters          | 295,904,454 | 553,838,086 | 311,795,910 |
| image size          | 64          | 256         | 64 -> 256   |
| channels            | 192         | 256         | 192         |
| channel multiples   | 1,2,3,4     | 1,1,2,2,4,4 | 1,1,2,2,4,4 |
| res blocks          | 3           | 2           | 2           |
| heads               | 64 channels | 64 channels | 4           |
| attention at        | 32,16,8     | 32,16,8     | 32,16,8     |
| noise schedule      | cosine      | linear      | linear      |
| dropout             | 0.1         | 0           | 0           |
| batch size          | 2048        | 256         | 256         |
| iterations          | 540K        | 1980K       | 500K        |
| learning rate       | 3e-4        | 1e-4        | 1e-4        |
| sampling steps      | 250         | 250         | 250         |
"""

from ml_collections import ConfigDict

from dalle2_jax.config.page_defaults import pod_config
from dalle2_jax.errors import choose


def get_config(which: str) -> ConfigDict:
    """Returns the config of one stage."""
    config = choose("config of configs/adm.py", which, STAGES)()
    config.stage = which.partition(",")[0]
    return config


def common(total_steps: int, batch_size: int, lr: float, schedule: str, **unet) -> ConfigDict:
    """Returns what every stage shares."""
    text = {"kind": "labels", "vocab_size": 1000, "context_length": 1}
    optim = {"lr": lr, "clip_norm": 0.0, "ema_decay": 0.9999}
    config = pod_config(total_steps, batch_size, unet["image_size"], text, optim, crop="center")
    shared = {"out_channels": 6, "attention_resolutions": (32, 16, 8), "remat": "blocks", "dtype": "bfloat16"}
    config.model = {"unet": {**shared, **unet}, "image_emb_dim": None, "text_input": "label"}
    config.conditioning = {"drop_text": 0.0}
    config.diffusion = {
        "schedule": schedule,
        "num_steps": 1000,
        "prediction": "eps",
        "variance": "learned_range",
        "loss": "hybrid",
    }
    config.sampling = {"name": "ddpm", "steps": 250}
    return config


def decoder() -> ConfigDict:
    """Classes to 64x64 images."""
    shape = {"image_size": 64, "channels": 192, "channel_mult": (1, 2, 3, 4), "num_res_blocks": 3, "dropout": 0.1}
    return common(540_000, 2048, 3e-4, "cosine", **shape)


def decoder_256() -> ConfigDict:
    """Classes to 256x256 images in one stage."""
    shape = {"image_size": 256, "channels": 256, "channel_mult": (1, 1, 2, 2, 4, 4), "num_res_blocks": 2}
    return common(1_980_000, 256, 1e-4, "linear", **shape)


def upsampler_1() -> ConfigDict:
    """64 -> 256."""
    shape = {"image_size": 256, "channels": 192, "channel_mult": (1, 1, 2, 2, 4, 4), "num_res_blocks": 2}
    config = common(500_000, 256, 1e-4, "linear", in_channels=6, num_heads=4, **shape)
    config.conditioning = {
        "low_size": 64,
        "crop_fraction": 1.0,
        "blur_rate": 0.0,
        "upscale": "linear",
        "drop_text": 0.0,
    }
    return config


STAGES = {"decoder": decoder, "decoder,256": decoder_256, "upsampler_1": upsampler_1}
