"""CLIP's preprocessing of images in the embedding contract: written, compared, and used by what embeds an image."""

import argparse
import dataclasses
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_system
from PIL import Image

from dalle2_jax import data, run, testing
from dalle2_jax.cli import data as data_command
from dalle2_jax.config import inherit, sources
from dalle2_jax.config.experiment import Experiment
from dalle2_jax.config.parse import expand
from dalle2_jax.config.stored import write_experiment
from dalle2_jax.data.images.decoding import crop, fit, preprocess
from dalle2_jax.errors import ContractError
from dalle2_jax.models.clip import Clip
from dalle2_jax.stages import EmbeddingContract, Variables, fingerprint
from dalle2_jax.system import LoadedStage, check_agreement, load
from dalle2_jax.system.generation import clip_input
from dalle2_jax.system.inputs import InputImage
from dalle2_jax.system.requirements import check_contract
from dalle2_jax.types import Preprocessing, complete_contract
from dalle2_jax.workdir.folder import StageFolder

OLD = {"clip": "c0ffee", "dim": 16, "normalisation": "unit", "scale": 17.2}
"""A contract written before contracts had the field."""

SIDE = 16
"""Of the tiny CLIP's input."""

OWN = Preprocessing("bicubic", size=SIDE, crop=SIDE, crop_rounding="even")


# --- contracts ------------------------------------------------------------------------------


def test_an_old_contract_loads_and_equals_one_with_the_default():
    contract = expand(EmbeddingContract, OLD, "contract.json")
    assert contract == EmbeddingContract("c0ffee", 16, "unit", 17.2, Preprocessing())
    again = json.loads(json.dumps(dataclasses.asdict(contract)))
    assert expand(EmbeddingContract, again, "contract.json") == contract
    assert complete_contract(OLD) == complete_contract(again) == again
    assert complete_contract({**OLD, "preprocessing": {"size": 3}})["preprocessing"]["resample"] == "area"


def test_stages_of_old_and_new_contracts_agree_unless_images_are_read_in_another_way():
    stage = testing.tiny_stage("decoder")

    def members(**contracts):
        return {
            name: LoadedStage(stage, Variables({}, {}), 1, expand(EmbeddingContract, each, ""), None, 0)
            for name, each in contracts.items()
        }

    new = dataclasses.asdict(EmbeddingContract(**OLD))
    check_agreement(members(clip=OLD, decoder=new), "here")
    check_agreement(members(clip=new, prior=OLD), "here")
    other = {**OLD, "preprocessing": dataclasses.asdict(OWN)}
    with pytest.raises(ContractError) as caught:
        check_agreement(members(clip=other, decoder=OLD), "here")
    assert [*caught.value.differences] == ["preprocessing"]


def contract_of(root, stage, **fields):
    folder = StageFolder(root, stage)
    write_experiment(folder, Experiment.from_config(tiny_system.get_config(stage)))
    folder.write_json("contract.json", {**OLD, **fields})
    return folder


def test_stored_contracts_are_compared_with_their_defaults(tmp_path):
    new = {"preprocessing": dataclasses.asdict(Preprocessing())}
    base, clip = contract_of(tmp_path / "base", "prior"), contract_of(tmp_path / "run", "clip", **new)
    inherit.check_contract(base, clip)
    assert inherit.incompatible_stages(base, StageFolder(tmp_path / "run", "decoder")) == set()
    decoder = contract_of(tmp_path / "run", "decoder")
    check_contract(decoder, expand(EmbeddingContract, {**OLD, **new}, ""))
    contract_of(tmp_path / "out", "clip")
    load.write_description(tmp_path / "run", tmp_path / "out")  # the same: nothing is written
    for other in (contract_of(tmp_path / "other", "clip", preprocessing=dataclasses.asdict(OWN)),):
        with pytest.raises(ContractError) as caught:
            inherit.check_contract(base, other)
        assert caught.value.differences == {"preprocessing": (Preprocessing(), OWN)}
        with pytest.raises(ContractError):
            check_contract(decoder, expand(EmbeddingContract, other.read_json("contract.json"), ""))
        with pytest.raises(ContractError):
            load.write_description(other.root, tmp_path / "out")


def test_a_clip_that_is_tuned_may_read_images_in_its_own_way(tmp_path):
    base = contract_of(tmp_path / "base", "prior")
    tuned = contract_of(tmp_path / "run", "clip", clip="decaf", preprocessing=dataclasses.asdict(OWN))
    tuned.write_json("base.json", {"weights": OLD["clip"]})
    inherit.check_contract(base, tuned)


def recorded(root, stage, params):
    """The contract that a finished CLIP's run leaves."""
    folder = StageFolder(root, "clip")
    run.record_contract(SimpleNamespace(stage=stage, folder=folder, frozen={}), params)
    return folder.read_json("contract.json")


def test_a_finished_clip_records_how_it_read_images(tmp_path):
    stage = dataclasses.replace(testing.tiny_stage("clip_vit"), preprocessing=Preprocessing(size=12))
    params = testing.tiny_variables(stage).params
    assert recorded(tmp_path / "new", stage, params)["preprocessing"]["size"] == 12
    old = {**OLD, "clip": fingerprint(params)}  # the same CLIP, whose stages have no such field
    StageFolder(tmp_path / "old", "clip").write_json("contract.json", old)
    assert recorded(tmp_path / "old", stage, params)["preprocessing"] == dataclasses.asdict(Preprocessing())


