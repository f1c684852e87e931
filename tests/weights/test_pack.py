"""A packed system is the system: its weights, rounded or not, its images, and everything that starts from it."""

import dataclasses
import json
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
import tiny_system
from command_line import run_here
from raised import mentions
from written_system import write_system

from dalle2_jax import testing, weights
from dalle2_jax.config.experiment import Experiment
from dalle2_jax.config.stored import stored_experiment
from dalle2_jax.errors import ContractError, SystemWarning, UsageError, UserError, WeightsError
from dalle2_jax.run import build_job
from dalle2_jax.stages import LoraStage, fingerprint
from dalle2_jax.system import load
from dalle2_jax.system.system import System
from dalle2_jax.training.sharding import MeshConfig, make_mesh
from dalle2_jax.weights.packing.card import SECTION
from dalle2_jax.workdir import digests, packed
from dalle2_jax.workdir.checkpoints import Checkpoints
from dalle2_jax.workdir.folder import StageFolder

STAGES = ("clip", "prior", "decoder", "upsampler_1")


@pytest.fixture(scope="module")
def system(tmp_path_factory):
    return write_system(tmp_path_factory.mktemp("trained") / "system")


@pytest.fixture(scope="module")
def rounded(system, tmp_path_factory):
    """The system, packed as bfloat16."""
    return weights.pack(system, tmp_path_factory.mktemp("packed") / "rounded")


@pytest.fixture(scope="module")
def original(system, mesh):
    """The loaded stages of the system."""
    return load.load_system(system, mesh)


@pytest.fixture(scope="module")
def loaded(rounded, mesh):
    """The loaded stages of the packed system."""
    return load.load_system(rounded.path, mesh)


def same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, one, other)


def weights_of(root, name):
    """Returns the file with a packed stage's weights."""
    (path,) = (root / name / "checkpoints").glob(f"*/{packed.FILE}")
    return path


# --- what is stored ---------------------------------------------------------------------------


def test_a_float32_copy_is_the_system(system, original, mesh, tmp_path):
    report = weights.pack(system, tmp_path / "copy", dtype="float32")
    copied = load.load_system(tmp_path / "copy", mesh)
    assert tuple(stage.name for stage in report.stages) == tuple(copied) == tuple(original) == STAGES
    for name, ours in copied.items():
        theirs = original[name]
        same(ours.variables, theirs.variables)
        assert (ours.stage, ours.step, ours.contract) == (theirs.stage, theirs.step, theirs.contract)
        folders = StageFolder(tmp_path / "copy", name), StageFolder(system, name)
        assert stored_experiment(folders[0]) == stored_experiment(folders[1])
        assert theirs.tokenizer is None or ours.tokenizer == theirs.tokenizer
    assert [name for name in STAGES if (tmp_path / "copy" / name / "tokenizer").exists()] == ["clip"]  # stored once
    assert all(stage.error == 0 for stage in report.stages)


def test_matrices_are_rounded_and_vectors_are_not(original, rounded, loaded):
    for name, member in loaded.items():
        expected = jax.tree.map(
            lambda leaf: np.asarray(leaf).astype(ml_dtypes.bfloat16 if leaf.ndim > 1 else np.float32),
            original[name].variables.params,
        )
        same(member.variables.params, jax.tree.map(lambda leaf: leaf.astype(np.float32), expected))
        same(member.variables.stats, original[name].variables.stats)
    for stage in rounded.stages:
        assert 1e-4 < stage.error < 2**-8  # half the distance of two bfloat16 numbers, relative
        assert stage.size == weights_of(rounded.path, stage.name).stat().st_size
        assert stage.parameters == sum(leaf.size for leaf in jax.tree.leaves(loaded[stage.name].variables.params))
    assert weights_of(rounded.path, "decoder").stat().st_size < 0.75 * 4 * rounded.stages[2].parameters


