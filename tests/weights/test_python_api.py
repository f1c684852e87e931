"""`dalle2_jax.weights` from Python: import_weights, inspect and export."""

import json
import subprocess
import sys

import checkpoints
import jax
import numpy as np
import pytest
from checkpoints import KARLO, VARIATIONS, listing
from raised import mentions

from dalle2_jax import weights
from dalle2_jax.errors import UsageError, WeightsError
from dalle2_jax.system import load
from dalle2_jax.training.sharding import MeshConfig, make_mesh
from dalle2_jax.weights import detect, exporter, importer
from dalle2_jax.weights.config_files import WeightsWarning
from dalle2_jax.weights.kinds import FORMS, KINDS


@pytest.fixture(scope="module")
def system(tmp_path_factory):
    """Returns a system of Karlo-tiny with its image tower, imported from a list of paths, and the report."""
    root = tmp_path_factory.mktemp("api") / "system"
    return root, weights.import_weights([str(KARLO), VARIATIONS / "image_encoder"], str(root))


def test_the_report_lists_the_stages(system, capsys):
    root, report = system
    assert [stage.name for stage in report.stages] == ["clip", "prior", "decoder", "upsampler_1"]
    assert [stage.path for stage in report.stages] == [root / stage.name for stage in report.stages]
    assert report.stages[1].family == "Karlo prior" and all(stage.parameters > 0 for stage in report.stages)
    assert report.skipped == () and not any(capsys.readouterr())


def test_one_path_is_a_list_of_one(tmp_path, capsys):
    path = checkpoints.openai_clip(tmp_path / "clip.safetensors")
    for source in (path, str(path)):
        (clip,) = weights.inspect(source).components
        assert (clip.stage, clip.embed_dim, clip.complete, clip.dtypes) == ("clip", 64, True, ("float32",))
    assert not any(capsys.readouterr())


def test_inspect_reports_incomplete_parts_and_skipped_files(tmp_path):
    files = checkpoints.karlo_five(tmp_path / "five")
    found = weights.inspect(files)
    stats = next(each for each in found.components if each.family == "Karlo statistics")
    assert not stats.complete and stats.completed_by == "the prior" and found.skipped == (files / "notes.safetensors",)


def test_export_and_import_again(system, tmp_path, capsys):
    report = weights.export(str(system[0]), str(tmp_path / "out"), form="hf_clip")
    assert (report.path, report.stages) == (tmp_path / "out", ("clip",))
    weights.import_weights(tmp_path / "out", tmp_path / "again")
    ours, theirs = (
        load.load_system(root, make_mesh(MeshConfig()), ("clip",)) for root in (system[0], report.path.parent / "again")
    )
    jax.tree.map(np.testing.assert_array_equal, ours["clip"].variables, theirs["clip"].variables)
    assert not any(capsys.readouterr())


INVALID = {
    # argument: call, and what else the error mentions
    "kind": (lambda to: weights.import_weights(KARLO, to, kind="carlo"), "'carlo'", "'karlo'"),
    "dtype": (lambda to: weights.import_weights(KARLO, to, dtype="float16"), "'float16'"),
    "table_dtype": (lambda to: weights.import_weights(KARLO, to, table_dtype="bfloat16"), "'bfloat16'"),
    "hint": (lambda to: weights.import_weights(KARLO, to, head_chanels=3), "'head_chanels'", "'head_channels'"),
    "image_size": (lambda to: weights.import_weights(KARLO, to, image_size=0), 1, 0),
    "attention order": (lambda to: weights.inspect(KARLO, attention_order="newer"), "'newer'", "'new'"),
    "form": (lambda to: weights.export(to, to, form="onnx"), "'onnx'", "diffusers"),
}


@pytest.mark.parametrize("argument", INVALID)
def test_invalid_arguments(argument, tmp_path):
    call, *facts = INVALID[argument]
    with pytest.raises(UsageError, check=mentions(argument, *facts)):
        call(tmp_path / "new")
    assert not listing(tmp_path)


def test_errors_have_a_path(tmp_path):
    with pytest.raises(WeightsError, check=mentions(path=tmp_path / "none")):
        weights.import_weights(tmp_path / "none", tmp_path / "new")
    assert not listing(tmp_path)


def test_a_stage_without_a_tokenizer_causes_a_warning(tmp_path):
    source = checkpoints.FIXTURES / "weights" / "clip_torchscript.pt"
    with pytest.warns(WeightsWarning, match=f"{source} .*tokenizer"):
        weights.import_weights(source, tmp_path / "system")
    assert json.loads((tmp_path / "system" / "clip" / "contract.json").read_text())["normalisation"] == "raw"


def test_the_tables_have_the_names_of_kinds():
    assert tuple(detect.DETECTORS) == KINDS and tuple(exporter._WRITERS) == FORMS
    assert set(detect._ALL[:-1]) == {each for kind in KINDS[:-3] for each in detect.DETECTORS[kind]}
    assert importer._DTYPES.keys() == {"float32", "bfloat16"}


def test_the_parser_imports_no_numerical_library():
    """`--help` must be fast."""
    code = (
        "import sys; from dalle2_jax.cli.weights import make_parser; make_parser().format_help(); print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"jax", "numpy", "tqdm", "grain"} & set(done.stdout.split())
