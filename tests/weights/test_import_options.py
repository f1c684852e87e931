"""The options ``table_dtype`` and ``html_unescape`` of an import: the stored config and tokenizer."""

import pytest
from checkpoints import import_into
from karlo_recordings import FOLDER

from dalle2_jax.config.parse import expand
from dalle2_jax.config.stored import write_experiment
from dalle2_jax.stages import DiffusionConfig
from dalle2_jax.weights import importer
from dalle2_jax.weights.stage_writer import Trees, imported_experiment


@pytest.fixture
def written(monkeypatch):
    """Returns the components of an import by stage; their arrays are neither read nor written."""
    components = {}

    def write(folder, component, trees, contract):
        components[component.stage] = component
        folder.path.mkdir(parents=True, exist_ok=True)
        if component.tokenizer is not None:
            component.tokenizer.save(folder.path / "tokenizer")
        if component.stage == "clip":
            write_experiment(folder, imported_experiment(component))
            folder.write_json("contract.json", {"clip": "0", "dim": component.config["model"]["embed_dim"]})

    monkeypatch.setattr(importer, "read_arrays", lambda *_: Trees({}, {}))
    monkeypatch.setattr(importer, "write_stage", write)
    return components


@pytest.mark.parametrize("words", [(), ("--table_dtype", "float32", "--html_unescape", "no")], ids=["default", "given"])
def test_options_are_stored_with_every_stage(words, written, tmp_path):
    import_into(tmp_path / "karlo", FOLDER, *words)
    for stage in ("prior", "decoder", "upsampler_1"):
        section = written[stage].config["diffusion"]
        assert ("table_dtype" in section) == bool(words)
        assert expand(DiffusionConfig, section, "diffusion").table_dtype == ("float32" if words else "float64")
    for stage in ("clip", "prior", "decoder"):
        assert written[stage].tokenizer.html_unescape == (not words)
