"""A system's stages agree on one embedding space, or say which does not and what to do."""

import dataclasses

import pytest

from dalle2_jax import testing
from dalle2_jax.errors import UserError
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
    ("field", "value", "difference"),
    [
        ("clip", "deadbeef", "clip 'deadbeef' against 'c0ffee'"),
        ("dim", 32, "dim 32 against 16"),
        ("normalisation", "raw", "normalisation 'raw' against 'unit'"),
        ("scale", 1.0, "scale 1.0 against 17.2"),
    ],
)
def test_disagreement_names_stage_difference_and_fix(field, value, difference):
    with pytest.raises(UserError) as caught:
        check_agreement(system(dataclasses.replace(CONTRACT, **{field: value})), "runs/demo")
    message = str(caught.value)
    assert "stage prior in runs/demo" in message and f"({difference})" in message
    assert "train prior again, or put back the clip it was trained with" in message
    assert "decoder" not in message and "\n" not in message
