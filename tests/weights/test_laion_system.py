"""LAION's prior as a stage of a system: imported with a CLIP, loaded, and computing what its own library computed."""

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

from dalle2_jax import build, rng
from dalle2_jax.generation.cascade import draw_embedding
from dalle2_jax.models.clip import ClipConfig, TextConfig, VisionConfig
from dalle2_jax.models.laion_prior import LaionPriorConfig, LaionPriorNetwork
from dalle2_jax.stages import ClipStage, EmbeddingConfig
from dalle2_jax.training.sharding import MeshConfig, make_mesh
from dalle2_jax.types import UsageError, UserError
from dalle2_jax.weights import empty, open_tensors, write_safetensors
from dalle2_jax.weights.__main__ import COMMANDS, check_contract, make_parser, trained, under_contract
from dalle2_jax.weights.clip_openai import export_openai
from dalle2_jax.weights.component import Hints, Source
from dalle2_jax.weights.families import parameters
from dalle2_jax.weights.families import recognise as recognise_any
from dalle2_jax.weights.karlo_export import export_diffusers
from dalle2_jax.weights.laion import laion_rules, recognise

WIDTH, LENGTH, STEPS = 24, 20, 60
UNIT = {"normalisation": "unit", "scale": WIDTH**0.5}
NETWORK = LaionPriorConfig(WIDTH, 2, 3, 36, 96, LENGTH, STEPS)
VISION = VisionConfig(8, patch_size=4, width=24, layers=1, heads=1)


def recording(name):
    """A tiny file's path, and the arrays that its library computed with it, integers as int32."""
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
    """The recorded file as published ones are, with a CLIP in half precision; other tensors as ``changed`` says."""
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
def members(root):
    """The system's stages, their weights on one device."""
    loaded = build.load_system(root, make_mesh(MeshConfig()))
    return {name: dataclasses.replace(each, variables=jax.device_get(each.variables)) for name, each in loaded.items()}


@pytest.fixture(scope="module")
def prior(members):
    return members["prior"]


@pytest.fixture(scope="module")
def theirs():
    return recording("laion_prior")[1]


def told(arrays, rows=4):
    return {name: arrays[name][:rows] for name in ("text_emb", "text", "mask")}


@functools.cache
def forward(stage, training):
    """One forward pass of a stage, compiled."""

    @jax.jit
    def run(params, condition, drops, x_t, t):
        return stage.bind(params, condition, drops, rng.root(0) if training else None)(x_t, t)

    return run


def bound(stage, params, arrays, dropped=(), training=False):
    """What a stage makes of what was recorded."""
    drops = {name: jnp.full(len(arrays["t"]), name in dropped) for name in stage.drop_rates}
    return forward(stage, training)(params, told(arrays), drops, arrays["x_t"], arrays["t"])


# --- a system -----------------------------------------------------------------------------------


def test_it_joins_the_clip_beside_it(root, prior, capsys):
    """Whose embeddings come as it takes them, and whose tokenizer reads its captions."""
    stage = prior.stage
    assert stage.model == NETWORK and stage.clip.model.embed_dim == WIDTH
    assert dataclasses.asdict(stage.clip.embedding) == UNIT
    contracts = [json.loads((root / name / "contract.json").read_text()) for name in ("clip", "prior")]
    assert contracts[0] == contracts[1] and UNIT.items() <= contracts[0].items()
    assert prior.tokenizer.vocab_size == 600 and prior.context_length == LENGTH
    assert (stage.diffusion.num_steps, stage.diffusion.prediction, stage.diffusion.schedule) == (STEPS, "x0", "cosine")
    assert (stage.sampling.name, stage.sampling.clip, stage.sampling.guidance) == ("ddpm", None, 1.0)
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
    (component,) = recognise(Source.open(path))
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
    """All steps at guidance 2.5, each alone and one after another, from the recorded noises."""
    run = Run(Imported(prior.stage, prior.variables, None), 2.5)
    x_T, *noises = theirs["ddpm/noise"]
    after = [*theirs["ddpm/x_t"][1:], theirs["ddpm/image_emb"] * WIDTH**0.5]
    forced = error(run.forced(told(theirs, 2), STEPS, x_T, noises, after, exact_rows), jnp.stack(after))
    whole = run.whole(told(theirs, 2), STEPS, x_T, noises, exact_rows)
    whole = error(whole * WIDTH**-0.5, theirs["ddpm/image_emb"])
    with capsys.disabled():
        print(f"\nLAION's prior: {STEPS} guided steps within {forced:.1e}, one after another {whole:.1e}")
    assert forced <= 1e-4 and whole <= 1e-4


