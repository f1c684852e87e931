"""What config pages share: the run, data, text and mesh sections for one machine and for a pod.

Pages import this module from the package, so that a page also works where it was copied to (``dalle2 init``).
"""

from collections.abc import Mapping
from typing import Any, cast

from ml_collections import ConfigDict

Section = Mapping[str, Any]

CLEAN_IMAGE_DIFFUSION: Section = {
    "schedule": "cosine",
    "num_steps": 1000,
    "prediction": "x0",
    "weighting": "snr",
    "max_weight": 5.0,
}
"""Section ``diffusion`` of small networks of images: x_0, weighted by the signal-to-noise ratio up to a bound, so that
the last steps of sampling do not take all of a short training."""


def machine_config(total_steps: int, batch_size: int, data: Section, text: Section, lr: float) -> ConfigDict:
    """Returns a training config for one machine: a laptop's CPU, or one GPU (`for_gpu`).

    Args:
      total_steps: of the run; the first twentieth of them is warm-up.
      batch_size: of all devices.
      data: the section ``data``.
      text: the section ``text``.
      lr: peak learning rate; cosine decay to zero follows.
    """
    return ConfigDict(
        {
            "seed": 0,
            "total_steps": total_steps,
            "batch_size": batch_size,
            "log_every": 50,
            "checkpoint_every": 500,
            "keep_checkpoints": 2,
            "sample_every": 0,
            "workers": 0,
            "data": dict(data),
            "text": dict(text),
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


def for_gpu(config: ConfigDict) -> ConfigDict:
    """Returns a config of `machine_config` changed for the longer runs of one GPU, with samples and data workers."""
    config.update(log_every=100, checkpoint_every=1000, sample_every=2000, workers=8)
    cast(ConfigDict, config.optim).update(warmup_steps=500, ema_decay=0.9995)
    return config


def small_upsampler(config: ConfigDict, channels: int) -> ConfigDict:
    """Returns a config of `machine_config` with the other sections of an upsampler from 32x32 to 64x64 pixels.

    Args:
      config: of a run.
      channels: of the U-Net of convolutions alone, at its first level, a grid of 32x32.
    """
    config.model = {
        "image_size": 64,
        "in_channels": 6,
        "patch_size": 2,
        "channels": channels,
        "channel_mult": (1, 2),
        "num_res_blocks": 1,
        "attention_resolutions": (),
        "middle_attention": False,
        "norm_groups": 8,
        "scale_shift": False,
    }
    config.conditioning = {"low_size": 32, "crop_fraction": 0.5}
    config.diffusion = dict(CLEAN_IMAGE_DIFFUSION)
    config.sampling = {"name": "ddim", "steps": 8, "clip_sample": 1.0}
    return config


def distilled(config: ConfigDict, teacher: Section, steps: str, init_from: str, total_steps: int) -> ConfigDict:
    """Returns the config of a diffusion stage changed for a student of it.

    Args:
      config: of the stage.
      teacher: how the teacher is sampled: the fields of the section ``teacher`` other than its sampler. Its steps are
        a string, so that the command line may give a number or a spacing.
      steps: of the student, a part of the teacher's: "20/4" are 4 of the 20 steps.
      init_from: the system of the teacher.
      total_steps: of the run.
    """
    sampling = cast(ConfigDict, config.sampling)
    clip = {"clip_sample": sampling.clip_sample} if "clip_sample" in sampling else {}
    config.update(init_from=init_from, total_steps=total_steps)
    config.teacher = {"name": "ddim", **clip, **teacher}
    config.sampling = {"name": "ddim", "steps": steps, **clip}
    optim = cast(ConfigDict, config.optim)
    optim.update(lr=0.5 * cast(float, optim.lr), warmup_steps=total_steps // 20)
    return config


def pod_config(
    total_steps: int, batch_size: int, resolution: int, text: Section, optim: Section, crop: str = "random"
) -> ConfigDict:
    """Returns a training config for a pod: parameters are sharded over all devices, data come from a folder.

    Args:
      total_steps: of the run.
      batch_size: of all devices.
      resolution: side of the training images.
      text: the section ``text``.
      optim: the section ``optim``.
      crop: how training images are cropped, "random" or "center".
    """
    return ConfigDict(
        {
            "seed": 0,
            "total_steps": total_steps,
            "batch_size": batch_size,
            "log_every": 100,
            "checkpoint_every": 5000,
            "keep_checkpoints": 3,
            "sample_every": 10_000,
            "workers": 16,
            "data": {"kind": "folder", "path": "", "resolution": resolution, "crop": crop},
            "text": dict(text),
            "optim": dict(optim),
            "mesh": {"data": 1, "fsdp": -1, "tensor": 1},
        }
    )
