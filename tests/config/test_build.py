"""Experiments become stages and jobs, and every mistake is found before anything is written."""

import cv2
import numpy as np
import pytest
import tiny_system
from raised import mentions

from dalle2_jax import rng, text
from dalle2_jax.config.experiment import Experiment
from dalle2_jax.diffusion import GuidanceSchedule, make_schedule, shifted, with_zero_terminal_snr
from dalle2_jax.errors import ConfigError, UserError
from dalle2_jax.run import build_job
from dalle2_jax.system import load
from dalle2_jax.workdir.folder import StageFolder

VOCAB_SIZE = 300


@pytest.fixture(scope="module")
def clip():
    return Experiment.from_config(tiny_system.get_config("clip").to_dict()).build(VOCAB_SIZE, None)


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
    stages = [Experiment.from_config(config_of(which)).build(VOCAB_SIZE, clip) for _ in range(2)]
    assert stages[0] == stages[1] and hash(stages[0]) == hash(stages[1])
    assert stages[0].name == which


def test_stages_share_clip_sizes(clip):
    prior, decoder = (
        Experiment.from_config(config_of(which)).build(VOCAB_SIZE, clip) for which in ("prior", "decoder")
    )
    assert prior.model.embed_dim == decoder.model.image_emb_dim == clip.model.embed_dim == 8
    assert prior.model.vocab_size == decoder.model.text.vocab_size == clip.model.text.vocab_size == VOCAB_SIZE
    assert prior.clip == decoder.clip == clip


@pytest.mark.parametrize("which", ["prior", "decoder"])
def test_reading_clip_states(which, clip):
    """A stage may read CLIP's text states in place of tokens; then it has as many as CLIP."""
    overrides = {"model__text_input": "clip"} | ({"model__text": None} if which == "decoder" else {})
    stage = Experiment.from_config(config_of(which, **overrides)).build(VOCAB_SIZE, clip)
    assert stage.model.text_width == clip.model.text.width
    with pytest.raises(ConfigError, check=mentions(32, 14, field="text.context_length")):
        Experiment.from_config(config_of(which, **overrides, text__context_length=14)).build(VOCAB_SIZE, clip)


def test_schedules_are_what_the_config_says():
    """Shifted by the side of the images, and stretched to end in pure noise."""

    def schedule(**fields):
        overrides = {f"diffusion__{name}": value for name, value in fields.items()}
        return Experiment.from_config(config_of("upsampler_1", **overrides)).build(None, None).schedule

    plain = make_schedule("cosine", tiny_system.UPSAMPLER_STEPS)
    assert schedule() is plain and schedule(resolution_shift=2) is shifted(plain, 2.0)
    ends = schedule(resolution_shift=2.0, zero_terminal_snr=True)
    assert ends is with_zero_terminal_snr(shifted(plain, 2.0)) and ends.alpha_bar[-1] == 0


def test_guidance_is_what_the_config_says(clip):
    sampling_fields = {
        "sampling__text_guidance": 3,
        "sampling__guidance_interval": [0.25, 1.0],
        "sampling__guidance": 1.5,
    }
    sampling = Experiment.from_config(config_of("decoder", **sampling_fields)).build(VOCAB_SIZE, clip).sampling
    assert sampling.scales == {"image": 1.5, "text": 3.0}
    assert sampling.scale_schedule == GuidanceSchedule(interval=(0.25, 1.0))


