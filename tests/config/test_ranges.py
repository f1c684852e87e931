"""Every number in a config has a range, which ``expand`` enforces: no size, rate or share is accepted in silence."""

import dataclasses
import math
import typing
from collections.abc import Iterator, Mapping
from typing import Annotated

import pytest
import tiny_system
from raised import mentions

from dalle2_jax import data, stages, text
from dalle2_jax.config.experiment import Experiment
from dalle2_jax.config.parse import VISION, expand, expand_file
from dalle2_jax.config.sections import TokenizerConfig
from dalle2_jax.config.sources import PythonDataConfig
from dalle2_jax.errors import ConfigError, UsageError, UserError
from dalle2_jax.models import clip, decoder, multi_query, transformer, unet
from dalle2_jax.models.priors import ar_prior, laion_prior, prior
from dalle2_jax.ranges import AnyFloat, PositiveInt, Range, alternatives
from dalle2_jax.system import load
from dalle2_jax.training.loop import RunConfig
from dalle2_jax.training.optim import OptimConfig
from dalle2_jax.training.sharding import MeshConfig, make_mesh
from dalle2_jax.workdir.folder import StageFolder

CONFIGS = (
    *(RunConfig, OptimConfig, MeshConfig, TokenizerConfig, PythonDataConfig),
    *(clip.ClipConfig, transformer.TextConfig, transformer.TransformerConfig, prior.PriorConfig, unet.UNetConfig),
    *(laion_prior.LaionPriorConfig, multi_query.MultiQueryConfig, ar_prior.ArPriorConfig, decoder.DecoderConfig),
    *(stages.ArSamplingConfig, stages.ArPriorStage, stages.DiffusionConfig, stages.SamplingConfig),
    *(stages.PriorStage, stages.DecoderStage, stages.UpsamplerStage, stages.EmbeddingConfig),
    *(stages.LoraConfig, stages.EmbeddingContract, stages.ContrastiveConfig),
    *VISION.values(),
    *data.KINDS.values(),
)
"""The dataclasses that config sections become; those nested in them are found by `reachable`."""


def parts(hint: object) -> Iterator[tuple[object, Range | None]]:
    """Yields the simple types of a hint, with their ranges: alternatives, items of tuples, values of mappings."""
    for option, within in alternatives(hint):
        if typing.get_origin(option) in (tuple, Mapping):
            for item in typing.get_args(option):
                yield from parts(item)
        else:
            yield option, within


def reachable(cls: type, seen: set[type]) -> set[type]:
    """Returns a dataclass and those that its fields may hold."""
    if cls not in seen:
        seen.add(cls)
        for hint in typing.get_type_hints(cls, include_extras=True).values():
            for option, _ in parts(hint):
                if dataclasses.is_dataclass(option):
                    reachable(option, seen)
    return seen


