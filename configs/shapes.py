"""The embedded data set of captioned shapes: the whole cascade on two CPU cores, or one GPU.

    for stage in clip prior decoder upsampler_1; do
        python train.py --config configs/shapes.py:$stage --workdir runs/demo
    done

| stage                | images               | on two CPU cores | `,large`, for one GPU                 |
| -------------------- | -------------------- | ---------------- | ------------------------------------- |
| clip                 | 32x32, patches of 8  | 2 minutes        | 64x64, one or two objects, batch 1024 |
| prior (or ar_prior)  | embeddings           | 1 (6) minutes    | 8 layers of width 512                 |
| decoder              | 32x32, folded 2x2    | 8 minutes        | 64x64, 90 M parameters                |
| upsampler_1          | 32 -> 64, folded 2x2 | 1 minute         | 64 -> 256                             |

The small system's images are right in every attribute for 96.3 % [94.3, 97.6] of 512 captions of split `val`, with
combinations of colour, shape and size that no training caption names, and for 98.6 % [97.2, 99.3] of 512 with pairs of
colour and shape that none names; in brackets the 95 % intervals. With a prior of 1,300 steps and a decoder of 2,400 it
was 99.2 % [98.0, 99.7] and 99.8 % [98.9, 100.0].

A third of the images have any colours, which their captions leave out: with eight colours alone CLIP's image encoder
learns each shape in each colour, and takes an unseen pair for another shape (a linear probe reads the shape of `val` in
64 %, with any colours in 96 %).

The small stages learn from many small batches: at this size the number of steps counts, not their precision. CLIP,
prior and decoder are trained by Muon, which needs about half of AdamW's steps. Diffusion stages predict x_0, which a
narrow network learns within the first hundred steps; the noise eps would have to pass through it pixel by pixel.

Add `,large` to a stage's name for its large form (`configs/shapes.py:decoder,large`), and `,adamw` for that of the
included system, which takes 27 minutes; all stages of a system must be of one form. `,two` is trained on scenes of one
or two objects: its CLIP tells which object has what ("Binding" in docs/howto/evaluation.md), its decoder does not draw
two objects reliably yet.

`,distilled` trains a student of a trained stage, which is sampled in 4 evaluations:

    python train.py --config configs/shapes.py:decoder,distilled --workdir runs/demo-fast --config.init_from=runs/demo
"""

from collections.abc import Iterator

from ml_collections import ConfigDict

from dalle2_jax.config.page_defaults import CLEAN_IMAGE_DIFFUSION, distilled, for_gpu, machine_config, small_upsampler
from dalle2_jax.errors import choose


def get_config(which: str) -> ConfigDict:
    """Returns the config of one stage."""
    config = choose("config of configs/shapes.py", which, STAGES)()
    config.stage = which.partition(",")[0]
    return config