@pytest.mark.parametrize(
    ("which", "overrides", "field", "facts"),
    [
        ("clip", {"stage": "clop"}, "stage", ["'clop'", "'clip'"]),
        ("clip", {"stage": None}, "stage", ["''", "clip"]),
        ("clip", {"batchsize": 3}, "batchsize", ["clip", "'batchsize'", "'batch_size'"]),
        ("clip", {"diffusion": {}}, "diffusion", ["unknown field", "clip", "'diffusion'"]),
        ("clip", {"model": None}, "model", ["section", "clip"]),
        ("clip", {"model": 3}, "model", ["section", "clip"]),
        ("clip", {"text": None}, "text", ["section", "clip"]),
        ("prior", {"diffusion": None}, "diffusion", ["section", "prior"]),
        ("decoder", {"sampling": None}, "sampling", ["section", "decoder"]),
        ("upsampler_1", {"conditioning": None}, "conditioning.low_size", ["low_size"]),
        ("clip", {"embedding__normalisation": "unity"}, "embedding", ["embedding.normalisation", "'unity'"]),
        ("clip", {"model__text__vocab_size": 3}, "model.text.vocab_size", ["follows"]),
        ("prior", {"model__embed_dim": 8}, "model.embed_dim", ["follows"]),
        ("prior", {"model__text_input": "token"}, "model", ["text_input", "'token'", "'tokens'", "'clip'"]),
        ("prior", {"conditioning__drop_txt": 0.1}, "conditioning.drop_txt", ["'drop_txt'", "'drop_text'"]),
        ("prior", {"sampling__name": "dpmm"}, "sampling", ["'dpmm'", "'ddpm'"]),
        ("decoder", {"model__unet__channels": "8"}, "model.unet.channels", ["int", "'8'"]),
        ("decoder", {"model__unet__dtype": "float16"}, "model.unet.dtype", ["'float16'"]),
        ("upsampler_1", {"conditioning__low_size": 5}, "conditioning", ["image_size 16", "low_size 5"]),
        ("prior", {"diffusion__num_step": 10}, "diffusion.num_step", ["'num_step'", "'num_steps'"]),
        ("prior", {"diffusion__loss": "hybrid"}, "diffusion", ["'hybrid'", "learned variance"]),
        ("prior", {"diffusion__loss": "hybird"}, "diffusion", ["'hybird'", "'hybrid'"]),
        ("prior", {"diffusion__timesteps": "loss_moment"}, "diffusion", ["'loss_second_moment'"]),
        ("decoder", {"diffusion__loss": "mse"}, "diffusion", ["'mse'", "use loss 'hybrid'"]),
        ("decoder", {"diffusion__variance": "fixed_small"}, "diffusion", ["'fixed_small'", "'learned_range'", "'mse'"]),
        (
            "decoder",
            {"model__unet__out_channels": 3},
            "conditioning",
            ["'learned_range'", "model.unet.out_channels", 6, 3],
        ),
        (
            "decoder",
            {"sampling__threshold": "dynamic", "sampling__clip_sample": 0.0},
            "sampling.clip_sample",
            ["above 0"],
        ),
        ("decoder", {"sampling__threshold": "dinamic"}, "sampling", ["threshold", "'dinamic'", "'dynamic'"]),
        (
            "decoder",
            {"conditioning__noise_statistics": 1},
            "conditioning.noise_statistics",
            ["unknown field", "'noise_statistics'"],
        ),
        ("decoder", {"sampling__guidance_interval": [0.9, 0.1]}, "sampling", ["guidance_interval"]),
        ("upsampler_1", {"model__out_channels": 6}, "conditioning", ["'fixed_small'", "model.out_channels", 3, 6]),
        (
            "upsampler_1",
            {"diffusion__zero_terminal_snr": True, "diffusion__prediction": "eps"},
            "diffusion",
            ["zero terminal SNR", "'v'", "'x0'"],
        ),
    ],
)
def test_build_stage_rejects(which, overrides, field, facts, clip):
    with pytest.raises(ConfigError, check=mentions(*facts, field=field)):
        Experiment.from_config(config_of(which, **overrides)).build(VOCAB_SIZE, clip)


@pytest.mark.parametrize("field", ["total_steps", "batch_size", "log_every", "checkpoint_every", "keep_checkpoints"])
def test_build_job_rejects_counts_below_one(field, tmp_path):
    config = tiny_system.get_config("upsampler_1")
    config[field] = 0
    with pytest.raises(ConfigError, check=mentions(1, 0, field=field)):
        build_job(
            Experiment.from_config(config),
            tmp_path / "system",
            "tests/support/tiny_system.py:upsampler_1",
        )
    assert not (tmp_path / "system").exists()


@pytest.mark.parametrize("section", ["data", "optim", "mesh"])
def test_only_training_needs_them(section, tmp_path):
    """A stage is built of a config without them, as that of an imported one is, but not trained."""
    config = tiny_system.get_config("upsampler_1")
    del config[section]
    stage = Experiment.from_config(config.to_dict()).build(None, None)
    assert stage == Experiment.from_config(config_of("upsampler_1")).build(None, None)
    with pytest.raises(ConfigError, check=mentions("section", "upsampler_1", field=section)):
        build_job(
            Experiment.from_config(config),
            tmp_path / "system",
            "tests/support/tiny_system.py:upsampler_1",
        )
    assert not (tmp_path / "system").exists()


def test_a_degraded_upsampler_is_fed_crops_and_their_small_images(tmp_path):
    """The stage's config alone decides crop, factor and degradation; the data's resolution has to fit."""
    config = tiny_system.get_config("upsampler_1")
    config.conditioning.degradation = "bsr"
    job = build_job(Experiment.from_config(config), tmp_path / "system", "tests/support/tiny_system.py:upsampler_1")
    batch = next(job.stream)
    size = config.batch_size
    assert batch["image"].shape == (size, 8, 8, 3) and batch["low_res"].shape == (size, 4, 4, 3)
    x_0, condition = job.stage.example({}, rng.root(0), batch)
    assert x_0.shape == condition["low_res"].shape == (size, 8, 8, 3)
    config.data.resolution = 8
    with pytest.raises(UserError, check=mentions("'bsr'", 16, 8, "config.data.resolution=16")):
        build_job(
            Experiment.from_config(config),
            tmp_path / "other",
            "tests/support/tiny_system.py:upsampler_1",
        )
    assert not (tmp_path / "other").exists()


