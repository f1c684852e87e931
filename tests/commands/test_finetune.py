"""Fine-tuning from a system: what comes from there, what is stored and linked, and how it ends, whole or as a LoRA.

The base is a tiny system as an importer writes it: configs without data, checkpoints at step 0, random weights.
"""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
import tiny_system
from command_line import run_here
from raised import mentions
from written_system import write_system

from dalle2_jax.config import inherit, sources
from dalle2_jax.config.experiment import Experiment
from dalle2_jax.config.stored import stored_experiment
from dalle2_jax.errors import ConfigError, ContractError, DataError, UserError
from dalle2_jax.run import build_job, record_contract
from dalle2_jax.stages import LoraStage, Variables, fingerprint
from dalle2_jax.stages.lora import merge
from dalle2_jax.system import load
from dalle2_jax.training.loop import restore_or_init, train
from dalle2_jax.types import complete_contract
from dalle2_jax.workdir.checkpoints import Checkpoints
from dalle2_jax.workdir.folder import StageFolder

CONFIG = "tests/support/tiny_system.py"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_system(tmp_path_factory.mktemp("base") / "runs" / "public")


def config_of(which, base, lora=None, **overrides):
    """A config that starts from ``base``; ``a__b`` is the field a.b."""
    config = tiny_system.get_config(which)
    config.unlock()
    config.update(init_from=str(base), total_steps=4, checkpoint_every=2)
    config.optim.update(warmup_steps=0, schedule="constant")
    config.update_from_flattened_dict({path.replace("__", "."): value for path, value in overrides.items()})
    if lora is not None:
        config.lora = lora
    return config


def job_of(which, base, root, lora=None, **overrides):
    return build_job(
        Experiment.from_config(config_of(which, base, lora, **overrides)),
        root,
        f"{CONFIG}:{which}",
    )


def same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, one, other)


def differs(one, other):
    return any((np.asarray(a) != np.asarray(b)).any() for a, b in zip(*map(jax.tree.leaves, (one, other)), strict=True))


# --- what comes from the base -----------------------------------------------------------------


def test_inherited():
    """What the network is and predicts comes from the base, how it is computed and trained from the run."""
    tiny = tiny_system.get_config("decoder").to_dict()
    base = Experiment.from_config(
        {
            "stage": "decoder",
            "total_steps": 0,
            "model": {
                "unet": {**tiny["model"]["unet"], "channels": 16, "dropout": 0.1, "dtype": "bfloat16"},
                "text_input": "clip",
            },
            "text": {"context_length": 77},
            "conditioning": {"drop_text": 0.9, "empty_caption": True},
            "diffusion": {"prediction": "eps", "variance": "learned_range", "loss": "hybrid"},
            "sampling": {"steps": 25},
        }
    )
    config = {
        **tiny,
        "total_steps": 7,
        "model": {**tiny["model"], "unet": {**tiny["model"]["unet"], "remat": True}},
        "text": {"vocab_size": 300},
        "conditioning": {"drop_text": 0.2},
        "diffusion": {"prediction": "x0", "variance": "learned_range", "loss": "hybrid", "weighting": "none", "k": 2.0},
        "sampling": {"steps": 3},
    }
    run = Experiment.from_config(config)
    merged = inherit.inherited(run, base)
    unet, base_unet = merged.spec.model.unet, base.spec.model.unet
    assert (unet.channels, unet.remat, unet.dropout, unet.dtype) == (16, "blocks", 0.0, "float32")
    assert dataclasses.replace(unet, remat="none", dropout=0.1, dtype="bfloat16") == base_unet
    assert dataclasses.replace(merged.spec.model, unet=base_unet) == base.spec.model
    assert merged.spec.text == base.spec.text and merged.spec.text.context_length == 77
    assert merged.spec.conditioning == dataclasses.replace(base.spec.conditioning, drop_text=0.2)
    assert merged.spec.diffusion == dataclasses.replace(base.spec.diffusion, k=2.0)
    assert merged.spec.sampling == run.spec.sampling and merged.run == run.run and merged.data == run.data
    assert dataclasses.replace(merged, spec=run.spec) == run


def test_known_pixels_are_added_to_a_base_without_them():
    """A run with inpaint widens the first layer of its base; one without keeps what the base has."""
    tiny = tiny_system.get_config("decoder").to_dict()
    base = Experiment.from_config(tiny)
    run = Experiment.from_config({**tiny, "conditioning": {**tiny["conditioning"], "inpaint": True}})
    merged = inherit.inherited(run, base)
    assert merged.spec.model.unet.in_channels == 7 and merged.spec.conditioning.inpaint
    assert inherit.inherited(base, merged).spec.conditioning.inpaint
    assert inherit.inherited(run, merged).spec.model == merged.spec.model
    enlarging = tiny_system.get_config("upsampler_1").to_dict()
    wider = {**enlarging, "conditioning": {**enlarging["conditioning"], "inpaint": True}}
    parts = inherit.inherited(Experiment.from_config(wider), Experiment.from_config(enlarging)).spec
    assert parts.model.in_channels == 10 and parts.conditioning.inpaint
    tuned = {"conditioning": {**tiny["conditioning"], "inpaint": True}, "lora": {"rank": 2}, "init_from": "base"}
    lora = Experiment.from_config({**tiny, **tuned})
    with pytest.raises(ConfigError, check=mentions("lora", field="conditioning.inpaint")):
        inherit.inherited(lora, base)