def test_the_contract_is_that_of_the_rounded_clip(original, loaded):
    contracts = {member.contract for name, member in loaded.items() if name != "upsampler_1"}
    assert contracts == {loaded["clip"].contract} and loaded["upsampler_1"].contract is None
    theirs, identity = original["clip"].contract, fingerprint(loaded["clip"].variables.params)
    assert loaded["clip"].contract == dataclasses.replace(theirs, clip=identity)
    assert identity != theirs.clip


def test_packing_is_deterministic(rounded, system, tmp_path):
    weights.pack(system, tmp_path / rounded.path.name)
    files = [path.relative_to(rounded.path) for path in rounded.path.rglob("*") if path.is_file()]
    assert len(files) > 4 * len(STAGES)
    for file in files:
        assert (tmp_path / rounded.path.name / file).read_bytes() == (rounded.path / file).read_bytes(), file


def test_a_card_is_kept_and_its_stages_are_not(system, tmp_path):
    card = tmp_path / "card.md"
    card.write_text(f"# A card\n\nData: none.\n\n{SECTION}\n\n| old | table |\n")
    weights.pack(system, tmp_path / "out", stages=("clip",), card=card)
    text = (tmp_path / "out" / "README.md").read_text()
    assert text.startswith("# A card\n\nData: none.\n\n## Stages\n\n| stage |")
    assert "| `clip` | 0 |" in text and "old" not in text and "decoder" not in text


def test_a_lora_is_merged(system, mesh, tmp_path):
    config = tiny_system.get_config("upsampler_1")
    config.unlock()
    lora = {"rank": 2, "targets": [r"conv_\d/kernel$"]}
    config.update(init_from=str(system), total_steps=1, checkpoint_every=1, lora=lora)
    config.optim.warmup_steps = 0
    job = build_job(Experiment.from_config(config), tmp_path / "tuned")
    assert isinstance(job.stage, LoraStage)
    factors = testing.tiny_variables(job.stage)
    Checkpoints(job.folder).save_lean(1, {"ema": factors.params, "stats": factors.stats})
    weights.pack(tmp_path / "tuned", tmp_path / "out", dtype="float32", stages=("upsampler_1",))
    ours, theirs = (
        load.load_system(tmp_path / root, mesh, ("upsampler_1",))["upsampler_1"].variables for root in ("out", "tuned")
    )
    same(ours, theirs)
    stored = stored_experiment(StageFolder(tmp_path / "out", "upsampler_1"))
    assert stored.lora is None and stored.init_from is None


# --- what starts from it ----------------------------------------------------------------------


def test_images(system, rounded, original, loaded, mesh):
    """Rounding changes them, by little."""
    options = {"num": 1, "candidates": 1, "decoder": {"steps": 2}}
    systems = System(system, original, mesh), System(rounded.path, loaded, mesh)
    one, other = (each.text2image("a large red circle", **options).numpy for each in systems)
    difference = np.abs(one.astype(int) - other)
    assert 0 < difference.mean() < 4


def test_a_stage_is_trained_on_its_clip(rounded, loaded, tmp_path):
    weights.pack(rounded.path, tmp_path / "mine", stages=("clip",))
    job = build_job(Experiment.from_config(tiny_system.get_config("prior")), tmp_path / "mine")
    same(job.frozen["clip"], loaded["clip"].variables)
    contracts = [json.loads((tmp_path / "mine" / name / "contract.json").read_text()) for name in ("clip", "prior")]
    assert contracts[0] == contracts[1]


def test_fine_tuning_starts_from_it(rounded, loaded, tmp_path):
    config = tiny_system.get_config("decoder")
    config.unlock()
    config.init_from = str(rounded.path)
    job = build_job(Experiment.from_config(config), tmp_path / "mine")
    same(job.start.params, loaded["decoder"].variables.params)
    assert {path.name for path in (tmp_path / "mine").iterdir() if path.is_symlink()} == {*STAGES} - {"decoder"}


def test_training_does_not_continue_in_its_folder(rounded):
    checkpoints = Checkpoints(StageFolder(rounded.path, "clip"))
    with pytest.raises(UserError, check=mentions(rounded.path / "clip/checkpoints/0", "--config.init_from")):
        checkpoints.restore({"params": {"kernel": jax.ShapeDtypeStruct((2,), np.float32)}})


