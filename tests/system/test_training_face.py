"""`dalle2_jax.train` on arrays in memory makes a system that `dalle2_jax.load` loads and the command samples from."""

import json

import numpy as np
import pytest
from command_line import InProcessRunner
from PIL import Image

import dalle2_jax as d2

PAGE = "tests/support/tiny_system.py"
SHORT = {"total_steps": 3, "checkpoint_every": 3, "log_every": 1, "optim.warmup_steps": 1}


@pytest.fixture(scope="module")
def arrays():
    pixels = np.random.default_rng(0).integers(0, 256, (16, 12, 10, 3), dtype=np.uint8)
    return {"image": pixels, "caption": [f"image number {index} of sixteen in all" for index in range(16)]}


def test_experiment():
    experiment = d2.experiment(f"{PAGE}:clip", **{"optim.lr": 0.5})
    assert isinstance(experiment, d2.Experiment) and experiment.optim.lr == 0.5 and experiment.stage == "clip"
    with pytest.raises(d2.ConfigError) as error:
        d2.experiment(f"{PAGE}:clip", **{"optim.lrr": 0.5})
    assert error.value.field.startswith("optim")


def test_train_load_sample(arrays, tmp_path, capfd):
    seen = []
    for stage in ("clip", "prior", "decoder"):
        experiment = d2.experiment(f"{PAGE}:{stage}", **SHORT)
        trained = d2.train(
            experiment, str(tmp_path), arrays, progress=False, callback=lambda step, metrics: seen.append(step)
        )
        assert trained.stages[stage].step == 3
    assert capfd.readouterr() == ("", "")
    assert seen == [1, 2, 3] * 3
    assert d2.train(experiment, tmp_path, arrays, progress=False).stages["decoder"].step == 3  # nothing is left to do
    images = d2.load(tmp_path).text2image("image number 3", num=1, decoder={"steps": 2})
    assert images.numpy.shape == (1, 8, 8, 3)
    words = ["--prompt", "image number 3", "--num", "1", "--decoder.steps", "2", "--out", tmp_path / "out"]
    InProcessRunner().run_ok("sample.py", "text2image", "--system", tmp_path, *words)
    assert (np.asarray(Image.open(tmp_path / "out" / "0_0.png")) == images.numpy[0]).all()
    assert json.loads((tmp_path / "out" / "samples.json").read_text())["checkpoints"]["decoder"] == 3


def test_data_that_is_rejected(tmp_path):
    experiment = d2.experiment(f"{PAGE}:clip", **SHORT)
    for data in ({"unknown": []}, {"image": np.zeros((2, 4, 4, 3)), "caption": ["a", "b"]}, 3):
        with pytest.raises(d2.DataError):
            d2.train(experiment, tmp_path / "new", data, progress=False)
    assert not (tmp_path / "new").exists()