OTHER = {
    # another architecture and another objective, all of which give way; and what stays
    "decoder": {
        **{"model__unet__channels": 16, "model__unet__out_channels": 3, "diffusion__prediction": "eps"},
        **{"diffusion__variance": "fixed_small", "diffusion__loss": "mse", "text__vocab_size": 280},
        **{"model__unet__dropout": 0.25, "conditioning__drop_text": 0.3, "sampling__steps": 3},
    },
    "prior": {"model__width": 8, "text__context_length": 8, "model__dtype": "bfloat16", "diffusion__num_steps": 7},
}


@pytest.mark.parametrize("which", OTHER)
def test_a_run_starts_as_the_base_is(which, base, mesh, tmp_path):
    """Whatever architecture its config states: the stored config is complete, so that no other is needed."""
    root = tmp_path / "mine"
    job = job_of(which, base, root, **OTHER[which])
    theirs = load.load_system(base, mesh, ("clip", which))[which]
    same(job.start.params, theirs.variables.params)
    assert job.stage.diffusion == theirs.stage.diffusion and job.stage.clip == theirs.stage.clip
    stored = json.loads((root / which / "experiment.json").read_text())
    if which == "decoder":
        assert (stored["model"]["unet"]["channels"], stored["diffusion"]["loss"]) == (8, "hybrid")
        assert (job.stage.model.unet.dropout, job.stage.drop_text, job.stage.sampling.steps) == (0.25, 0.3, 3)
        assert stored["text"] == {"kind": "sentencepiece", "vocab_size": 300, "context_length": 32, "path": ""}
    else:
        assert (job.stage.model.width, job.stage.model.dtype, job.stage.model.context_length) == (16, "bfloat16", 32)
    assert not stored["init_from"].startswith("/") and (root / stored["init_from"]).resolve() == base.resolve()
    name = "tokenizer/tokenizer.json"
    assert (root / which / name).read_bytes() == (base / which / name).read_bytes()
    ours, theirs_contract = (json.loads((home / which / "contract.json").read_text()) for home in (root, base))
    assert ours == complete_contract(theirs_contract)
    assert json.loads((root / which / "base.json").read_text()) == {"weights": fingerprint(theirs.variables.params)}


def test_the_other_stages_are_linked(base, mesh, tmp_path):
    """What the workdir lacks, so that it is a whole system; what it has is left alone, and a link gives way."""
    root = tmp_path / "mine"
    train(job_of("upsampler_1", base, root, total_steps=1))
    assert {path.name for path in root.iterdir() if path.is_symlink()} == {"clip", "prior", "decoder"}
    assert not (root / "clip").readlink().is_absolute()
    members = load.load_system(root, mesh, load.cascade_stages(root))
    assert [(name, member.step) for name, member in members.items()] == [
        *(("clip", 0), ("prior", 0), ("decoder", 0), ("upsampler_1", 1))
    ]
    decoder = members["decoder"].variables
    same(job_of("decoder", base, root).start.params, decoder.params)
    assert not (root / "decoder").is_symlink() and (root / "upsampler_1" / "checkpoints" / "1").is_dir()
    assert (base / "decoder" / "config.json").is_file() and not (base / "decoder" / "run.json").exists()


def test_a_tuned_clip_is_another_clip(base, mesh, tmp_path):
    """Stages that were trained with the old one are not linked to it, but may be tuned to it."""
    root = tmp_path / "mine"
    job = job_of("clip", base, root, total_steps=1)
    record_contract(job, train(job).ema)
    assert {path.name for path in root.iterdir()} == {"clip", "upsampler_1"}
    assert json.loads((root / "clip" / "contract.json").read_text())["scale"] == 1.5
    job_of("decoder", base, root)
    assert not (root / "prior").exists()
    assert (root / "decoder" / "contract.json").read_bytes() == (root / "clip" / "contract.json").read_bytes()
    other_clip = write_contract(copy_of(base, tmp_path / "other_clip"), "deadbeef")
    with pytest.raises(ContractError, check=mentions("config.init_from", "'deadbeef'")) as caught:
        job_of("prior", other_clip, root)
    assert caught.value.differences["clip"][0] == "deadbeef"


