import pickle
from collections import Counter

import numpy as np
import pytest
from raised import mentions
from streams import text_stream

from dalle2_jax.config import sources
from dalle2_jax.data import (
    EmbeddingsConfig,
    FolderConfig,
    MixtureConfig,
    MixtureSource,
    Rejections,
    ShapesConfig,
    Source,
    example,
    fixed_batch,
    make_source,
)
from dalle2_jax.data.sources import checked_indices, objects
from dalle2_jax.errors import ConfigError, UserError

COUNTS = {"a": 7, "b": 3, "c": 3, "d": 12}


class Marked(Source):
    """A source whose images hold the number of the source and their own index."""

    columns = ("image", "caption", "captions")

    def __init__(self, source, count):
        self.source, self.count = source, count

    @property
    def rejections(self):
        return Rejections({"torn": self.source} if self.source else {}, {"7": "lost"} if self.source == 3 else {})

    def __len__(self):
        return self.count

    def fetch(self, indices, rngs=None):
        places = checked_indices(indices, self.count).tolist()
        images = np.array([[[[self.source, index, 0]]] for index in places], np.uint8)
        columns = {"image": images, "caption": [""] * len(places), "captions": [("",)] * len(places)}
        return {name: columns[name] if name == "image" else objects(columns[name]) for name in self.columns}

    def captions(self, limit):
        return iter([f"{self.source} {index}" for index in range(min(limit, self.count))])


def _mixture(**weights):
    names = sorted(COUNTS)
    return MixtureSource({name: (Marked(names.index(name), COUNTS[name]), weights[name]) for name in weights})


def _fetched(source, batches, seed=0, start=0, num_threads=1):
    stream = text_stream(source, None, 8, 10, seed, num_threads=num_threads)
    stream.set_state({"global_next_index": start})
    return [tuple(row) for _ in range(batches) for row in next(stream)["image"][:, 0, 0, :2].tolist()]


def test_a_mixture_is_the_union_of_its_sources():
    mixture = pickle.loads(pickle.dumps(_mixture(a=1, b=1, c=5, d=1)))
    assert isinstance(mixture, Source) and len(mixture) == 25
    shown = [tuple(example(mixture, index)["image"][0, 0, :2].tolist()) for index in range(25)]
    assert set(shown) == {(place, own) for place, name in enumerate("abcd") for own in range(COUNTS[name])}
    assert {source for source, _ in shown[:4]} == {0, 1, 2, 3} and shown[-1] == (3, 11)
    assert example(mixture, -1)["image"].tolist() == example(mixture, 24)["image"].tolist()
    assert mixture.rejections.counts == {"b: torn": 1, "c: torn": 2, "d: torn": 3, "d: lost": 1}
    assert mixture.rejections.records == {"d: 7": "d: lost"}
    with pytest.raises(IndexError):
        mixture.fetch([25])


def test_every_window_of_a_stream_has_the_proportions_of_the_weights():
    rows = _fetched(_mixture(a=1, b=2, d=1), 40)
    assert len(rows) == 400
    for first in range(0, 400, 80):
        assert Counter(source for source, _ in rows[first : first + 80]) == {0: 20, 1: 40, 3: 20}


def test_each_source_is_shuffled_separately_and_visited_once_an_epoch():
    rows = _fetched(_mixture(a=1, b=1, d=2), 30)
    for source, count in ((0, 7), (1, 3), (3, 12)):
        own = [index for part, index in rows if part == source]
        passes = [own[first : first + count] for first in range(0, len(own) - count + 1, count)]
        assert len(passes) > 5 and all(sorted(one) == list(range(count)) for one in passes)
        assert len({tuple(one) for one in passes}) > 2
    others = _fetched(_mixture(a=1, b=1, d=2), 30, seed=1)
    assert [source for source, _ in others] == [source for source, _ in rows] and others != rows


@pytest.mark.parametrize("num_threads", [0, 2])
def test_a_mixture_resumes_at_any_index(num_threads):
    uninterrupted = _fetched(_mixture(a=1.5, b=1, d=3.2), 12)
    assert _fetched(_mixture(a=1.5, b=1, d=3.2), 5, start=70, num_threads=num_threads) == uninterrupted[70:]


def test_captions_are_mixed_in_proportion_to_the_weights():
    captions = list(_mixture(a=1, d=3).captions(16))
    assert Counter(caption[0] for caption in captions) == {"0": 4, "3": 12}


def test_a_mixture_is_built_from_a_configuration():
    section = {
        "kind": "mixture",
        "resolution": 8,
        "parts": {"one": {"kind": "shapes", "num_examples": 5}, "two": {"kind": "shapes", "max_objects": 2}},
        "weights": {"one": 1.0, "two": 3},
    }
    source = sources.open_source(sources.parse_source(section), "train")
    assert len(source) == 50_005 and source.weights == {"one": 1, "two": 3}
    batch, _ = fixed_batch(source, range(4))
    assert batch["image"].shape == (4, 8, 8, 3)
    even = make_source(MixtureConfig({"one": ShapesConfig()}), "train")
    assert even.weights == {"one": 1} and hash(MixtureConfig({"one": ShapesConfig()}))
    section["parts"]["one"]["max_object"] = 1
    with pytest.raises(ConfigError, check=mentions("'max_objects'", field="data.parts.one.max_object")):
        sources.open_source(sources.parse_source(section), "train")


def test_invalid_mixtures_raise_user_errors():
    shapes = ShapesConfig()
    for arguments, facts in (
        ({"parts": {"a": MixtureConfig({"b": shapes})}}, ["part a", "a mixture itself"]),
        ({"parts": {"a": EmbeddingsConfig("x")}}, ["part a", "embeddings"]),
        ({"parts": {"a": FolderConfig("x", embeddings="y")}}, ["part a", "embeddings"]),
        ({"parts": {"a": shapes}, "resolution": 32}, ["part a", "resolution 64", 32]),
        ({"parts": {"a": shapes}, "weights": {"b": 1.0}}, ["weights", "a"]),
    ):
        with pytest.raises(UserError, check=mentions(*facts)):
            MixtureConfig(**arguments)
    for parts, facts in (
        ({}, ["no parts", "config.data.parts"]),
        ({"a": (Marked(0, 0), 1)}, ["part a", "no examples"]),
        ({"a": (Marked(0, 1), 0)}, ["part a", "positive", 0]),
        ({"a": (Marked(0, 1), float("nan"))}, ["part a", "positive", "nan"]),
        ({"a": (Marked(0, 1), "much")}, ["part a", "positive", "'much'"]),
    ):
        with pytest.raises(UserError, check=mentions(*facts)):
            MixtureSource(parts)