def test_it_draws_from_captions(members, prior):
    """Embeddings of the contract's length, others for other captions, none of them read where there is none."""
    config, scalars = dataclasses.replace(prior.stage.sampling, steps=3, guidance=1.5).split()
    absent = jnp.array([False, True])

    def draw(*captions):
        batch = dict(zip(("tokens", "mask"), prior.tokenizer.encode(captions, LENGTH), strict=True))
        keys = rng.per_image(rng.root(0), jnp.arange(2, dtype=jnp.int32))
        told = keys, batch, absent, jax.tree.map(jnp.float32, scalars)
        return draw_embedding(prior.stage, config, 1, prior.variables, members["clip"].variables, *told)

    one, other = draw("a fox", "a sea"), draw("a red fox!", "a boat")
    np.testing.assert_allclose(jnp.linalg.norm(one, axis=-1), UNIT["scale"], rtol=1e-5)
    assert abs(one - other)[0].max() > 1e-2 and abs(one - other)[1].max() == 0


# --- contracts ------------------------------------------------------------------------------------


def test_a_clip_of_another_contract_is_refused(files, tmp_path):
    """One that was imported without it is raw; nothing is written."""
    prior, clip = files
    command("import", "auto", clip, tmp_path)
    with pytest.raises(UserError) as caught:
        command("import", "laion", prior, tmp_path)
    said = str(caught.value)
    assert "was trained with CLIP embeddings unit x 4.89898, and the clip beside it hands on raw x 1" in said
    assert said.endswith("import it to another folder, together with its CLIP") and "\n" not in said
    assert [path.name for path in tmp_path.iterdir()] == ["clip"]


def test_stages_of_two_contracts_are_not_brought_together(files):
    """A decoder that takes raw embeddings, beside a prior that makes unit ones."""
    (prior,), (clip,) = (recognise_any(path).components for path in files)
    decoder = dataclasses.replace(prior, stage="decoder", family="Karlo decoder", embedding=None)
    both = under_contract({"clip": clip, "prior": prior, "decoder": decoder})
    assert both["clip"].config["embedding"] == UNIT and clip.config["embedding"]["normalisation"] == "raw"
    beside = ClipStage(clip_of(WIDTH), EmbeddingConfig(**both["clip"].config["embedding"]))
    check_contract(both["prior"], beside)
    with pytest.raises(UserError, match=r"\(Karlo decoder\) was trained with .* raw x 1, .* hands on unit x 4.89898"):
        check_contract(both["decoder"], beside)
    assert under_contract({"clip": clip, "decoder": decoder}) == {"clip": clip, "decoder": decoder}
    assert under_contract({"prior": prior}) == {"prior": prior}


def test_a_clip_of_another_size_is_refused(files, tmp_path):
    narrow = clip_file(tmp_path, clip_of(WIDTH - 8))
    with pytest.raises(UserError, match="does not fit"):
        command("import", "auto", files[0], narrow, tmp_path / "system")
    assert not (tmp_path / "system").exists()


def test_inspect_says_what_it_joins(files, capsys):
    command("inspect", files[0])
    out = capsys.readouterr().out
    assert "LAION prior" in out and "stage prior" in out
    assert "joins a CLIP of 24 dimensions (unit x 4.89898)" in out