def unranged(cls: type) -> list[str]:
    """Returns the fields of a dataclass that hold numbers without a range."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return [
        f"{cls.__module__}.{cls.__name__}.{field.name}"
        for field in dataclasses.fields(cls)
        if any(option in (int, float) and within is None for option, within in parts(hints[field.name]))
    ]


def test_every_number_of_a_config_has_a_range():
    classes = set().union(*(reachable(cls, set()) for cls in CONFIGS))
    assert data.MixtureConfig in classes and len(classes) > 30
    assert not sorted(field for cls in classes for field in unranged(cls))


@pytest.mark.parametrize(
    "hint",
    [int, float, int | None, int | str, tuple[float, ...], tuple[PositiveInt, int], Mapping[str, float] | tuple],
)
def test_a_number_without_a_range_is_found(hint):
    planted = dataclasses.make_dataclass("Planted", [("sound", PositiveInt), ("field", hint)])
    assert [name.rpartition(".")[2] for name in unranged(planted)] == ["field"]
    outer = dataclasses.make_dataclass("Outer", [("inner", planted | None)])
    assert planted in reachable(outer, set())


@dataclasses.dataclass(frozen=True)
class Numbers:
    """A field of every form that a number has in a config."""

    count: PositiveInt = 1
    rate: Annotated[float, Range(0, 1, exclusive_max=True)] = 0.5
    maybe: PositiveInt | None = None
    steps: PositiveInt | str = 5
    sides: tuple[PositiveInt, ...] = ()
    factors: tuple[Annotated[int | float, Range(0, exclusive_min=True)], ...] = ()
    pair: tuple[AnyFloat, AnyFloat] = (0.0, 1.0)
    weights: Mapping[str, Annotated[float, Range(0)]] | tuple = ()
    axis: Annotated[int, Range(1, 8, also=(-1,))] = -1


@pytest.mark.parametrize(
    ("field", "value", "taken"),
    [
        *[("count", 2**31 - 1, 2**31 - 1), ("rate", 0, 0.0), ("maybe", None, None), ("steps", "fast27", "fast27")],
        *[("sides", [1, 2], (1, 2)), ("factors", [1, 0.5], (1, 0.5)), ("pair", [-1, 2], (-1.0, 2.0))],
        *[("weights", {"a": 0}, {"a": 0.0}), ("weights", [], ()), ("axis", -1, -1), ("axis", 8, 8)],
    ],
)
def test_numbers_within_their_range_are_taken(field, value, taken):
    found = getattr(expand(Numbers, {field: value}, "here"), field)
    assert found == taken and repr(found) == repr(taken)


@pytest.mark.parametrize(
    ("field", "value", "named", "facts"),
    [
        ("count", 0, "count", [1, 2147483647, 0]),
        ("count", 2**31, "count", [2147483647, 2**31]),
        ("count", 10**5000, "count", [2147483647, "very large int"]),
        ("rate", 1, "rate", [0, "below 1", 1.0]),
        ("rate", -1e-9, "rate", ["below 1", -1e-9]),
        ("rate", math.nan, "rate", [0, "below 1", "nan"]),
        ("rate", 10**400, "rate", ["below 1", "inf"]),
        ("maybe", 0, "maybe", [1, 0]),
        ("steps", 0, "steps", [1, 0]),
        ("sides", [4, 0], "sides[1]", [1, 0]),
        ("sides", [4, "8"], "sides[1]", ["int", "'8'"]),
        ("sides", [True], "sides[0]", ["int", True]),
        ("factors", [0.0], "factors[0]", ["above 0", 0.0]),
        ("factors", [math.inf], "factors[0]", ["above 0", "inf"]),
        ("pair", [0.0, math.nan], "pair[1]", ["finite", "nan"]),
        ("pair", [0.0], "pair", ["2 values"]),
        ("weights", {"a": -1.0}, "weights.a", [0, -1.0]),
        ("weights", {"a": "1"}, "weights.a", ["float", "'1'"]),
        ("axis", 0, "axis", ["1 to 8", -1, 0]),
        ("axis", "x" * 10_000, "axis", ["int"]),
    ],
    ids=lambda value: value if isinstance(value, str) and len(value) < 20 else "",
)
def test_expand_rejects_numbers_out_of_range(field, value, named, facts):
    with pytest.raises(ConfigError, check=mentions(*facts, field=f"here.{named}")) as caught:
        expand(Numbers, {field: value}, "here")
    assert len(str(caught.value)) < 250


def test_a_file_with_a_number_out_of_range_is_named(tmp_path):
    with pytest.raises(UserError, check=mentions(f"{tmp_path}/numbers.json.count", -1)) as caught:
        expand_file(Numbers, {"count": -1}, tmp_path / "numbers.json")
    assert not isinstance(caught.value, UsageError)


# --- every number of a whole stage ----------------------------------------------------------------

STRUCTURAL = {
    # a field of a stage's config -> values within its range that do not fit the rest
    "clip": {
        "model.text.heads": [3],
        "model.vision.patch_size": [3, 16],
        "model.vision.heads": [3],
        "model.text.mlp_ratio": [0.01],
        "model.vision": [{"kind": "resnet", "layers": ()}, {"kind": "resnet", "layers": (1,) * 20}],
    },
    "prior": {"model.heads": [3], "diffusion.resolution_shift": [0], "conditioning.drop_text": [1.5]},
    "ar_prior": {"model.components": [9], "model.context_length": [2], "conditioning.calibration_examples": [2]},
    "decoder": {
        "model.unet.channel_mult": [(), (0.01,), (1,) * 20, (0.3,), (-1,), (float("nan"),)],
        "model.unet.norm_groups": [3, 0],
        "model.unet.image_size": [7, 0],
        "model.unet.patch_size": [3],
        "model.unet.num_res_blocks": [0],
        "model.unet.dropout": [1.0],
        "sampling.temperature": [-0.5],
        "sampling.guidance_interval": [(0.9, 0.1), (0.1,), (0.0, 2.0)],
        "sampling.guidance_rescale": [1.5],
    },
    "upsampler_1": {
        "conditioning.low_size": [5, 0],
        "conditioning.crop_fraction": [0.3, 0, 1.5],
        "conditioning.blur_sigma": [0],
        "conditioning.sample_noise": [0.5],
    },
}


@pytest.fixture(scope="module")
def clip_stage():
    return Experiment.from_config(tiny_system.get_config("clip").to_dict()).build(300, None)


@pytest.mark.parametrize(
    ("which", "field", "value"),
    [
        (which, field, value)
        for which, fields in STRUCTURAL.items()
        for field, values in fields.items()
        for value in values
    ],
    ids=str,
)
def test_a_stage_that_cannot_be_built_is_a_usage_error(which, field, value, clip_stage):
    config = tiny_system.get_config(which).to_dict()
    *sections, name = field.split(".")
    section = config
    for part in sections:
        section = section[part]
    section[name] = value
    with pytest.raises(UsageError) as caught:
        Experiment.from_config(config).build(300, clip_stage)
    assert str(caught.value).startswith(f"config.{sections[0]}") and name.split("_")[0] in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[("lr", value) for value in (-1.0, 0.0, float("nan"), float("inf"))],
        *[("warmup_steps", -1), ("ema_decay", 1.0), ("ema_decay", -0.1), ("beta1", 1.0), ("beta2", -0.1)],
        *[("clip_norm", -1.0), ("weight_decay", -1.0), ("eps", -1e-8)],
    ],
)
def test_an_optimizer_out_of_range_is_a_usage_error(field, value):
    with pytest.raises(ConfigError, check=mentions(value, field=f"optim.{field}")):
        expand(OptimConfig, {field: value}, "optim")
    assert expand(OptimConfig, {"clip_norm": 0}, "optim").clip_norm == 0  # off


@pytest.mark.parametrize("steps", ["x", "200", "t:5,3", 200])
def test_a_respacing_is_checked_before_training(steps):
    config = tiny_system.get_config("upsampler_1").to_dict()
    config["sampling"]["steps"] = steps
    with pytest.raises(ConfigError, check=mentions(field="sampling.steps")):
        Experiment.from_config(config).check_trainable()


@pytest.mark.parametrize(
    ("change", "facts"),
    [
        ({"stage": "prior"}, ["stage prior"]),
        ({"stage": ["clip"]}, ["stage", "['clip']"]),
        ({"model": "clip"}, ["section model"]),
        ({"model": {"embed_dim": 10**9}}, ["config.model.embed_dim", 10**9]),
        ({"total_steps": "all"}, ["config.total_steps", "int", "'all'"]),
    ],
)
def test_a_stored_config_that_is_damaged_is_named(change, facts, tmp_path):
    config = tiny_system.get_config("clip").to_dict()
    if change == {"stage": "prior"}:
        config = tiny_system.get_config("prior").to_dict()
    (tmp_path / "clip" / "checkpoints" / "24").mkdir(parents=True)
    folder = StageFolder(tmp_path, "clip")
    folder.write_json("config.json", {**config, **change})
    folder.write_json("contract.json", {"clip": "a", "dim": 8})
    text.LabelTokenizer(300).save(folder.path / "tokenizer")
    with pytest.raises(UserError, check=mentions(folder.path / "config.json", *facts)):
        load.load_stage(tmp_path, "clip", make_mesh(MeshConfig()))
