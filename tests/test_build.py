"""The hall: sections become dataclasses, and everything that can be wrong in a config is said in one line."""

import dataclasses

import cv2
import numpy as np
import pytest
import tiny_system

from dalle2_jax import build, rng, text
from dalle2_jax.diffusion import Course, make_schedule, shifted, with_zero_terminal_snr
from dalle2_jax.job import build_job
from dalle2_jax.models.resnet import ResNetConfig
from dalle2_jax.models.vit import VisionConfig
from dalle2_jax.sections import expand, expand_kind
from dalle2_jax.types import UsageError, UserError
from dalle2_jax.workdir import StageFolder


@dataclasses.dataclass(frozen=True)
class Inner:
    """A section within a section."""

    size: int = 2
    dtype: str = "float32"


@dataclasses.dataclass(frozen=True)
class Outer:
    """One field of every type that configs use; ``inner`` and ``needed`` may not be left out."""

    inner: Inner
    needed: int
    rate: float = 0.5
    name: str = "a"
    on: bool = False
    sides: tuple[int, ...] = ()
    bound: float | None = 1.0
    steps: int | str = 50
    tower: VisionConfig | ResNetConfig = VisionConfig()

    def __post_init__(self) -> None:
        if self.name == "refused":
            raise UserError("name 'refused' is refused: use another")


GOOD = {"inner": {"size": 3}, "needed": 1}


def test_expand_takes_defaults_and_nested_sections():
    assert expand(Outer, GOOD, "outer") == Outer(Inner(3), 1)
    assert expand(Inner, {}, "inner") == Inner()
    assert hash(expand(Outer, GOOD, "outer"))


@pytest.mark.parametrize(
    ("field", "given", "taken"),
    [
        ("rate", 1, 1.0),  # an int where a float is asked for
        ("rate", 0.25, 0.25),
        ("bound", None, None),
        ("bound", 2, 2.0),
        ("sides", [32, 16], (32, 16)),  # a list, as JSON has
        ("sides", (), ()),
        ("steps", 20, 20),
        ("steps", "fast27", "fast27"),
        ("on", True, True),
        ("tower", {"kind": "vit", "width": 8, "heads": 2}, VisionConfig(width=8, heads=2)),
        ("tower", {"kind": "resnet", "layers": [1, 1]}, ResNetConfig(layers=(1, 1))),
    ],
)
def test_expand_converts(field, given, taken):
    value = getattr(expand(Outer, {**GOOD, field: given}, "outer"), field)
    assert value == taken and type(value) is type(taken)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"rat": 1.0}, "unknown field of config.outer 'rat': did you mean 'rate'"),
        ({"inner": {"sizes": 3}}, "unknown field of config.outer.inner 'sizes': did you mean 'size'"),
        ({"needed": 1.5}, "config.outer.needed must be int, not 1.5"),
        ({"needed": True}, "config.outer.needed must be int, not True"),
        ({"needed": None}, "config.outer.needed must be int, not None"),
        ({"on": 1}, "config.outer.on must be bool, not 1"),
        ({"rate": "1"}, "config.outer.rate must be float, not '1'"),
        ({"bound": "1"}, "config.outer.bound must be float or None, not '1'"),
        ({"name": 3}, "config.outer.name must be str, not 3"),
        ({"sides": 3}, "config.outer.sides must be tuple, not 3"),
        ({"inner": 3}, "config.outer.inner must be Inner, not 3"),
        ({"inner": {"dtype": "bfloat61"}}, "unknown config.outer.inner.dtype 'bfloat61': did you mean 'bfloat16'"),
        ({"tower": {"kind": "vitt"}}, "unknown config.outer.tower.kind 'vitt': did you mean 'vit'"),
        ({"tower": {"width": 8}}, "unknown config.outer.tower.kind ''"),
        ({"tower": {"kind": "vit", "widht": 8}}, "unknown field of config.outer.tower 'widht': did you mean 'width'"),
        ({"name": "refused"}, "config.outer: name 'refused' is refused"),
    ],
)
def test_expand_refuses(section, message):
    with pytest.raises(UsageError) as caught:
        expand(Outer, {**GOOD, **section}, "outer")
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_expand_names_what_is_missing():
    with pytest.raises(UsageError, match="config.outer lacks inner, needed"):
        expand(Outer, {}, "outer")