def test_unclip_pipelines_have_no_such_prior(root, members, tmp_path):
    stages = trained(root, members)
    raw = {**stages["clip"].config, "embedding": {"normalisation": "raw", "scale": 1.0}}
    stages |= {"clip": stages["clip"]._replace(config=raw), "decoder": None, "upsampler_1": None}
    with pytest.raises(UserError, match="stage prior does not fit unCLIP's pipelines: it is a prior of another"):
        export_diffusers(tmp_path, stages)


# --- files ----------------------------------------------------------------------------------------


def test_a_published_size_has_more_places_than_clip_has_tokens():
    """256, the library's default; the captions stay CLIP's."""
    model = LaionPriorConfig(layers=12, heads=12, context_length=256, nulls="padding", attention="relaxed")
    x, text = jnp.zeros((1, 768)), (jnp.zeros((1, 77, 768)), jnp.ones((1, 77), bool))
    init = LaionPriorNetwork(model).init
    shapes = jax.eval_shape(init, jax.random.key(0), x, jnp.zeros(1, jnp.int32), x, *text)["params"]
    hollow = jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), shapes)
    tensors = {f"net.{key}": value.shape for key, value in empty(laion_rules(model), hollow)}
    constants = {"net.causal_transformer.layers.0.0.rotary_emb.freqs": (16,)}
    (component,) = recognise(guided_files.source(tensors | constants))
    assert component.embedding == {"normalisation": "unit", "scale": 768**0.5}
    clip = ClipStage(clip_of(768, 77), EmbeddingConfig(**component.embedding))
    stage = stage_of(component, clip)
    assert stage.model == model and stage.clip is clip and stage.drop_rates == {}
    assert (stage.diffusion.num_steps, stage.sampling.steps) == (1000, 64)
    assert parameters(component) == sum(leaf.size for leaf in jax.tree.leaves(shapes))


def test_attention_is_a_hint():
    path = recording("laion_prior_padding")[0]
    for hint, found in ((None, "relaxed"), ("cosine", "cosine")):
        (component,) = recognise(Source.open(path, Hints(attention=hint)))
        assert component.config["model"]["attention"] == found


def test_another_noise_schedule_is_refused(tmp_path):
    linear = np.linspace(1e-4, 0.02, STEPS, dtype=np.float32) * 1000 / STEPS
    path = prior_file(tmp_path, **{"noise_scheduler.betas": linear})
    with pytest.raises(UserError, match=r"prior.safetensors was trained by another noise schedule than cosine"):
        recognise(Source.open(path))


def test_other_files_are_not_taken_for_laions(files, tmp_path):
    assert recognise(Source.open(files[1])) == [] == recognise(Source(tmp_path))
    with pytest.raises(UserError, match="is no laion checkpoint"):
        recognise_any(files[1], "laion")


@pytest.mark.parametrize(
    ("fields", "clip", "message"),
    [
        ({"kind": "lion"}, clip_of(WIDTH), "unknown config.model.kind 'lion': did you mean 'laion'"),
        ({"width": 8}, clip_of(WIDTH), "config.model.width follows from the rest of the system"),
        ({"context_length": 19}, clip_of(WIDTH), "config.model.context_length must be clip's 20 or more, not 19"),
        ({"text_input": "clip"}, clip_of(WIDTH), "unknown field of config.model 'text_input'"),
        ({}, clip_of(WIDTH, text_width=64), "must be as wide as its embeddings, 24, not 64"),
        ({}, clip_of(WIDTH, length=8), "config.text.context_length must be clip's 8, not 20"),
    ],
)
def test_configs_that_do_not_fit(fields, clip, message):
    (component,) = recognise(Source.open(recording("laion_prior")[0]))
    config = {**component.config, "model": {**component.config["model"], **fields}}
    with pytest.raises(UsageError, match=message):
        stage_of(dataclasses.replace(component, config=config), ClipStage(clip, EmbeddingConfig(**UNIT)))
