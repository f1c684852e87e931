"""The config pages of configs/ with tiny networks and short runs, for commands of the documentation."""

import functools
import importlib.util
import pathlib

import tiny_system

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"

PAGE = """\
import tiny_pages

get_config = tiny_pages.tiny({name!r})
sweep = tiny_pages.sweep
"""

UNET = {"channels": 8, "channel_mult": (1, 2), "norm_groups": 4}
EXPORTABLE = {
    # stage: fields of the smallest networks that can be exported
    "clip": {"model.text.layers": 1, "model.vision.layers": 1, "model.vision.image_size": 16},
    "prior": {"model.layers": 1, "model.width": 32, "conditioning.calibration_examples": 4},
    "decoder": {
        **{f"model.unet.{field}": value for field, value in UNET.items()},
        "model.unet.image_size": 16,
        "model.unet.context_dim": 16,
        "model.unet.attention_resolutions": (8,),
        "model.unet.head_channels": 8,
    },
    "upsampler_1": {
        **{f"model.{field}": value for field, value in UNET.items()},
        "model.image_size": 32,
        "conditioning.low_size": 16,
    },
}

UPSAMPLERS = ("upsampler_1", "upsampler_2")


def write(folder):
    """Writes a tiny page for each page of configs/, under the same name."""
    folder.mkdir(exist_ok=True)
    (folder / "__init__.py").write_text("")
    for page in CONFIGS.glob("*.py"):
        (folder / page.name).write_text(PAGE.format(name=page.stem))


@functools.cache
def page(name):
    """Returns a page of configs/ as a module."""
    spec = importlib.util.spec_from_file_location(f"page_{name}", CONFIGS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tiny(name):
    """Returns the function ``get_config`` of a tiny page."""

    def get_config(which):
        config = page(name).get_config(which)
        config.update(total_steps=2, batch_size=8, log_every=1, checkpoint_every=2, workers=0, sample_every=0)
        config.optim.warmup_steps = 0
        config.optim.name = "adamw"  # Muon's programs take twice as long to compile; tests/training trains with it
        config.mesh = {"data": -1, "fsdp": 1, "tensor": 1}
        if name == "karlo":  # its networks are those of the imported system
            config.data.resolution = 32
            return config
        if name == "shapes_diffusers":  # other networks than its own cannot be exported
            config.data.resolution = 32 if config.stage == "upsampler_1" else 16
            config.update_from_flattened_dict(EXPORTABLE[config.stage])
            return config
        stage = "upsampler_1" if config.stage in UPSAMPLERS else config.stage
        small = tiny_system.get_config(stage)
        config.data.resolution = small.data.resolution
        if config.data.kind == "shapes":
            config.data.update(num_examples=64, max_objects=1)
        channels = config.model.get("unet", config.model).get("out_channels", 3)
        config.model = small.model
        if stage in ("decoder", "upsampler_1"):
            config.model.get("unet", config.model)["out_channels"] = channels
        if stage == "upsampler_1":
            config.conditioning.low_size = small.conditioning.low_size
        if stage == "clip":
            config.embedding = small.embedding
        if "text" in config:
            config.text = small.text
        if "calibration_examples" in config.get("conditioning", {}):
            config.conditioning.calibration_examples = 64
        if config.get("sampling", {}).get("name") == "ddim" and "teacher" not in config:
            config.sampling.steps = 8
        return config

    return get_config


def sweep(which):
    """Yields one short run."""
    yield {"total_steps": 1}