def test_expand_derived_fields():
    """What follows from the rest of the system comes from there, and nowhere else."""
    assert expand(Inner, {"dtype": "bfloat16"}, "inner", size=7) == Inner(7, "bfloat16")
    with pytest.raises(UsageError, match="config.inner.size follows from the rest of the system: leave it out"):
        expand(Inner, {"size": 7}, "inner", size=7)
    with pytest.raises(UsageError) as caught:
        expand(Inner, {"sizee": 7}, "inner", size=7)
    assert "'size'" not in str(caught.value)  # not offered, for it would be refused


def test_expand_at_the_top_of_a_config():
    with pytest.raises(UsageError, match="unknown field of config 'siz': did you mean 'size'"):
        expand(Inner, {"siz": 1}, "")
    with pytest.raises(UsageError, match="config.size must be int"):
        expand(Inner, {"size": "1"}, "")


def test_expand_kind_leaves_the_section_alone():
    section = {"kind": "inner", "size": 4}
    assert expand_kind({"inner": Inner}, section, "data") == Inner(4)
    assert section == {"kind": "inner", "size": 4}


# --- stages ---------------------------------------------------------------------------------

VOCAB_SIZE = 300


@pytest.fixture(scope="module")
def clip():
    return build.build_stage(tiny_system.get_config("clip").to_dict(), VOCAB_SIZE, None)


def config_of(which, **overrides):
    """Returns a tiny config as a dict, with other values for some fields; None removes one."""
    config = tiny_system.get_config(which).to_dict()
    for path, value in overrides.items():
        *sections, field = path.split("__")
        section = config
        for name in sections:
            section = section[name]
        if value is None:
            del section[field]
        else:
            section[field] = value
    return config


@pytest.mark.parametrize("which", tiny_system.STAGES)
def test_stage_is_a_value(which, clip):
    """Equal configs make equal, hashable stages: jit finds the program it compiled before."""
    stages = [build.build_stage(config_of(which), VOCAB_SIZE, clip) for _ in range(2)]
    assert stages[0] == stages[1] and hash(stages[0]) == hash(stages[1])
    assert stages[0].name == which


def test_stages_share_clip_sizes(clip):
    prior, decoder = (build.build_stage(config_of(which), VOCAB_SIZE, clip) for which in ("prior", "decoder"))
    assert prior.model.embed_dim == decoder.model.image_emb_dim == clip.model.embed_dim == 8
    assert prior.model.vocab_size == decoder.model.text.vocab_size == clip.model.text.vocab_size == VOCAB_SIZE
    assert prior.clip == decoder.clip == clip


@pytest.mark.parametrize("which", ["prior", "decoder"])
def test_reading_clip_states(which, clip):
    """A stage may read CLIP's text states in place of tokens; then it has as many as CLIP."""
    overrides = {"model__text_input": "clip"} | ({"model__text": None} if which == "decoder" else {})
    stage = build.build_stage(config_of(which, **overrides), VOCAB_SIZE, clip)
    assert stage.model.text_width == clip.model.text.width
    with pytest.raises(UsageError, match="context_length must be clip's 32, not 14"):
        build.build_stage(config_of(which, **overrides, text__context_length=14), VOCAB_SIZE, clip)


def test_schedules_are_what_the_config_says():
    """Shifted by the side of the pictures, and stretched to end in pure noise."""

    def schedule(**fields):
        overrides = {f"diffusion__{name}": value for name, value in fields.items()}
        return build.build_stage(config_of("upsampler_1", **overrides), None, None).schedule

    plain = make_schedule("cosine", tiny_system.UPSAMPLER_STEPS)
    assert schedule() is plain and schedule(resolution_shift=2) is shifted(plain, 2.0)
    ends = schedule(resolution_shift=2.0, zero_terminal_snr=True)
    assert ends is with_zero_terminal_snr(shifted(plain, 2.0)) and ends.alpha_bar[-1] == 0


