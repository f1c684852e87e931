"""Emoji in four styles, from a caption to 64x64 pixels on two CPU cores, or to 256x256 on one GPU.

    dalle2 data emoji runs/emoji-data
    for stage in clip prior decoder upsampler_1; do
        python train.py --config configs/emoji.py:$stage --workdir runs/emoji
    done

| stage       | images               | minutes | `,large`, for one GPU      |
| ----------- | -------------------- | ------- | -------------------------- |
| clip        | 32x32, patches of 8  | 15      | 64x64, batch 1024          |
| prior       | embeddings           | 13      | 8 layers of width 512      |
| decoder     | 32x32, folded 2x2    | 90      | 64x64, attention at 16, 8  |
| upsampler_1 | 32 -> 64, folded 2x2 | 4       | 64 -> 256                  |

Minutes are those of two cores of an Intel Xeon (Sapphire Rapids), the decoder's in bfloat16, as docs/performance.md
describes, by the rate of a run of 9,500 steps. `ar_prior` (28) takes the place of the prior.

CLIP, the prior and the upsampler learn from all images, the decoder and `ar_prior` from two of Unicode's groups
(`GROUPS`), 1,096 images: of six groups, 3,879 images, the decoder draws colours and outlines after an hour, and little
that can be recognised.

The style is a part of the caption ("a red apple, noto emoji"). For the large form (`configs/emoji.py:decoder,large`)
make the data with `dalle2 data emoji runs/emoji-data-256 --resolution 256`; all stages of a system must be of one form.

`,distilled` trains a student of a trained stage, which is sampled in 4 evaluations without guidance:

    python train.py --config configs/emoji.py:decoder,distilled --workdir runs/emoji-fast \\
        --config.init_from=runs/emoji
"""

from ml_collections import ConfigDict

from dalle2_jax.config.page_defaults import CLEAN_IMAGE_DIFFUSION, distilled, for_gpu, machine_config, small_upsampler
from dalle2_jax.errors import choose

GROUPS = ("animals-nature", "food-drink")
"""Groups of emoji that the small decoder and the autoregressive prior learn."""


def get_config(which: str) -> ConfigDict:
    """Returns the config of one stage."""
    config = choose("config of configs/emoji.py", which, STAGES)()
    config.stage = which.partition(",")[0]
    return config


def common(total_steps: int, batch_size: int, lr: float, resolution: int) -> ConfigDict:
    """Returns what every stage shares."""
    data = {"kind": "folder", "path": "runs/emoji-data", "resolution": resolution, "crop": "center"}
    config = machine_config(total_steps, batch_size, data, {"vocab_size": 1024, "context_length": 24}, lr)
    config.optim.ema_decay = 0.999
    return config


def large(total_steps: int, batch_size: int, lr: float, resolution: int) -> ConfigDict:
    """Returns what the large stages share: images of up to 256 pixels, a GPU's batches."""
    config = for_gpu(common(total_steps, batch_size, lr, resolution))
    config.data.path = "runs/emoji-data-256"
    return config


def clip() -> ConfigDict:
    """A ViT of 16 patches and a text encoder of 3 layers."""
    config = common(2000, 128, 1e-3, resolution=32)
    config.data.crop = "shift"
    config.model = {
        "embed_dim": 128,
        "text": {"width": 96, "layers": 3, "heads": 4},
        "vision": {"kind": "vit", "image_size": 32, "patch_size": 8, "width": 128, "layers": 4, "heads": 4},
        "image_mean": (0.5, 0.5, 0.5),
        "image_std": (0.25, 0.25, 0.25),
    }
    config.embedding = {"normalisation": "unit", "scale": 6.1}  # 0.54 a dimension, as the paper's 17.2 at 1,024
    return config


def clip_large() -> ConfigDict:
    """A ViT of 64 patches and a text encoder of 6 layers."""
    config = large(6000, 1024, 5e-4, resolution=64)
    config.data.crop = "shift"
    config.model = {
        "embed_dim": 256,
        "text": {"width": 256, "layers": 6, "heads": 8},
        "vision": {"kind": "vit", "image_size": 64, "patch_size": 8, "width": 384, "layers": 8, "heads": 6},
        "image_mean": (0.5, 0.5, 0.5),
        "image_std": (0.25, 0.25, 0.25),
        "dtype": "bfloat16",
    }
    config.embedding = {"normalisation": "unit", "scale": 8.6}
    return config


def prior() -> ConfigDict:
    """4 layers of width 128; it predicts the embedding."""
    config = common(3000, 64, 1e-3, resolution=32)
    config.model = {"width": 128, "layers": 4, "heads": 4, "text_input": "tokens"}
    config.conditioning = {"drop_text": 0.1}
    config.diffusion = {"schedule": "cosine", "num_steps": 1000, "prediction": "x0"}
    config.sampling = {"name": "ddpm", "steps": 32, "clip_sample": None}
    return config


def prior_large() -> ConfigDict:
    """8 layers of width 512."""
    config = large(20_000, 512, 3e-4, resolution=64)
    config.model = {"width": 512, "layers": 8, "heads": 8, "text_input": "tokens", "dtype": "bfloat16"}
    config.conditioning = {"drop_text": 0.1}
    config.diffusion = {"schedule": "cosine", "num_steps": 1000, "prediction": "x0"}
    config.sampling = {"name": "ddpm", "steps": 64, "clip_sample": None}
    return config


