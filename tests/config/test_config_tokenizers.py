"""The tokenizer of every config page: those that state a published model have that model's, not a newly trained one.

A sentencepiece vocabulary is trained on the run's own captions and may come out smaller than it was asked to be, so
that parameter counts and caption lengths would differ from the published ones.
"""

import importlib.util
import pathlib

import pytest

from dalle2_jax import text
from dalle2_jax.config.experiment import Experiment
from dalle2_jax.system.requirements import own_tokenizer
from dalle2_jax.workdir.folder import StageFolder

ROOT = pathlib.Path(__file__).parents[2]

PUBLISHED = {
    # page: the tokenizer of the published model, and its vocabulary
    "paper": ("clip", 49_408),
    "clip": ("clip", 49_408),
    "karlo": ("clip", 49_408),
    "glide": ("glide", 50_257),
    "adm": ("labels", 1000),
}
OWN = {"ablations", "shapes", "folder", "emoji"}
"""Pages of models that are published nowhere: their tokenizer is trained on the captions."""


def load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "configs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


PAGES = {path.stem: load(path.stem) for path in sorted(ROOT.glob("configs/*.py"))}
STAGES = [(page, which) for page in PUBLISHED for which in PAGES[page].STAGES]


class NoCaptions:
    """A data set of which no tokenizer may be trained."""

    def captions(self, limit):
        raise AssertionError("a vocabulary is trained on the captions of the data set")


def test_every_page_is_known_here():
    assert {*PAGES} == {*PUBLISHED} | OWN | {"shapes_diffusers"}  # which has CLIP's tokenizer, to be exported


@pytest.mark.parametrize(("page", "which"), STAGES)
def test_a_published_model_has_its_published_tokenizer(page, which):
    kind, vocab_size = PUBLISHED[page]
    config = Experiment.from_config(PAGES[page].get_config(which)).spec.text
    assert (config.kind, config.vocab_size) == (kind, vocab_size)


@pytest.mark.parametrize("page", PUBLISHED)
def test_the_tokenizer_of_a_run_is_the_published_one(page, tmp_path):
    """As train.py makes it, it reads no caption of the data and has exactly the published number of tokens."""
    config = PAGES[page].get_config([*PAGES[page].STAGES][0]).to_dict()
    folder = StageFolder(tmp_path, "decoder")
    tokenizer = own_tokenizer(folder, None, Experiment.from_config(config).spec.text, NoCaptions())
    kinds = {"clip": text.ClipTokenizer, "glide": text.GlideTokenizer, "labels": text.LabelTokenizer}
    assert type(tokenizer) is kinds[PUBLISHED[page][0]] and tokenizer.vocab_size == PUBLISHED[page][1]


@pytest.mark.parametrize("page", sorted(OWN))
def test_other_pages_train_one(page):
    for which in PAGES[page].STAGES:
        assert Experiment.from_config(PAGES[page].get_config(which)).spec.text.kind == "sentencepiece"