def test_guidance_is_what_the_config_says(clip):
    told = {"sampling__text_guidance": 3, "sampling__guidance_interval": [0.25, 1.0], "sampling__guidance": 1.5}
    sampling = build.build_stage(config_of("decoder", **told), VOCAB_SIZE, clip).sampling
    assert sampling.scales == {"image": 1.5, "text": 3.0} and sampling.course == Course(interval=(0.25, 1.0))


@pytest.mark.parametrize(
    ("which", "overrides", "message"),
    [
        ("clip", {"stage": "clop"}, "unknown stage 'clop': did you mean 'clip'"),
        ("clip", {"stage": None}, "unknown stage ''"),
        ("clip", {"batchsize": 3}, "unknown field of stage clip's config 'batchsize': did you mean 'batch_size'"),
        ("clip", {"diffusion": {}}, "unknown field of stage clip's config 'diffusion'"),
        ("clip", {"model": None}, "config of stage clip needs a section model"),
        ("clip", {"model": 3}, "config of stage clip needs a section model"),
        ("clip", {"text": None}, "config of stage clip needs a section text"),
        ("prior", {"diffusion": None}, "config of stage prior needs a section diffusion"),
        ("decoder", {"sampling": None}, "config of stage decoder needs a section sampling"),
        ("upsampler_1", {"conditioning": None}, "config.conditioning lacks low_size"),
        ("clip", {"embedding__normalisation": "unity"}, "config.embedding: embedding.normalisation 'unity'"),
        ("clip", {"model__text__vocab_size": 3}, "config.model.text.vocab_size follows"),
        ("prior", {"model__embed_dim": 8}, "config.model.embed_dim follows"),
        ("prior", {"model__text_input": "token"}, "config.model: "),
        ("prior", {"conditioning__drop_txt": 0.1}, "'drop_txt': did you mean 'drop_text'"),
        ("prior", {"sampling__name": "dpmm"}, "did you mean 'ddpm'"),
        ("decoder", {"model__unet__channels": "8"}, "config.model.unet.channels must be int, not '8'"),
        ("decoder", {"model__unet__dtype": "float16"}, "unknown config.model.unet.dtype 'float16'"),
        ("upsampler_1", {"conditioning__low_size": 5}, "image_size 16 is not a multiple of low_size 5"),
        ("prior", {"diffusion__num_step": 10}, "config.diffusion 'num_step': did you mean 'num_steps'"),
        ("prior", {"diffusion__loss": "hybrid"}, "config.diffusion: loss 'hybrid' trains a learned variance"),
        ("prior", {"diffusion__loss": "hybird"}, "unknown loss 'hybird': did you mean 'hybrid'"),
        ("prior", {"diffusion__timesteps": "loss_moment"}, "did you mean 'loss_second_moment'"),
        ("decoder", {"diffusion__loss": "mse"}, "use loss 'hybrid'"),
        ("decoder", {"diffusion__variance": "fixed_small"}, "use variance 'learned_range', or loss 'mse'"),
        ("decoder", {"model__unet__out_channels": 3}, "'learned_range' needs model.unet.out_channels 6, not 3"),
        ("decoder", {"sampling__threshold": "dynamic", "sampling__clip": 0.0}, "config.sampling: clip bounds |x_0|"),
        ("decoder", {"sampling__threshold": "dinamic"}, "unknown threshold 'dinamic': did you mean 'dynamic'"),
        ("decoder", {"conditioning__moments": 1}, "config.conditioning.moments follows from the rest of the system"),
        ("decoder", {"sampling__guidance_interval": [0.9, 0.1]}, "config.sampling: guidance_interval is"),
        ("upsampler_1", {"model__out_channels": 6}, "with variance 'fixed_small' needs model.out_channels 3, not 6"),
        (
            "upsampler_1",
            {"diffusion__zero_terminal_snr": True, "diffusion__prediction": "eps"},
            "config.diffusion: with zero terminal SNR no x_0 follows",
        ),
    ],
)
def test_build_stage_refuses(which, overrides, message, clip):
    with pytest.raises(UsageError) as caught:
        build.build_stage(config_of(which, **overrides), VOCAB_SIZE, clip)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("field", ["total_steps", "batch_size", "log_every", "checkpoint_every", "keep_checkpoints"])
