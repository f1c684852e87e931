import pickle
from collections import Counter

import numpy as np
import pytest

from dalle2_jax import build
from dalle2_jax.data import (
    EmbeddingsConfig,
    FolderConfig,
    MixtureConfig,
    MixtureSource,
    ShapesConfig,
    Source,
    fixed_batch,
    make_source,
    make_stream,
)
from dalle2_jax.types import UserError

COUNTS = {"a": 7, "b": 3, "c": 3, "d": 12}


class Marked:
    """Pictures that show the number of their source and their own."""

    def __init__(self, source, count):
        self.source, self.count, self.rejected = source, count, Counter(torn=source)

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        image = np.array([[[self.source, index, 0]]], np.uint8)
        return {"image": image, "captions": ("",), "caption": ""}

    def draw(self, index, rng):
        return self[index]["image"], str(rng.integers(9))

    def captions(self, limit):
        return iter([f"{self.source} {index}" for index in range(min(limit, self.count))])


def _mixture(**weights):
    names = sorted(COUNTS)
    return MixtureSource({name: (Marked(names.index(name), COUNTS[name]), weights[name]) for name in weights})


def _drawn(source, batches, seed=0, start=0, num_threads=1):
    stream = make_stream(source, None, 8, 10, seed, num_threads=num_threads)
    stream.set_state({"global_next_index": start})
    return [tuple(row) for _ in range(batches) for row in next(stream)["image"][:, 0, 0, :2].tolist()]


def test_a_mixture_is_the_union_of_its_parts():
    mixture = pickle.loads(pickle.dumps(_mixture(a=1, b=1, c=5, d=1)))
    assert isinstance(mixture, Source) and len(mixture) == 25
    shown = [tuple(mixture[index]["image"][0, 0, :2].tolist()) for index in range(25)]
    assert set(shown) == {(place, own) for place, name in enumerate("abcd") for own in range(COUNTS[name])}
    assert {source for source, _ in shown[:4]} == {0, 1, 2, 3} and shown[-1] == (3, 11)
    assert mixture[-1]["image"].tolist() == mixture[24]["image"].tolist()
    assert mixture.rejected == {"b: torn": 1, "c: torn": 2, "d: torn": 3}
    with pytest.raises(IndexError):
        mixture[25]


def test_every_stretch_of_a_stream_has_the_shares_of_the_weights():
    drawn = _drawn(_mixture(a=1, b=2, d=1), 40)
    assert len(drawn) == 400
    for first in range(0, 400, 80):
        assert Counter(source for source, _ in drawn[first : first + 80]) == {0: 20, 1: 40, 3: 20}


def test_each_part_is_shuffled_by_itself_and_seen_once_a_pass():
    drawn = _drawn(_mixture(a=1, b=1, d=2), 30)
    for source, count in ((0, 7), (1, 3), (3, 12)):
        own = [index for part, index in drawn if part == source]
        passes = [own[first : first + count] for first in range(0, len(own) - count + 1, count)]
        assert len(passes) > 5 and all(sorted(one) == list(range(count)) for one in passes)
        assert len({tuple(one) for one in passes}) > 2
    others = _drawn(_mixture(a=1, b=1, d=2), 30, seed=1)
    assert [source for source, _ in others] == [source for source, _ in drawn] and others != drawn


@pytest.mark.parametrize("num_threads", [0, 2])
def test_a_mixture_resumes_at_any_index(num_threads):
    whole = _drawn(_mixture(a=1.5, b=1, d=3.2), 12)
    assert _drawn(_mixture(a=1.5, b=1, d=3.2), 5, start=70, num_threads=num_threads) == whole[70:]


def test_captions_are_shared_by_weight():
    spoken = list(_mixture(a=1, d=3).captions(16))
    assert Counter(caption[0] for caption in spoken) == {"0": 4, "3": 12}


def test_a_mixture_by_configuration():
    section = {
        "kind": "mixture",
        "resolution": 8,
        "parts": {"one": {"kind": "shapes", "num_examples": 5}, "two": {"kind": "shapes", "max_objects": 2}},
        "weights": {"one": 1.0, "two": 3},
    }
    source = build.open_source({"data": section}, "train")
    assert len(source) == 50_005 and source.weights == {"one": 1, "two": 3}
    batch, _ = fixed_batch(source, None, 8, range(4))
    assert batch["image"].shape == (4, 8, 8, 3)
    even = make_source(MixtureConfig({"one": ShapesConfig()}), "train")
    assert even.weights == {"one": 1} and hash(MixtureConfig({"one": ShapesConfig()}))
    section["parts"]["one"]["max_object"] = 1
    with pytest.raises(UserError, match="field of config.data.parts.one 'max_object': did you mean"):
        build.open_source({"data": section}, "train")


def test_mistakes_are_answered():
    shapes = ShapesConfig()
    for arguments, message in (
        ({"parts": {"a": MixtureConfig({"b": shapes})}}, "part a is a mixture itself"),
        ({"parts": {"a": EmbeddingsConfig("x")}}, "part a has embeddings: a mixture is of pictures"),
        ({"parts": {"a": FolderConfig("x", embeddings="y")}}, "part a has embeddings: a mixture is of pictures"),
        ({"parts": {"a": shapes}, "resolution": 32}, "part a has resolution 64, the mixture 32"),
        ({"parts": {"a": shapes}, "weights": {"b": 1.0}}, "weights must name every part and nothing else: a"),
    ):
        with pytest.raises(UserError, match=message):
            MixtureConfig(**arguments)
    for parts, message in (
        ({}, "no parts"),
        ({"a": (Marked(0, 0), 1)}, "part a of the mixture, .* no examples"),
        ({"a": (Marked(0, 1), 0)}, "weight of part a must be a positive"),
        ({"a": (Marked(0, 1), float("nan"))}, "weight of part a must be a positive"),
        ({"a": (Marked(0, 1), "much")}, "weight of part a must be a positive number, not 'much'"),
    ):
        with pytest.raises(UserError, match=message):
            MixtureSource(parts)