def test_a_config_says_how_its_clip_reads_images():
    config = tiny_system.get_config("clip").to_dict()
    trained = Experiment.from_config({**config, "data": {"kind": "folder", "resolution": 24}})
    assert trained.preprocessing == Preprocessing(size=24)
    assert (
        Experiment.from_config({key: config[key] for key in config if key != "data"}).preprocessing == Preprocessing()
    )
    imported = Experiment.from_config({**config, "preprocessing": dataclasses.asdict(OWN)})
    assert imported.preprocessing == OWN
    assert inherit.inherited(trained, imported).preprocessing == OWN
    assert inherit.inherited(imported, trained).preprocessing == Preprocessing(size=8)  # of the run's own data


# --- use ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def image():
    return np.random.default_rng(0).integers(0, 256, (21, 34, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def clip():
    """A tiny CLIP that was imported with its own preprocessing."""
    stage = dataclasses.replace(testing.tiny_stage("clip_vit"), preprocessing=OWN)
    return stage, testing.tiny_variables(stage)


def members_of(clip, how):
    stage, variables = clip
    decoder = testing.tiny_stage("decoder")
    contract = EmbeddingContract("c0ffee", stage.model.embed_dim, preprocessing=how)
    return {
        "clip": LoadedStage(stage, variables, 1, contract, None, 0),
        "decoder": LoadedStage(decoder, Variables({}, {}), 1, contract, None, 0),
    }


def test_sampling_embeds_an_image_as_its_clip_reads_it(clip, image):
    side = clip[0].model.tower.image_size
    given = InputImage(image, "in memory")
    own = clip_input(members_of(clip, OWN)["clip"], [given, given])
    np.testing.assert_array_equal(own, np.stack([preprocess(image, OWN, side)] * 2))
    old = clip_input(members_of(clip, Preprocessing())["clip"], [given])
    np.testing.assert_array_equal(old[0], crop(fit(image, side), side))


def test_the_embedding_is_that_of_the_published_pipeline(clip, image):
    stage, variables = clip
    reference = Image.fromarray(image).resize((25, 16), Image.Resampling.BICUBIC).crop((4, 0, 20, 16))
    pixels = jnp.asarray(np.asarray(reference), jnp.float32)[None] / 127.5 - 1.0
    embed = jax.jit(lambda x: stage.network.apply({"params": variables.params}, x, method=Clip.encode_image))
    theirs = stage.embedding.apply(embed(pixels))[0]
    given = [InputImage(image, "in memory")]
    inputs = [clip_input(members_of(clip, how)["clip"], given) for how in (OWN, Preprocessing())]
    ours, old = jax.jit(stage.encode_image)(variables, np.concatenate(inputs))

    def cosine(one, other):
        return float(one @ other / jnp.linalg.norm(one) / jnp.linalg.norm(other))

    assert cosine(ours, theirs) == pytest.approx(1.0, abs=1e-5)
    assert cosine(old, theirs) < 1 - 1e-4


def test_training_images_are_resized_on_the_device_by_clips_filter(clip):
    stage, _ = clip
    side = stage.model.tower.image_size
    images = np.random.default_rng(1).integers(0, 256, (2, 2 * side, 2 * side, 3), dtype=np.uint8)
    small = np.stack([preprocess(each, OWN, side) for each in images])
    fitted, expected = stage._fit(images), jnp.asarray(small, jnp.float32) / 127.5 - 1.0
    assert float(jnp.abs(fitted - expected).max()) < 1.01 / 127.5  # one level
    by_area = dataclasses.replace(stage, preprocessing=Preprocessing())._fit(images)
    assert float(jnp.abs(by_area - expected).max()) > 10 / 127.5


def embedded(folder, system, how, **given):
    """The images that `data embed` reads."""
    options = argparse.Namespace(
        data=None,
        config=None,
        system=system,
        split="train",
        resolution=None,
        max_rejected=0.1,
        trust_system=True,
    )
    return data_command._embedded_data(argparse.Namespace(**{**vars(options), **given}), how, SIDE)


def test_data_is_embedded_as_clip_reads_it(tmp_path, image):
    (tmp_path / "images").mkdir()
    Image.fromarray(image).save(tmp_path / "images" / "0.png")
    (tmp_path / "images" / "0.txt").write_text("noise")
    section = {"kind": "folder", "path": str(tmp_path / "images"), "resolution": 5}
    config = {**tiny_system.get_config("clip").to_dict(), "data": section}
    write_experiment(StageFolder(tmp_path, "clip"), Experiment.from_config(config))
    for given in ({"data": f"folder:{tmp_path / 'images'}"}, {}):
        own = data.example(embedded(tmp_path, tmp_path, OWN, **given), 0)["image"]
        np.testing.assert_array_equal(own, preprocess(image, OWN, SIDE))
    smaller = data.example(embedded(tmp_path, tmp_path, OWN, resolution=6), 0)["image"]
    np.testing.assert_array_equal(smaller, preprocess(image, Preprocessing("bicubic", crop_rounding="even"), 6))
    trained = data.example(embedded(tmp_path, tmp_path, Preprocessing(size=5)), 0)["image"]
    np.testing.assert_array_equal(trained, crop(fit(image, 5), 5))


def test_a_clip_that_is_tuned_trains_on_images_read_as_before(tmp_path, image):
    Image.fromarray(image).save(tmp_path / "0.png")
    (tmp_path / "0.txt").write_text("noise")
    section = {"kind": "folder", "path": str(tmp_path), "resolution": SIDE}
    trained = Experiment.from_config({**tiny_system.get_config("clip").to_dict(), "data": section})
    source = sources.open_source(trained.data, "train", trained.preprocessing)
    assert source.preprocessing == Preprocessing(size=SIDE)
    own = sources.open_source(trained.data, "train", OWN)
    np.testing.assert_array_equal(data.example(own, 0)["image"], preprocess(image, OWN, SIDE))
    assert isinstance(own, data.ImageSource)
