"""LAION's prior as a stage of a system: imported with a CLIP, loaded, and equal to recorded outputs of its library."""

import dataclasses
import functools
import json

import guided_files
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from clips import FIXTURES, random_clip
from karlo_recordings import Imported, Run, error, exact_rows, stage_of
from raised import mentions

from dalle2_jax import rng
from dalle2_jax.cli.weights import COMMANDS, make_parser
from dalle2_jax.errors import ConfigError, WeightsError
from dalle2_jax.models.clip import ClipConfig, TextConfig, VisionConfig
from dalle2_jax.models.priors.laion_prior import LaionPriorConfig, LaionPriorNetwork
from dalle2_jax.stages import ClipStage, EmbeddingConfig
from dalle2_jax.system import load
from dalle2_jax.system.programs import sample_embeddings
from dalle2_jax.training.sharding import MeshConfig, make_mesh
from dalle2_jax.weights.clip.openai import export_openai
from dalle2_jax.weights.component import Hints, Source
from dalle2_jax.weights.detect import detect as detect_any
from dalle2_jax.weights.families.laion import detect, laion_rules
from dalle2_jax.weights.importer import check_embedding, with_shared_embedding
from dalle2_jax.weights.inspection import count_parameters
from dalle2_jax.weights.karlo.export import TrainedStage, export_diffusers
from dalle2_jax.weights.rules import to_tensors
from dalle2_jax.weights.tensors import open_tensors, write_safetensors

WIDTH, LENGTH, STEPS = 24, 20, 60
UNIT = {"normalisation": "unit", "scale": WIDTH**0.5}
NETWORK = LaionPriorConfig(WIDTH, 2, 3, 36, 96, LENGTH, STEPS)
VISION = VisionConfig(8, patch_size=4, width=24, layers=1, heads=1)


def recording(name):
    """Returns the path of a tiny file, and the arrays that its library computed with it, integers as int32."""
    path = FIXTURES / "models" / name
    arrays = np.load(path.with_suffix(".npz"))
    kinds = {np.dtype(np.int64): np.int32}
    return path.with_suffix(".safetensors"), {
        key: jnp.asarray(value.astype(kinds.get(value.dtype, value.dtype))) for key, value in arrays.items()
    }


def clip_of(width, length=LENGTH, text_width=None):
    return ClipConfig(width, TextConfig(600, length, text_width or width, layers=1, heads=1), VISION)


def clip_file(folder, config):
    path = folder / f"clip-{config.embed_dim}.safetensors"
    export_openai(path, config, random_clip(config))
    return path


def prior_file(folder, **changed):
    """Writes the recorded file as published files are, with a CLIP in half precision; ``changed`` replaces tensors."""
    tensors = {key: tensor.read() for key, tensor in open_tensors(recording("laion_prior")[0]).items()} | changed
    tensors["clip.clip.visual.conv1.weight"] = np.zeros((2, 3, 4, 4), np.float16)
    path = folder / "prior.safetensors"
    write_safetensors(path, {key: value.shape for key, value in tensors.items()}, tensors.items())
    return path


def command(*words):
    options = make_parser().parse_args([*map(str, words)])
    COMMANDS[options.command](options)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    return prior_file(folder), clip_file(folder, clip_of(WIDTH))


@pytest.fixture(scope="module")
def root(files, tmp_path_factory):
    system = tmp_path_factory.mktemp("laion") / "system"
    command("import", "auto", *files, system)
    return system


@pytest.fixture(scope="module")
def loaded_stages(root):
    """Returns the system's stages, with weights on one device."""
    loaded = load.load_system(root, make_mesh(MeshConfig()))
    return {name: dataclasses.replace(each, variables=jax.device_get(each.variables)) for name, each in loaded.items()}


@pytest.fixture(scope="module")
def prior(loaded_stages):
    return loaded_stages["prior"]


@pytest.fixture(scope="module")
def theirs():
    return recording("laion_prior")[1]


def condition_of(arrays, rows=4):
    return {name: arrays[name][:rows] for name in ("text_emb", "text", "mask")}


@functools.cache
def forward(stage, training):
    """Returns the compiled forward pass of a stage."""

    @jax.jit
    def run(params, condition, drops, x_t, t):
        return stage.bind(params, condition, drops, rng.root(0) if training else None)(x_t, t)

    return run


def bound(stage, params, arrays, dropped=(), training=False):
    """Returns the output of a stage for recorded inputs."""
    drops = {name: jnp.full(len(arrays["t"]), name in dropped) for name in stage.drop_rates}
    return forward(stage, training)(params, condition_of(arrays), drops, arrays["x_t"], arrays["t"])


# --- a system -----------------------------------------------------------------------------------


