"""A system's stages agree on one embedding space, or say which does not and what to do."""

import dataclasses

import pytest
from raised import mentions

from dalle2_jax import testing
from dalle2_jax.errors import ContractError
from dalle2_jax.stages import EmbeddingContract, Variables
from dalle2_jax.system import LoadedStage, check_agreement

CONTRACT = EmbeddingContract("c0ffee", 16, "unit", 17.2)


def member(kind, contract):
    return LoadedStage(testing.tiny_stage(kind), Variables({}, {}), 10, contract, None, 0)


def system(prior=CONTRACT):
    return {
        "clip": member("clip_vit", CONTRACT),
        "prior": member("prior", prior),
        "decoder": member("decoder", CONTRACT),
        "upsampler_1": member("upsampler", None),  # knows no embedding
    }


def test_agreement():
    check_agreement(system(), "runs/demo")
    check_agreement({"upsampler_1": system()["upsampler_1"]}, "runs/demo")


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("clip", "deadbeef", "c0ffee"),
        ("dim", 32, 16),
        ("normalisation", "raw", "unit"),
        ("scale", 1.0, 17.2),
    ],
)
def test_disagreement_names_stage_difference_and_fix(field, value, expected):
    facts = ("stage prior", "runs/demo", field, value, expected, "train prior again")
    with pytest.raises(ContractError, check=mentions(*facts, differences={field: (value, expected)})) as caught:
        check_agreement(system(dataclasses.replace(CONTRACT, **{field: value})), "runs/demo")
    assert "decoder" not in str(caught.value)