def ar_prior() -> ConfigDict:
    """In place of the diffusion prior: sample with it by ``sample.py text2image --prior ar``.

    Muon and 3,000 steps: the first codes must be learned by heart from the caption, since the others follow them.
    """
    config = common(3000, 64, 2e-3, resolution=32)
    config.data.filters = {"equals": {"group": GROUPS}}
    config.optim.name = "muon"
    config.model = {
        "text": {"width": 96, "layers": 2, "heads": 4, "activation": "gelu"},
        "width": 128,
        "layers": 4,
        "heads": 4,
        "context_length": 50,
        "components": 48,
        "buckets": 64,
    }
    config.conditioning = {"drop_text": 0.1, "calibration_examples": 8192}
    config.sampling = {"guidance": 1.0, "dot_quantile": 0.5}
    return config


def decoder() -> ConfigDict:
    """A U-Net of three levels on the 16x16 grid; it predicts the image.

    Without ``input_skip`` no share of the noise reaches the output, so that backgrounds are plain.
    """
    config = common(12_000, 32, 2e-3, resolution=32)
    config.data.filters = {"equals": {"group": GROUPS}}
    config.optim.name = "muon"
    config.model = {
        "unet": {
            "image_size": 32,
            "patch_size": 2,
            "channels": 48,
            "channel_mult": (1, 1.5, 2),
            "num_res_blocks": 1,
            "attention_resolutions": (8, 4),
            "head_channels": 24,
            "norm_groups": 12,
            "resblock_updown": False,
            "context_dim": 96,
        },
        "image_tokens": 4,
        "text_input": "tokens",
        "text": {"width": 96, "layers": 2, "heads": 4, "activation": "gelu"},
    }
    config.conditioning = {"drop_image": 0.2, "drop_text": 0.2}
    config.diffusion = dict(CLEAN_IMAGE_DIFFUSION)
    config.sampling = {"name": "dpmpp_2m", "steps": "logsnr20", "guidance": 2.0, "clip_sample": 1.0}
    return config


def decoder_large() -> ConfigDict:
    """A U-Net of four levels on 64x64, with attention at 16 and 8."""
    config = large(40_000, 256, 2e-4, resolution=64)
    config.model = {
        "unet": {
            "image_size": 64,
            "channels": 128,
            "channel_mult": (1, 2, 3, 4),
            "num_res_blocks": 2,
            "attention_resolutions": (16, 8),
            "head_channels": 64,
            "dropout": 0.1,
            "context_dim": 256,
            "dtype": "bfloat16",
        },
        "image_tokens": 4,
        "text_input": "tokens",
        "text": {"width": 256, "layers": 6, "heads": 8, "activation": "gelu"},
    }
    config.conditioning = {"drop_image": 0.1, "drop_text": 0.3}
    config.diffusion = {"schedule": "cosine", "num_steps": 1000, "prediction": "v"}
    config.sampling = {"name": "dpmpp_2m", "steps": "logsnr20", "guidance": 2.0, "clip_sample": 1.0}
    return config


def upsampler_1() -> ConfigDict:
    """A U-Net of convolutions alone, on a 32x32 grid."""
    config = small_upsampler(common(3000, 16, 2e-3, resolution=64), channels=16)
    config.optim.name = "muon"
    return config


def upsampler_1_large() -> ConfigDict:
    """A U-Net of convolutions alone, of four levels."""
    config = large(20_000, 128, 2e-4, resolution=256)
    config.model = {
        "image_size": 256,
        "in_channels": 6,
        "channels": 96,
        "channel_mult": (1, 2, 3, 4),
        "num_res_blocks": 2,
        "attention_resolutions": (),
        "middle_attention": False,
        "dtype": "bfloat16",
    }
    config.conditioning = {"low_size": 64, "crop_fraction": 0.25}
    config.diffusion = {"schedule": "cosine", "num_steps": 1000, "prediction": "v"}
    config.sampling = {"name": "ddim", "steps": 27, "clip_sample": 1.0}
    return config


def decoder_inpaint() -> ConfigDict:
    """The decoder with the known pixels and their mask as input.

    It is sampled without guidance, which draws away from what the known pixels already say.
    """
    config = decoder()
    config.sampling.guidance = 1.0
    config.model.unet.in_channels = 7
    config.conditioning.inpaint = True
    return config


def upsampler_1_inpaint() -> ConfigDict:
    """The upsampler with the known pixels and their mask as input."""
    config = upsampler_1()
    config.model.in_channels = 10
    config.conditioning.inpaint = True
    return config


def decoder_distilled() -> ConfigDict:
    """The decoder in 4 evaluations, with its guidance in the weights."""
    config = distilled(decoder(), {"steps": "20", "guidance": 2.0}, "20/4", "runs/emoji", total_steps=8000)
    config.conditioning = {"drop_image": 0.05, "drop_text": 0.1}
    return config


def prior_distilled() -> ConfigDict:
    """The prior in 4 evaluations."""
    return distilled(prior(), {"steps": "20"}, "20/4", "runs/emoji", total_steps=3000)


def upsampler_1_distilled() -> ConfigDict:
    """The upsampler in 2 evaluations."""
    return distilled(upsampler_1(), {"steps": "8"}, "8/2", "runs/emoji", total_steps=2000)


STAGES = {
    "clip": clip,
    "prior": prior,
    "ar_prior": ar_prior,
    "decoder": decoder,
    "upsampler_1": upsampler_1,
    "clip,inpaint": clip,
    "prior,inpaint": prior,
    "decoder,inpaint": decoder_inpaint,
    "upsampler_1,inpaint": upsampler_1_inpaint,
    "clip,distilled": clip,
    "prior,distilled": prior_distilled,
    "decoder,distilled": decoder_distilled,
    "upsampler_1,distilled": upsampler_1_distilled,
    "clip,large": clip_large,
    "prior,large": prior_large,
    "decoder,large": decoder_large,
    "upsampler_1,large": upsampler_1_large,
}