# --- training ---------------------------------------------------------------------------------


def test_resumed_equals_uninterrupted_without_the_base(base, tmp_path):
    whole = train(job_of("upsampler_1", base, tmp_path / "whole"))
    gone = copy_of(base, tmp_path / "gone")
    train(job_of("upsampler_1", gone, tmp_path / "halves", total_steps=2))
    shutil.rmtree(gone)
    job = job_of("upsampler_1", gone, tmp_path / "halves")
    assert job.start == (None, None)
    resumed = train(job)
    assert int(resumed.step) == 4
    same(whole, resumed)
    assert differs(resumed.params, job_of("upsampler_1", base, tmp_path / "new").start.params)


def test_the_first_state_is_the_bases(base, mesh, tmp_path):
    """Its averaged weights, twice, and those statistics that the run has too: a history of losses where it is used."""
    theirs = load.load_system(base, mesh, ("upsampler_1",))["upsampler_1"].variables

    def first(root, **overrides):
        job = job_of("upsampler_1", base, tmp_path / root, **overrides)
        return restore_or_init(job, jax.random.key(0), Checkpoints(job.folder))[0]

    state = first("mine")
    same((state.params, state.ema, state.stats), (theirs.params, theirs.params, theirs.stats))
    assert int(state.step) == 0 and not any(leaf.any() for leaf in jax.tree.leaves(state.opt_state))
    without = first("other", diffusion__timesteps="uniform")
    same((without.params, without.stats), (theirs.params, {}))


# --- LoRA -------------------------------------------------------------------------------------

LORA = {"rank": 2, "alpha": 4.0}


def test_a_lora_from_start_to_end(base, mesh, tmp_path):
    """It starts as the base, is saved alone, and is merged when it is loaded, by the one way there is."""
    root = tmp_path / "mine"
    job = job_of("decoder", base, root, LORA, sample_every=2)
    assert isinstance(job.stage, LoraStage) and job.start.params is None
    theirs = load.load_system(base, mesh, ("clip", "decoder"))["decoder"].variables
    state = train(job)
    saved = StageFolder(root, "decoder").path / "checkpoints" / "4"
    job.hooks.preview(Variables(jax.tree.map(lambda leaf: leaf + 0.3, state.ema), {}), 6)
    previews = {path.name: path.read_bytes() for path in (root / "decoder" / "samples").iterdir()}
    assert previews.keys() == {"00000002.png", "00000004.png", "00000006.png"}
    assert previews["00000004.png"] != previews["00000006.png"]
    assert {path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path(state.ema)} == {"lora_a", "lora_b"}
    sizes = [sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (state.params, theirs.params)]
    assert sizes[0] < sizes[1] / 5  # a twentieth where channels are not 8: test_stage_lora.py
    assert saved.is_dir() and not any("kernel" in str(path) for path in saved.rglob("*"))
    members = load.load_system(root, mesh, load.cascade_stages(root))
    tuned = members["decoder"]
    assert type(tuned.stage).__name__ == "DecoderStage" and tuned.step == 4
    same(tuned.variables.params, merge(theirs.params, state.ema, job.stage.config))
    assert differs(tuned.variables.params, theirs.params)


def test_a_resumed_lora_equals_an_uninterrupted_one(base, tmp_path):
    lora = {"rank": 2, "targets": [r"conv_\d/kernel$"]}
    whole = train(job_of("upsampler_1", base, tmp_path / "whole", lora))
    train(job_of("upsampler_1", base, tmp_path / "halves", lora, total_steps=2))
    same(whole, train(job_of("upsampler_1", base, tmp_path / "halves", lora)))


def test_a_lora_of_a_clip_has_a_contract_of_its_merged_weights(base, mesh, tmp_path):
    root = tmp_path / "mine"
    job = job_of("clip", base, root, LORA, total_steps=1)
    record_contract(job, train(job).ema)
    clip = load.load_system(root, mesh, ("clip",))["clip"]
    assert clip.contract.clip == fingerprint(clip.variables.params)
    assert clip.contract.clip != json.loads((base / "clip" / "contract.json").read_text())["clip"]


@pytest.fixture(scope="module")
def tuned(base, tmp_path_factory):
    """A LoRA of one step, in a system with a base of its own."""
    root = tmp_path_factory.mktemp("tuned")
    shutil.copytree(base, root / "public")
    lora = {"rank": 2, "targets": [r"conv_\d/kernel$"]}
    train(job_of("upsampler_1", root / "public", root / "mine", lora, total_steps=1))
    return root