def test_the_prior_uses_the_clip_of_the_system(root, prior):
    """The CLIP produces the embeddings that the prior takes, and its tokenizer reads the captions."""
    stage = prior.stage
    assert stage.model == NETWORK and stage.clip.model.embed_dim == WIDTH
    assert dataclasses.asdict(stage.clip.embedding) == UNIT
    contracts = [json.loads((root / name / "contract.json").read_text()) for name in ("clip", "prior")]
    assert contracts[0] == contracts[1] and UNIT.items() <= contracts[0].items()
    assert prior.tokenizer.vocab_size == 600 and prior.context_length == LENGTH
    assert (stage.diffusion.num_steps, stage.diffusion.prediction, stage.diffusion.schedule) == (STEPS, "x0", "cosine")
    assert (stage.sampling.name, stage.sampling.clip_sample, stage.sampling.guidance) == ("ddpm", None, 1.0)
    stage.check_sampling(dataclasses.replace(stage.sampling, guidance=2.0))


@pytest.mark.parametrize("training", [False, True])
def test_forward_equals_the_recorded(training, prior, theirs, capsys):
    errors = {
        name: error(bound(prior.stage, prior.variables.params, theirs, dropped, training), theirs[name])
        for name, dropped in (
            ("out", ()),
            ("out_null_text", ("text",)),
            ("out_null_image", ("image",)),
            ("out_null", ("image", "text")),
        )
    }
    with capsys.disabled():
        print("".join(f"\nLAION's prior: {name} within {each:.1e}" for name, each in errors.items()))
    assert max(errors.values()) <= 1e-5


@pytest.mark.parametrize("name", ["laion_prior_padding", "laion_prior_hidden"])
def test_older_generations_equal_the_recorded(name, capsys):
    path, arrays = recording(name)
    (component,) = detect(Source.open(path))
    length, width = arrays["text"].shape[1:]
    config = {**component.config, "text": {**component.config["text"], "context_length": length}}
    clip = ClipStage(clip_of(width, length), EmbeddingConfig(**component.embedding))
    stage = stage_of(dataclasses.replace(component, config=config), clip)
    assert stage.model.context_length == length and stage.sampling.steps == stage.diffusion.num_steps < 64
    params, outputs = guided_files.imported(component, stage), {"out": ()}
    if stage.drop_rates:
        outputs["out_null_text"] = ("text",)
    errors = {each: error(bound(stage, params, arrays, out), arrays[each]) for each, out in outputs.items()}
    with capsys.disabled():
        print("".join(f"\n{name}: {each} within {value:.1e}" for each, value in errors.items()))
    assert max(errors.values()) <= 1e-5


def test_guided_sampling_equals_the_recorded(prior, theirs, capsys):
    """All steps at guidance 2.5 with the recorded noises, each from the recorded state and one after another."""
    run = Run(Imported(prior.stage, prior.variables, None), 2.5)
    x_T, *noises = theirs["ddpm/noise"]
    after = [*theirs["ddpm/x_t"][1:], theirs["ddpm/image_emb"] * WIDTH**0.5]
    forced = error(run.teacher_forced(condition_of(theirs, 2), STEPS, x_T, noises, after, exact_rows), jnp.stack(after))
    free = run.free_running(condition_of(theirs, 2), STEPS, x_T, noises, exact_rows)
    free = error(free * WIDTH**-0.5, theirs["ddpm/image_emb"])
    with capsys.disabled():
        print(f"\nLAION's prior: {STEPS} guided steps within {forced:.1e}, one after another {free:.1e}")
    assert forced <= 1e-4 and free <= 1e-4


def test_the_prior_samples_from_captions(loaded_stages, prior):
    """Embeddings have the contract's norm, depend on the caption, and not on dropped text."""
    config = dataclasses.replace(prior.stage.sampling, steps=3, guidance=1.5)
    plan = prior.stage.plan(config, absent={"text": jnp.array([False, True])})

    def sample(*captions):
        batch = dict(zip(("tokens", "mask"), prior.tokenizer.encode(captions, LENGTH), strict=True))
        keys = rng.per_image(rng.root(0), jnp.arange(2, dtype=jnp.int32))
        clip = loaded_stages["clip"].variables
        return sample_embeddings(prior.stage, 1, prior.variables, clip, keys, batch, plan)

    one, other = sample("a fox", "a sea"), sample("a red fox!", "a boat")
    np.testing.assert_allclose(jnp.linalg.norm(one, axis=-1), UNIT["scale"], rtol=1e-5)
    assert abs(one - other)[0].max() > 1e-2 and abs(one - other)[1].max() == 0


# --- contracts ------------------------------------------------------------------------------------


