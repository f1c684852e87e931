"""A run that diverged continues with the words that it printed; and who may change what in a folder."""

import dataclasses
import json
import re
import shutil
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_system
from absl import flags
from ml_collections import config_flags
from raised import mentions

from dalle2_jax import run, testing, text
from dalle2_jax.cli.process import run_cli
from dalle2_jax.config.experiment import Experiment, resume_changes
from dalle2_jax.errors import ConfigError, UserError
from dalle2_jax.run import build_job, record_contract
from dalle2_jax.stages import EmbeddingContract
from dalle2_jax.system import load
from dalle2_jax.training import loop
from dalle2_jax.training.loop import train
from dalle2_jax.training.optim import make_optimizer
from dalle2_jax.training.sharding import MeshConfig, make_mesh
from dalle2_jax.workdir import digests
from dalle2_jax.workdir.checkpoints import Checkpoints
from dalle2_jax.workdir.folder import StageFolder

CONFIG = "tests/support/tiny_system.py:clip"
RUN = ("--config.total_steps=4", "--config.checkpoint_every=2", "--config.optim.warmup_steps=0")
LIMIT = 1.5e-3


def job_of(root, *words):
    """The job of a command line, of flags as train.py defines them."""
    argv, values = ["train.py", f"--config={CONFIG}", *RUN, *words], flags.FlagValues()
    options = {"lock_config": False, "accept_new_attributes": True, "flag_values": values}
    config = config_flags.DEFINE_config_file("config", None, "", **options)
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # ml_collections calls load_module()
        patch.setattr(sys, "argv", argv)  # where it looks for the fields
        values(argv)
    changes = resume_changes(config.value)
    return build_job(Experiment.from_config(config.value), root, CONFIG, resume_changes=changes)


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Runs train.py's command in this process; returns its exit code and the last line of its standard error.

    The train step is a stand-in that learns nothing, and diverges at step 3 with a learning rate above `LIMIT`.
    """

    def execute(*words):
        def main():
            run = job_of(tmp_path, *words)
            metrics = {"loss": jnp.float32(1.0)}
            bad = run.folder.read_json("experiment.json")["optim"]["lr"] > LIMIT

            def step(state, frozen, key, batch):
                value = jnp.nan if bad and int(state.step) >= 2 else 0.0
                return state.replace(step=state.step + 1, ema={**state.ema, "logit_scale": jnp.float32(value)}), metrics

            monkeypatch.setattr(loop, "make_train_step", lambda *_: step)
            monkeypatch.setattr(loop, "compile_ahead", lambda *_: None)
            record_contract(run, train(run).ema)

        code = run_cli.run_cli(main)
        return code, (capsys.readouterr().err.splitlines() or [""])[-1]

    return execute


def read(path):
    return json.loads(path.read_text())


def test_the_words_of_a_run_that_diverged_continue_it(command, tmp_path):
    first = ("--config.optim.lr=0.002", "--config.optim.weight_decay=0.1")
    folder = StageFolder(tmp_path, "clip")
    code, line = command(*first)
    assert code == 1 and "step 2" in line and line.startswith("error: ")
    assert folder.latest_step() == 2 and not (folder.path / "contract.json").exists()
    words = re.findall(r"--config\.\S+", line)
    assert len(words) == 2
    code, line = command(*first, *words[:1])
    assert code == 1 and words[1] in line  # the flag that is missing is named
    assert command(*first, *words)[0] == 0
    assert folder.latest_step() == 4 and (folder.path / "contract.json").exists()
    (change,) = read(folder.path / "run.json")["changes"]
    assert change == {"step": 2, "fields": {"optim.lr": [0.002, 0.001]}}
    stored = read(folder.path / "experiment.json")
    assert stored["optim"]["lr"] == 0.001 and "resume_changes" not in stored
    assert command(*first, words[0])[0] == 0  # now the folder's own
    run = read(folder.path / "run.json")
    assert run["config"] == CONFIG and run["changes"] == [change]


def test_a_run_decays_by_the_rules_of_its_stage(tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(run, "make_optimizer", lambda *args: given.append(args[2]) or make_optimizer(*args))
    assert given == [job_of(tmp_path).stage.training_rules.decay] and given[0]


def with_checkpoint(root, *words):
    """Starts a run, with a checkpoint that nothing reads."""
    folder = job_of(root, *words).folder
    (folder.path / "checkpoints" / "2").mkdir(parents=True)
    return folder


def test_clipping_is_not_switched_on_or_off_in_a_run(tmp_path):
    folder = with_checkpoint(tmp_path, "--config.optim.clip_norm=0.0")
    with pytest.raises(ConfigError, check=mentions(0, 1, "--config.init_from", field="optim.clip_norm")):
        job_of(tmp_path, "--config.optim.clip_norm=1.0", "--config.resume_changes=True")
    assert read(folder.path / "experiment.json")["optim"]["clip_norm"] == 0


def test_only_the_optimizer_may_change(tmp_path):
    folder = with_checkpoint(tmp_path)
    with pytest.raises(UserError, check=mentions(folder.path, "seed", 0, 5, "optim.lr", 0.001, 0.5)) as error:
        job_of(tmp_path, "--config.seed=5", "--config.optim.lr=0.5", "--config.resume_changes=True")
    assert "resume_changes" not in str(error.value)  # it would not help
    assert "changes" not in read(folder.path / "run.json")


@pytest.mark.parametrize("value", ["1", "yes"])
def test_resume_changes_is_true_or_false(tmp_path, value):
    with pytest.raises(ConfigError, check=mentions(True, False, value, field="resume_changes")):
        job_of(tmp_path, f"--config.resume_changes={value}")


# --- averaged statistics ----------------------------------------------------------------------


def write_resnet(root):
    """Writes a finished CLIP with a ResNet, whose averaged statistics are all 3 and whose last ones are all 7."""
    config = tiny_system.get_config("clip").to_dict() | {"total_steps": 2}
    config["text"] = {"kind": "labels", "vocab_size": 10, "context_length": 2}
    config["model"]["vision"] = {"kind": "resnet", "layers": [1], "width": 8, "heads": 4, "image_size": 8}
    folder = StageFolder(root, "clip")
    stage = Experiment.from_config(config).build(10, None)
    variables = testing.tiny_variables(stage)
    last, averaged = (jax.tree.map(lambda leaf, n=n: jnp.full_like(leaf, n), variables.stats) for n in (7.0, 3.0))
    checkpoints = Checkpoints(folder)
    checkpoints.save(2, {"ema": variables.params, "stats": last, "ema_stats": averaged}, {})
    checkpoints.wait()
    folder.write_json("config.json", config)
    folder.write_json("contract.json", dataclasses.asdict(EmbeddingContract("0", 8, "unit", 1.5)))
    text.LabelTokenizer(10).save(folder.path / "tokenizer")
    return folder


@pytest.mark.filterwarnings("ignore:.*has no digests:dalle2_jax.errors.SystemWarning")
def test_a_loaded_resnet_has_averaged_statistics(tmp_path):
    """Those of the last step in a checkpoint of an earlier release, which has no others."""
    folder, mesh = write_resnet(tmp_path), make_mesh(MeshConfig())
    for expected in (3.0, 7.0):
        leaves = jax.tree.leaves(load.load_stage(tmp_path, "clip", mesh).variables.stats)
        assert leaves and all(np.all(np.asarray(leaf) == expected) for leaf in leaves)
        shutil.rmtree(folder.path / "checkpoints" / "2" / "ema_stats", ignore_errors=True)
        (folder.path / "checkpoints" / "2" / digests.NAME).unlink(missing_ok=True)
