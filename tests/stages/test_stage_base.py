"""A fingerprint names the numbers, not where they lie."""

import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle2_jax import testing
from dalle2_jax.stages import Stage, contract, fingerprint
from dalle2_jax.stages.base import clip_columns, select_columns
from dalle2_jax.training.sharding import MeshConfig, make_mesh
from dalle2_jax.types import Batch


def params():
    return {"a": {"kernel": jnp.arange(64.0).reshape(8, 8) - 30.5}, "b": jnp.full(3, 2.0)}


@pytest.mark.sharding
def test_the_same_however_it_is_sharded():
    mesh = make_mesh(MeshConfig(2, 2, 2))
    spread = jax.NamedSharding(mesh, jax.P(("data", "fsdp"), "tensor"))
    moved = {**params(), "a": jax.device_put(params()["a"], spread)}
    assert fingerprint(moved) == fingerprint(params()) == fingerprint(jax.tree.map(np.asarray, params()))
    assert len(fingerprint(params())) == 8


CHANGES = {
    "two values exchanged": lambda kernel: kernel.at[0, 0].set(kernel[5, 3]).at[5, 3].set(kernel[0, 0]),
    "opposite values exchanged": lambda kernel: kernel.at[3, 6].set(-kernel[3, 6]).at[3, 7].set(-kernel[3, 7]),
    "rows exchanged": lambda kernel: kernel[::-1],
    "transposed": lambda kernel: kernel.T,
    "every sign": lambda kernel: -kernel,
    "one bit": lambda kernel: kernel.at[2, 2].set(jnp.nextafter(kernel[2, 2], jnp.float32(99))),
    "another shape": lambda kernel: kernel.reshape(4, 16),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_any_change_of_a_value_shows(change):
    changed = params()
    changed["a"]["kernel"] = change(changed["a"]["kernel"])
    assert fingerprint(changed) != fingerprint(params())


def test_names_count():
    moved = params()
    moved["c"] = moved.pop("b")
    assert fingerprint(moved) != fingerprint(params())


@pytest.mark.parametrize("kind", testing.KINDS)
def test_a_stage_is_a_value_without_arrays(kind):
    stage = testing.tiny_stage(kind)
    assert stage == testing.tiny_stage(kind) and hash(stage) == hash(testing.tiny_stage(kind))
    assert stage.requires in ((), ("clip",))
    assert all(hasattr(stage, member) for member in Stage.__annotations__ | {"init": 0, "prepare": 0, "loss": 0})


def test_columns_to_select_are_the_inputs_or_what_clip_computes_them_from():
    inputs = testing.tiny_stage("prior").inputs
    assert inputs == ("image_emb", "text_emb", "tokens", "mask")
    assert clip_columns(inputs) == ("image_emb", "text_emb")
    assert select_columns(inputs, ("image", "tokens", "mask")) == ("image", "tokens", "mask")
    assert select_columns(inputs, ("image_emb", "tokens", "mask")) == ("image_emb", "tokens", "mask")
    assert select_columns(inputs, inputs) == inputs
    assert select_columns(("image", "low_res"), ("image",)) == ("image", "low_res")  # the data set's error names it


@pytest.mark.parametrize("kind", testing.KINDS)
def test_every_input_is_a_column_and_is_enough_for_the_loss(kind):
    stage = testing.tiny_stage(kind)
    frozen, variables = testing.tiny_frozen(stage), testing.tiny_variables(stage)
    batch = stage.prepare(frozen, testing.tiny_batch(2))
    assert {*stage.inputs} <= {*batch} and {*stage.inputs} <= Batch.__optional_keys__
    batch = {name: batch[name] for name in stage.inputs}
    loss, _ = jax.eval_shape(stage.loss, *variables, frozen, jax.random.key(0), batch)
    assert loss.shape == ()


def test_the_value_is_that_of_earlier_versions():
    """Contracts store it. By definition: MurmurHash3's finaliser over bits and flat indices."""
    weights = params()["a"]
    mixed = np.asarray(weights["kernel"]).reshape(-1).view(np.uint32)
    mixed = mixed ^ np.arange(64, dtype=np.uint32) * np.uint32(2_654_435_761)
    for multiplier, shift in ((0x85EBCA6B, 16), (0xC2B2AE35, 13), (1, 16)):
        mixed = (mixed ^ (mixed >> np.uint32(shift))) * np.uint32(multiplier)
    entry = f"['kernel']:(8, 8):{int(mixed.sum(dtype=np.uint32))}"
    assert fingerprint(weights) == f"{zlib.crc32(entry.encode(), 0):08x}"


@pytest.mark.sharding
def test_no_weights_are_gathered():
    mesh = make_mesh(MeshConfig(2, 2, 2))
    leaf = jax.ShapeDtypeStruct((8, 6, 4), jnp.float32, sharding=jax.NamedSharding(mesh, jax.P("data", None, "fsdp")))
    assert "all-gather" not in contract._checksum.lower(leaf).compile().as_text()