def sweep(which: str) -> Iterator[dict]:
    """Yields what ``dalle2 sweep`` varies, in runs of a quarter of the steps."""
    config = get_config(which)
    short = {"total_steps": config.total_steps // 4, "optim.warmup_steps": config.optim.warmup_steps // 4}
    for scale in (0.5, 1.0, 2.0):
        yield {"optim.lr": scale * config.optim.lr, **short}
    if config.stage == "decoder":
        yield {"diffusion.prediction": "v", **short}
        yield {"diffusion.prediction": "eps", "diffusion.weighting": "none", **short}


def common(total_steps: int, batch_size: int, lr: float, resolution: int) -> ConfigDict:
    """Returns what every stage shares."""
    data = {"kind": "shapes", "resolution": resolution, "max_objects": 1, "jitter": 0.04, "unnamed_colours": 0.35}
    return machine_config(total_steps, batch_size, data, {"vocab_size": 512, "context_length": 16}, lr)


def by_muon(total_steps: int, batch_size: int, lr: float) -> ConfigDict:
    """Returns what the small stages share that Muon trains, on images of 32x32 pixels."""
    config = common(total_steps, batch_size, lr, resolution=32)
    config.optim.name = "muon"
    return config


def large(total_steps: int, batch_size: int, lr: float, resolution: int) -> ConfigDict:
    """Returns what the large stages share: two objects, longer captions, a GPU's batches."""
    config = for_gpu(common(total_steps, batch_size, lr, resolution))
    config.data.update(max_objects=2, jitter=0.2)
    config.text.context_length = 24
    return config


def clip() -> ConfigDict:
    """A ViT of 16 patches and a text encoder of 3 layers."""
    config = by_muon(500, 256, 1.5e-3)
    config.model = {
        "embed_dim": 64,
        "text": {"width": 64, "layers": 3, "heads": 4},
        "vision": {"kind": "vit", "image_size": 32, "patch_size": 8, "width": 64, "layers": 4, "heads": 4},
        "image_mean": (0.5, 0.5, 0.5),
        "image_std": (0.25, 0.25, 0.25),
    }
    config.embedding = {"normalisation": "unit", "scale": 4.3}  # 0.54 a dimension, as the paper's 17.2 at 1,024
    return config


def clip_large() -> ConfigDict:
    """A ViT of 64 patches and a text encoder of 6 layers."""
    config = large(6000, 1024, 5e-4, resolution=64)
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
    """3 layers of width 96; it predicts the embedding."""
    config = by_muon(1000, 64, 1e-3)
    config.model = {"width": 96, "layers": 3, "heads": 4, "text_input": "tokens"}
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


def decoder() -> ConfigDict:
    """A U-Net of three levels on the 16x16 grid; it predicts the image.

    Without ``input_skip`` no share of the noise reaches the output, so that backgrounds are plain. It always has the
    image embedding: to draw from a caption alone would take most of a short training ("Choices in training" in
    docs/paper.md). It is sampled without guidance, which these captions do not need and which blurs edges (figure 9
    there).
    """
    config = by_muon(2100, 32, 2e-3)
    config.model = {
        "unet": {
            "image_size": 32,
            "patch_size": 2,
            "channels": 32,
            "channel_mult": (1, 1.5, 2),
            "num_res_blocks": 1,
            "attention_resolutions": (8, 4),
            "head_channels": 16,
            "norm_groups": 8,
            "resblock_updown": False,
            "context_dim": 64,
        },
        "image_tokens": 4,
        "text_input": "clip",
        "text_emb_proj": True,
    }
    config.conditioning = {"drop_image": 0.0, "drop_text": 0.1}
    config.diffusion = dict(CLEAN_IMAGE_DIFFUSION)
    config.sampling = {"name": "dpmpp_2m", "steps": "logsnr15", "guidance": 1.0, "clip_sample": 1.0}
    return config


def decoder_large() -> ConfigDict:
    """A U-Net of four levels on 64x64, with attention at 16 and 8."""
    config = large(30_000, 256, 2e-4, resolution=64)
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
    config.conditioning = {"drop_image": 0.1, "drop_text": 0.5}
    config.diffusion = {"schedule": "cosine", "num_steps": 1000, "prediction": "eps"}
    config.sampling = {"name": "ddim", "steps": 50, "guidance": 2.0}
    return config


def upsampler_1() -> ConfigDict:
    """A U-Net of convolutions alone, on a 32x32 grid."""
    return small_upsampler(common(1500, 16, 3e-3, resolution=64), channels=16)


def by_adamw(config: ConfigDict, total_steps: int) -> ConfigDict:
    """Returns the config of a stage of Muon changed for AdamW, which needs more steps."""
    config.total_steps = total_steps
    config.optim.update(name="adamw", warmup_steps=total_steps // 20)
    return config


def clip_adamw() -> ConfigDict:
    """CLIP of the included system."""
    return by_adamw(clip(), 1000)


def prior_adamw() -> ConfigDict:
    """The prior of the included system."""
    return by_adamw(prior(), 2000)


def decoder_adamw() -> ConfigDict:
    """The first decoder of the included system. Without the image embedding in half of the examples, it also learns to
    draw from a caption alone.
    """
    config = by_adamw(decoder(), 4000)
    config.conditioning.drop_image = 0.5
    return config


def with_two_objects(config: ConfigDict, total_steps: int, **data: bool) -> ConfigDict:
    """Returns the config of a small stage changed for scenes of one or two objects, which need more steps."""
    config.data.update(max_objects=2, **data)
    config.text.context_length = 24
    config.total_steps, config.optim.warmup_steps = total_steps, total_steps // 40
    return config


def clip_two() -> ConfigDict:
    """CLIP on one or two objects. Its batches hold scenes that differ in what belongs to what."""
    config = with_two_objects(clip(), 4000, hard_negatives=True)
    config.model.embed_dim, config.model.text.layers = 96, 4
    config.embedding.scale = 5.3
    return config


def prior_two() -> ConfigDict:
    """The prior on one or two objects."""
    return with_two_objects(prior(), 3000)


def decoder_two() -> ConfigDict:
    """The decoder on one or two objects. Without the image embedding in a fifth of the examples, it also learns to draw
    from a caption alone.
    """
    config = with_two_objects(decoder(), 8000)
    config.conditioning.drop_image = 0.2
    config.optim.ema_decay = 0.998
    return config


def upsampler_1_two() -> ConfigDict:
    """The upsampler on one or two objects."""
    config = with_two_objects(upsampler_1(), 5000)
    config.batch_size = 32
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
    config.diffusion = {"schedule": "cosine", "num_steps": 1000, "prediction": "eps"}
    config.sampling = {"name": "ddim", "steps": 27}
    return config


def ar_prior() -> ConfigDict:
    """In place of the diffusion prior: sample with it by ``sample.py text2image --prior ar``."""
    config = common(1000, 128, 1e-3, resolution=32)
    config.model = {
        "text": {"width": 64, "layers": 2, "heads": 4, "activation": "gelu"},
        "width": 96,
        "layers": 3,
        "heads": 4,
        "context_length": 34,
        "components": 32,
        "buckets": 64,
    }
    config.conditioning = {"drop_text": 0.1, "calibration_examples": 8192}
    config.sampling = {"guidance": 1.0, "dot_quantile": 0.5}
    return config


def decoder_inpaint() -> ConfigDict:
    """The decoder with the known pixels and their mask as input."""
    config = decoder_adamw()
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
    """The decoder in 4 evaluations."""
    config = distilled(decoder_adamw(), {"steps": "20"}, "20/4", "runs/demo", total_steps=2500)
    config.conditioning = {"drop_image": 0.05, "drop_text": 0.1}
    return config


def prior_distilled() -> ConfigDict:
    """The prior in 4 evaluations."""
    return distilled(prior_adamw(), {"steps": "20"}, "20/4", "runs/demo", total_steps=1000)


def upsampler_1_distilled() -> ConfigDict:
    """The upsampler in 2 evaluations."""
    return distilled(upsampler_1(), {"steps": "8"}, "8/2", "runs/demo", total_steps=600)


STAGES = {
    "clip": clip,
    "prior": prior,
    "decoder": decoder,
    "upsampler_1": upsampler_1,
    "ar_prior": ar_prior,
    "clip,adamw": clip_adamw,
    "prior,adamw": prior_adamw,
    "decoder,adamw": decoder_adamw,
    "upsampler_1,adamw": upsampler_1,
    "clip,two": clip_two,
    "prior,two": prior_two,
    "decoder,two": decoder_two,
    "upsampler_1,two": upsampler_1_two,
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