def test_a_lora_moves_with_its_base(tuned, mesh, tmp_path):
    """And loads through a link, too."""
    shutil.copytree(tuned, tmp_path / "moved", symlinks=True)
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "upsampler_1").symlink_to(tmp_path / "moved" / "mine" / "upsampler_1")
    members = [load.load_system(root, mesh, ("upsampler_1",)) for root in (tuned / "mine", tmp_path / "linked")]
    same(*(member["upsampler_1"].variables for member in members))


def test_a_lora_of_other_weights_is_rejected(tuned, mesh, tmp_path):
    root = tmp_path / "moved"
    shutil.copytree(tuned, root, symlinks=True)
    shutil.rmtree(root / "public")
    with pytest.raises(UserError, check=mentions("LoRA", "stage upsampler_1", root / "public", "init_from")):
        load.load_system(root / "mine", mesh, ("upsampler_1",))
    write_system(root / "public", seed=1)
    with pytest.raises(UserError, check=mentions("LoRA", "other weights", root / "public/upsampler_1")):
        load.load_system(root / "mine", mesh, ("upsampler_1",))


# --- the command line -------------------------------------------------------------------------


def test_the_command(base, tmp_path):
    """As the README has it, with the path as a word of its own, from another folder's point of view."""
    words = ["--config.init_from", str(base), "--workdir", str(tmp_path / "mine"), "--config.total_steps=3"]
    words += ["--config.lora={'rank': 2, 'targets': ('conv_1/kernel',)}"]
    command = ["train.py", "--config", f"{CONFIG}:upsampler_1", *words]
    done = run_here(*command)
    assert done.returncode == 0, done.stderr
    assert "upsampler_1: 3 steps" in done.stdout
    stored = json.loads((tmp_path / "mine" / "upsampler_1" / "experiment.json").read_text())
    assert stored["lora"] == {"alpha": 4.0, "rank": 2, "targets": ["conv_1/kernel"]}
    done = run_here(*command[:3], "--workdir", "x", "--config.lora.rank=2")
    assert done.returncode == 2 and "'lora'" in done.stderr


# --- mistakes ---------------------------------------------------------------------------------


def copy_of(base, root):
    shutil.copytree(base, root)
    return root


def write_contract(root, clip):
    for path in root.glob("*/contract.json"):
        path.write_text(json.dumps({**json.loads(path.read_text()), "clip": clip}))
    return root


def unfinished(base, root):
    shutil.copytree(base / "upsampler_1", root / "upsampler_1")
    path = root / "upsampler_1" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "total_steps": 9}))
    return root


@pytest.mark.parametrize(
    ("what", "lora", "facts"),
    [
        ("nowhere", None, ["config.init_from", "no system", "nowhere"]),
        ("empty", None, ["config.init_from", "empty", "stage upsampler_1", "none"]),
        ("clip alone", None, ["config.init_from", "clip alone", "stage upsampler_1", "only clip"]),
        ("unfinished", None, ["stage upsampler_1", "unfinished", "0 of 9 steps"]),
        ("mine", None, ["config.init_from", "mine", "--workdir"]),
        ("true", None, ["config.init_from", True]),
        ("no base", {}, ["config.lora", "--config.init_from"]),
        ("base", {"rnk": 2}, ["config.lora", "'rnk'", "'rank'"]),
        ("base", {"rank": 0}, ["config.lora.rank", 1, 0]),
        ("base", {"targets": "attn"}, ["config.lora.targets", "tuple", "'attn'"]),
        ("base", {}, ["config.lora.targets", "stage upsampler_1", r"'/conv_\\d/kernel$'"]),
    ],
)
def test_mistakes_are_answered_and_leave_no_trace(what, lora, facts, base, tmp_path):
    places = {"base": base, "true": True, "no base": ""}
    place = places.get(what, tmp_path / what)
    if what == "empty":
        place.mkdir()
    elif what == "clip alone":
        shutil.copytree(base / "clip", place / "clip")
    elif what == "unfinished":
        unfinished(base, place)
    config = config_of("upsampler_1", base, lora)
    del config.init_from
    config.init_from = place if place is True else str(place)
    with pytest.raises(UserError, check=mentions(*facts)):
        build_job(Experiment.from_config(config), tmp_path / "mine", f"{CONFIG}:upsampler_1")
    assert not (tmp_path / "mine").exists()


def test_another_base_is_another_config(base, tmp_path):
    job = job_of("upsampler_1", base, tmp_path / "mine")
    (job.folder.path / "checkpoints" / "1").mkdir(parents=True)
    other = copy_of(base, tmp_path / "other")
    with pytest.raises(UserError, check=mentions(tmp_path / "mine/upsampler_1", "init_from", '"../other"')):
        job_of("upsampler_1", other, tmp_path / "mine", total_steps=2)


def test_an_imported_stage_names_no_data(base):
    with pytest.raises(DataError, check=mentions("imported", path=None)):
        sources.open_source(stored_experiment(StageFolder(base, "decoder")).data, "val")