def test_build_job_refuses_counts_below_one(field, tmp_path):
    config = tiny_system.get_config("upsampler_1")
    config[field] = 0
    with pytest.raises(UsageError, match=f"config.{field} must be at least 1, not 0"):
        build_job(config, tmp_path / "system", "tests/tiny_system.py:upsampler_1")
    assert not (tmp_path / "system").exists()


@pytest.mark.parametrize("section", ["data", "optim", "mesh"])
def test_only_training_needs_them(section, tmp_path):
    """A stage is built of a config without them, as that of an imported one is, but not trained."""
    config = tiny_system.get_config("upsampler_1")
    del config[section]
    stage = build.build_stage(config.to_dict(), None, None)
    assert stage == build.build_stage(config_of("upsampler_1"), None, None)
    with pytest.raises(UsageError, match=f"config of stage upsampler_1 needs a section {section}"):
        build_job(config, tmp_path / "system", "tests/tiny_system.py:upsampler_1")
    assert not (tmp_path / "system").exists()


def test_a_degraded_upsampler_is_fed_crops_and_their_small_pictures(tmp_path):
    """The stage's config alone decides crop, factor and degradation; the data's resolution has to fit."""
    config = tiny_system.get_config("upsampler_1")
    config.conditioning.degradation = "bsr"
    job = build_job(config, tmp_path / "system", "tests/tiny_system.py:upsampler_1")
    batch = next(job.stream)
    size = config.batch_size
    assert batch["image"].shape == (size, 8, 8, 3) and batch["low_res"].shape == (size, 4, 4, 3)
    x_0, condition = job.stage.example({}, rng.root(0), batch)
    assert x_0.shape == condition["low_res"].shape == (size, 8, 8, 3)
    config.data.resolution = 8
    with pytest.raises(UserError, match="pictures of 16 pixels, and the data's have 8: set config.data.resolution=16"):
        build_job(config, tmp_path / "other", "tests/tiny_system.py:upsampler_1")
    assert not (tmp_path / "other").exists()


def test_build_job_leaves_no_trace_of_a_refused_config(tmp_path):
    """What is wrong is found before the folder is claimed."""
    for field, value in {"optim.schedule": "cosin", "mesh.data": 3, "data.kind": "shaps", "batch_size": 9}.items():
        config = tiny_system.get_config("clip")
        config.update_from_flattened_dict({field: value})
        with pytest.raises(UserError):
            build_job(config, tmp_path / "system", "tests/tiny_system.py:clip")
    assert not (tmp_path / "system").exists()


def test_false_start_keeps_no_tokenizer(tmp_path):
    """Until a checkpoint uses it, the tokenizer in a folder gives way to what the config asks for."""
    for vocab_size in (300, 290):
        config = tiny_system.get_config("clip")
        config.text.vocab_size = vocab_size
        job = build_job(config, tmp_path, "tests/tiny_system.py:clip")
        assert job.stage.model.text.vocab_size == vocab_size


def test_a_job_tells_what_its_data_refused(tmp_path):
    for number in range(12):
        cv2.imwrite(str(tmp_path / f"{number:02d}.png"), np.full((8, 8, 3), number, np.uint8))
        (tmp_path / f"{number:02d}.txt").write_text(f"picture {number}")
    (tmp_path / "03.png").write_bytes(b"")
    (tmp_path / "07.png").write_bytes((tmp_path / "07.png").read_bytes()[:40])
    config = tiny_system.get_config("clip")
    config.data = {"kind": "folder", "path": str(tmp_path), "resolution": 8}
    job = build_job(config, tmp_path / "system", "tests/tiny_system.py:clip")
    assert not job.rejected()
    for _ in range(3):
        next(job.stream)
    assert job.rejected() == {"empty": 1, "not a picture": 1}
    shapes = build_job(tiny_system.get_config("clip"), tmp_path / "shapes", "tests/tiny_system.py:clip")
    assert not shapes.rejected()