@pytest.mark.sharding
def test_build_job_leaves_no_trace_of_a_rejected_config(tmp_path):
    """What is wrong is found before the folder is claimed."""
    for field, value in {"optim.schedule": "cosin", "mesh.data": 3, "data.kind": "shaps", "batch_size": 9}.items():
        config = tiny_system.get_config("clip")
        config.update_from_flattened_dict({field: value})
        with pytest.raises(UserError):
            build_job(Experiment.from_config(config), tmp_path / "system", "tests/support/tiny_system.py:clip")
    assert not (tmp_path / "system").exists()


def test_false_start_keeps_no_tokenizer(tmp_path):
    """Until a checkpoint uses it, the tokenizer in a folder gives way to what the config asks for."""
    for vocab_size in (300, 290):
        config = tiny_system.get_config("clip")
        config.text.vocab_size = vocab_size
        job = build_job(Experiment.from_config(config), tmp_path, "tests/support/tiny_system.py:clip")
        assert job.stage.model.text.vocab_size == vocab_size


def test_a_job_tells_what_its_data_rejected(tmp_path):
    for number in range(12):
        cv2.imwrite(str(tmp_path / f"{number:02d}.png"), np.full((8, 8, 3), number, np.uint8))
        (tmp_path / f"{number:02d}.txt").write_text(f"image {number}")
    (tmp_path / "03.png").write_bytes(b"")
    (tmp_path / "07.png").write_bytes((tmp_path / "07.png").read_bytes()[:40])
    config = tiny_system.get_config("clip")
    config.data = {"kind": "folder", "path": str(tmp_path), "resolution": 8}
    job = build_job(Experiment.from_config(config), tmp_path / "system", "tests/support/tiny_system.py:clip")
    assert not job.rejected()
    for _ in range(3):
        next(job.stream)
    assert job.rejected() == {"empty": 1, "not an image": 1}
    shapes = build_job(
        Experiment.from_config(tiny_system.get_config("clip")),
        tmp_path / "shapes",
        "tests/support/tiny_system.py:clip",
    )
    assert not shapes.rejected()


# --- stages that need no other stage ---------------------------------------------------------


def glide_of(which, **text):
    """Returns a tiny config like GLIDE's: without CLIP, conditioned on captions or, of kind "labels", on classes."""
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
    job = build_job(
        Experiment.from_config(glide_of(which, kind=kind, **sizes)),
        tmp_path,
        "tests/support/tiny_system.py:decoder",
    )
    tokenizer = text.load_tokenizer(tmp_path / which / "tokenizer")
    assert isinstance(tokenizer, cls) and job.frozen == {} == job.stage.prepare({}, {})
    assert not (tmp_path / which / "contract.json").exists()
    model = job.stage.model
    assert tokenizer.vocab_size == (model.num_classes if kind == "labels" else model.text.vocab_size)
    batch = next(job.stream)
    assert batch["tokens"].shape == (8, sizes.get("context_length", 32))
    assert load.needed(tmp_path, which) == (which,)


def test_a_decoder_that_reads_clip_needs_it(tmp_path):
    with pytest.raises(UserError, check=mentions(tmp_path, "tests/support/tiny_system.py:clip")):
        build_job(
            Experiment.from_config(tiny_system.get_config("decoder")),
            tmp_path,
            "tests/support/tiny_system.py:decoder",
        )
    folder = StageFolder(tmp_path, "decoder")
    for config, names in ((config_of("decoder"), ("clip", "decoder")), (glide_of("decoder").to_dict(), ("decoder",))):
        folder.write_json("config.json", config)
        assert load.needed(tmp_path, "decoder") == names


@pytest.mark.parametrize(
    ("text_fields", "facts"),
    [
        ({"kind": "glyde"}, ["config.text.kind", "'glyde'", "'glide'"]),
        ({"kind": "glide", "vocab_size": 200}, ["vocab_size", 257, 50257, 200]),
        ({"kind": "labels", "vocab_size": 10}, ["config.text.context_length", 1, 32]),
    ],
)
def test_tokenizers_that_cannot_be_are_rejected(text_fields, facts, tmp_path):
    with pytest.raises(UserError, check=mentions(*facts)):
        build_job(
            Experiment.from_config(glide_of("decoder", **text_fields)),
            tmp_path / "system",
            "tests/support/tiny_system.py:decoder",
        )
    assert not (tmp_path / "system").exists()


def test_a_conditioned_upsampler_needs_a_text_input(clip):
    config = glide_of("upsampler_1").to_dict()
    assert Experiment.from_config(config).build(VOCAB_SIZE, clip).requires == ()
    del config["text"]
    with pytest.raises(ConfigError, check=mentions("section", "upsampler_1", field="text")):
        Experiment.from_config(config).build(VOCAB_SIZE, None)