def test_a_clip_of_another_contract_is_rejected(files, tmp_path):
    """A CLIP that was imported without the prior has raw embeddings; nothing is written."""
    prior, clip = files
    command("import", "auto", clip, tmp_path)
    with pytest.raises(WeightsError, check=mentions("LAION prior", "unit x 4.89898", "raw x 1", path=prior)):
        command("import", "laion", prior, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["clip"]


def test_stages_of_two_contracts_are_not_imported_together(files):
    """A decoder that takes raw embeddings, and a prior that predicts unit ones."""
    (prior,), (clip,) = (detect_any(path).components for path in files)
    decoder = dataclasses.replace(prior, stage="decoder", family="Karlo decoder", embedding=None)
    both = with_shared_embedding({"clip": clip, "prior": prior, "decoder": decoder})
    assert both["clip"].config["embedding"] == UNIT and clip.config["embedding"]["normalisation"] == "raw"
    system_clip = ClipStage(clip_of(WIDTH), EmbeddingConfig(**both["clip"].config["embedding"]))
    check_embedding(both["prior"], system_clip)
    with pytest.raises(WeightsError, check=mentions("Karlo decoder", "raw x 1", "unit x 4.89898")):
        check_embedding(both["decoder"], system_clip)
    assert with_shared_embedding({"clip": clip, "decoder": decoder}) == {"clip": clip, "decoder": decoder}
    assert with_shared_embedding({"prior": prior}) == {"prior": prior}


def test_a_clip_of_another_size_is_rejected(files, tmp_path):
    narrow = clip_file(tmp_path, clip_of(WIDTH - 8))
    with pytest.raises(WeightsError, check=mentions("24 dimensions", 16, path=files[0])):
        command("import", "auto", files[0], narrow, tmp_path / "system")
    assert not (tmp_path / "system").exists()


def test_inspect_describes_the_required_clip(files, capsys):
    command("inspect", files[0])
    out = capsys.readouterr().out
    assert "LAION prior" in out and "stage prior" in out
    assert "24 dimensions" in out and "unit x 4.89898" in out


def test_diffusers_pipelines_do_not_support_the_prior(loaded_stages, tmp_path):
    stages = {name: TrainedStage(each.stage, each.variables, each.tokenizer) for name, each in loaded_stages.items()}
    raw = dataclasses.replace(stages["clip"].stage, embedding=EmbeddingConfig("raw", 1.0))
    stages |= {"clip": stages["clip"]._replace(stage=raw), "decoder": None, "upsampler_1": None}
    with pytest.raises(WeightsError, check=mentions("diffusers", "stage prior", "model.kind")):
        export_diffusers(tmp_path, stages)


# --- files ----------------------------------------------------------------------------------------


def test_a_published_context_length_exceeds_that_of_clip():
    """It is 256, the library's default; captions have CLIP's length."""
    model = LaionPriorConfig(layers=12, heads=12, context_length=256, nulls="padding", attention="relaxed")
    x, text = jnp.zeros((1, 768)), (jnp.zeros((1, 77, 768)), jnp.ones((1, 77), bool))
    init = LaionPriorNetwork(model).init
    shapes = jax.eval_shape(init, jax.random.key(0), x, jnp.zeros(1, jnp.int32), x, *text)["params"]
    zero_params = jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), shapes)
    tensors = {f"net.{key}": value.shape for key, value in to_tensors(laion_rules(model), zero_params)}
    constants = {"net.causal_transformer.layers.0.0.rotary_emb.freqs": (16,)}
    (component,) = detect(guided_files.source(tensors | constants))
    assert component.embedding == {"normalisation": "unit", "scale": 768**0.5}
    clip = ClipStage(clip_of(768, 77), EmbeddingConfig(**component.embedding))
    stage = stage_of(component, clip)
    assert stage.model == model and stage.clip is clip and stage.drop_rates == {}
    assert (stage.diffusion.num_steps, stage.sampling.steps) == (1000, 64)
    assert count_parameters(component) == sum(leaf.size for leaf in jax.tree.leaves(shapes))


def test_attention_is_a_hint():
    path = recording("laion_prior_padding")[0]
    for hint, found in ((None, "relaxed"), ("cosine", "cosine")):
        (component,) = detect(Source.open(path, Hints(attention=hint)))
        assert component.config["model"]["attention"] == found


def test_another_noise_schedule_is_rejected(tmp_path):
    linear = np.linspace(1e-4, 0.02, STEPS, dtype=np.float32) * 1000 / STEPS
    path = prior_file(tmp_path, **{"noise_scheduler.betas": linear})
    with pytest.raises(WeightsError, check=mentions("noise schedule", "cosine", path=path)):
        detect(Source.open(path))


def test_other_files_are_not_detected(files, tmp_path):
    assert detect(Source.open(files[1])) == [] == detect(Source(tmp_path))
    with pytest.raises(WeightsError, check=mentions("kind laion", path=files[1])):
        detect_any(files[1], "laion")


@pytest.mark.parametrize(
    ("fields", "clip", "field", "facts"),
    [
        ({"kind": "lion"}, clip_of(WIDTH), "model.kind", ["'lion'", "'laion'"]),
        ({"width": 8}, clip_of(WIDTH), "model.width", ["follows"]),
        ({"context_length": 19}, clip_of(WIDTH), "model.context_length", [20, 19]),
        ({"text_input": "clip"}, clip_of(WIDTH), "model.text_input", ["unknown field", "'text_input'"]),
        ({}, clip_of(WIDTH, text_width=64), "model.kind", ["'laion'", 24, 64]),
        ({}, clip_of(WIDTH, length=8), "text.context_length", [8, 20]),
    ],
)
def test_invalid_configs(fields, clip, field, facts):
    (component,) = detect(Source.open(recording("laion_prior")[0]))
    config = {**component.config, "model": {**component.config["model"], **fields}}
    with pytest.raises(ConfigError, check=mentions(*facts, field=field)):
        stage_of(dataclasses.replace(component, config=config), ClipStage(clip, EmbeddingConfig(**UNIT)))