# --- stages that speak for themselves ---------------------------------------------------------


def glide_of(which, **text):
    """A tiny config as GLIDE's are: without CLIP, told captions, or, of kind "labels", classes."""
    config = tiny_system.get_config("decoder")
    model = {**config.model.to_dict(), "image_emb_dim": None, "image_tokens": 0}
    if which == "upsampler_1":
        unet = {**model["unet"], "image_size": 16, "in_channels": 6}
        model, upsampler = {**model, "unet": unet}, tiny_system.get_config(which)
        config.data, config.conditioning = upsampler.data, {"low_size": 8, "crop_fraction": 1.0}
    else:
        config.conditioning = {"drop_text": 0.2}
    if text.get("kind") == "labels":
        del model["text"], model["unet"]["context_dim"]
        model |= {"text_input": "label"}
    config.update({"stage": which})
    config.model = model
    config.text.update(text)
    return config


KINDS = {
    "sentencepiece": ({}, text.SentencePieceTokenizer),
    "glide": ({"vocab_size": 300}, text.GlideTokenizer),
    "clip": ({"vocab_size": 600}, text.ClipTokenizer),
    "labels": ({"vocab_size": 10, "context_length": 1}, text.LabelTokenizer),
}


@pytest.mark.parametrize("which", ["decoder", "upsampler_1"])
@pytest.mark.parametrize("kind", KINDS)
def test_stages_without_clip_have_a_tokenizer_of_their_own(which, kind, tmp_path):
    sizes, cls = KINDS[kind]
    job = build_job(glide_of(which, kind=kind, **sizes), tmp_path, "tests/tiny_system.py:decoder")
    tokenizer = text.load_tokenizer(tmp_path / which / "tokenizer")
    assert isinstance(tokenizer, cls) and job.frozen == {} == job.stage.prepare({}, {})
    assert not (tmp_path / which / "contract.json").exists()
    model = job.stage.model
    assert tokenizer.vocab_size == (model.num_classes if kind == "labels" else model.text.vocab_size)
    batch = next(job.stream)
    assert batch["tokens"].shape == (8, sizes.get("context_length", 32))
    assert build.needed(tmp_path, which) == (which,)


def test_a_decoder_that_reads_clip_needs_it(tmp_path):
    with pytest.raises(UserError, match="has no trained stage clip"):
        build_job(tiny_system.get_config("decoder"), tmp_path, "tests/tiny_system.py:decoder")
    folder = StageFolder(tmp_path, "decoder")
    for config, names in ((config_of("decoder"), ("clip", "decoder")), (glide_of("decoder").to_dict(), ("decoder",))):
        folder.write_json("config.json", config)
        assert build.needed(tmp_path, "decoder") == names


@pytest.mark.parametrize(
    ("text_fields", "message"),
    [
        ({"kind": "glyde"}, "unknown config.text.kind 'glyde': did you mean 'glide'"),
        ({"kind": "glide", "vocab_size": 200}, "vocab_size 200 is not to be had"),
        ({"kind": "labels", "vocab_size": 10}, "config.text.context_length must be 1, not 32: a class is one token"),
    ],
)
def test_tokenizers_that_cannot_be_are_refused(text_fields, message, tmp_path):
    with pytest.raises(UserError, match=message):
        build_job(glide_of("decoder", **text_fields), tmp_path / "system", "tests/tiny_system.py:decoder")
    assert not (tmp_path / "system").exists()


def test_an_upsampler_that_is_told_needs_to_know_what_it_reads(clip):
    config = glide_of("upsampler_1").to_dict()
    assert build.build_stage(config, VOCAB_SIZE, clip).borrows == ()
    del config["text"]
    with pytest.raises(UsageError, match="config of stage upsampler_1 needs a section text"):
        build.build_stage(config, VOCAB_SIZE, None)