def test_its_rounded_clip_is_another_than_the_original(system, rounded, mesh, tmp_path):
    shutil.copytree(system / "clip", tmp_path / "mixed" / "clip")
    shutil.copytree(rounded.path / "prior", tmp_path / "mixed" / "prior")
    with pytest.raises(ContractError) as error:
        load.load_system(tmp_path / "mixed", mesh, ("clip", "prior"))
    assert error.value.differences.keys() == {"clip"}


@pytest.mark.sharding
def test_on_several_devices(tmp_path):
    array = np.arange(32, dtype=np.float32).reshape(8, 4)
    packed.write(tmp_path / "0", {"ema": {"kernel": array}})
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp", "tensor"))
    leaf = jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)
    loaded = packed.load(tmp_path / "0", {"ema": {"kernel": leaf}})["ema"]["kernel"]
    assert loaded.sharding == sharding
    np.testing.assert_array_equal(loaded, array)


# --- damage and mistakes ----------------------------------------------------------------------


@pytest.fixture
def copy(rounded, tmp_path):
    return shutil.copytree(rounded.path, tmp_path / "copy")


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-5] ^= 16
    path.write_bytes(content)


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-7])


@pytest.mark.parametrize("damage", [flip_a_bit, cut_short])
def test_damage_is_found(copy, mesh, damage):
    damage(weights_of(copy, "upsampler_1"))
    with pytest.raises(
        UserError, check=mentions("stage upsampler_1", copy / "upsampler_1/checkpoints/0", "weights.safetensors")
    ):
        load.load_system(copy, mesh, ("upsampler_1",))


def test_a_file_of_another_network(copy, rounded, mesh):
    shutil.copytree(weights_of(copy, "upsampler_1").parent, weights_of(copy, "clip").parent, dirs_exist_ok=True)
    with pytest.raises(UserError, check=mentions(copy / "clip/checkpoints/0", "102 tensors", "ema/conv_in/bias")):
        load.load_system(copy, mesh, ("clip",))


def test_another_shape(tmp_path):
    packed.write(tmp_path / "0", {"ema": {"kernel": np.ones((2, 3), np.float32)}})
    assert digests.check(tmp_path / "0")
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    leaf = jax.ShapeDtypeStruct((3, 2), np.float32, sharding=sharding)
    with pytest.raises(ValueError, check=mentions("ema/kernel", (2, 3), (3, 2))):
        packed.load(tmp_path / "0", {"ema": {"kernel": leaf}})


def test_without_digests(copy, mesh):
    (weights_of(copy, "upsampler_1").parent / digests.NAME).unlink()
    with pytest.warns(SystemWarning):
        load.load_system(copy, mesh, ("upsampler_1",))


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"dtype": "float16"}, UsageError),
        ({"stages": ("decoders",)}, UsageError),
        ({"stages": ("decoder",)}, UserError),
        ({"stages": ("ar_prior",)}, UserError),
        ({"card": "nowhere.md"}, OSError),
    ],
)
def test_mistakes(system, tmp_path, options, error):
    with pytest.raises(error):
        weights.pack(system, tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


def test_the_target_exists(system, tmp_path):
    with pytest.raises(WeightsError, check=mentions(path=tmp_path)):
        weights.pack(system, tmp_path, stages=("clip",))


def test_the_command(system, tmp_path):
    done = run_here("dalle2", "weights", "pack", system, tmp_path / "out", "--stages", "clip", "upsampler_1")
    assert done.returncode == 0, done.stderr
    assert [line.partition(":")[0] for line in done.stdout.splitlines()] == [
        str(tmp_path / "out" / name) for name in ("clip", "upsampler_1")
    ]
    done = run_here("dalle2", "weights", "pack", tmp_path / "nowhere", tmp_path / "again")
    assert done.returncode == 1 and done.stderr.count("\n") == 1
