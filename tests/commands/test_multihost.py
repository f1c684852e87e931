"""Two hosts, simulated by two processes with two devices each, which connect as under SLURM.

The reference runs in this process, with one device.
"""

import dataclasses
import json
import socket
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pytest
from command_line import CommandRunner, InProcessRunner, contents, environment, train_words

STEPS = 12
BAD = (3, 17, 30)


@pytest.fixture(scope="module")
def runner():
    with ThreadPoolExecutor(2) as pool:
        yield CommandRunner(environment(devices=2), pool)


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory):
    """Returns a folder of forty files, three of which are not images; metadata also names a missing file."""
    folder, noise = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for number in range(40):
        cv2.imwrite(str(folder / f"{number}.png"), noise.integers(256, size=(8, 8, 3), dtype=np.uint8))
    for number in BAD:
        (folder / f"{number}.png").write_bytes(b"")
    lines = [json.dumps({"file_name": f"{number}.png", "text": f"red {number}"}) for number in range(41)]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def free_job():
    """Returns the number of a SLURM job for which the port that jax derives from it is free."""
    for job in range(4096):
        with socket.socket() as server:
            try:
                server.bind(("localhost", 65535 - 4096 + 1 + job))
                return job
            except OSError:
                continue
    raise AssertionError("no port is free")


def on_two_hosts(runner, *words):
    """Runs a command that must succeed on two hosts; returns the output of each."""
    job = {"SLURM_JOB_ID": free_job(), "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": 2, "SLURM_LOCALID": 0}

    def on_host(number):
        variables = {name: str(value) for name, value in {**job, "SLURM_PROCID": number}.items()}
        return dataclasses.replace(runner, environment={**runner.environment, **variables}).run_ok(*words)

    return [done.stdout for done in runner.pool.map(on_host, (0, 1))]


def clip_words(root, image_folder, steps, *words):
    data = f"--config.data={{'kind': 'folder', 'path': '{image_folder}', 'resolution': 8}}"
    run = [data, f"--config.total_steps={steps}", "--config.optim.schedule=constant", *words]
    return train_words("clip", root, *run)


def logged(root):
    return [json.loads(line) for line in (root / "clip" / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def one_host(image_folder, tmp_path_factory):
    root = tmp_path_factory.mktemp("alone")
    InProcessRunner().run_ok(*clip_words(root, image_folder, STEPS))
    return root


def test_two_hosts_train_like_one_and_one_host_resumes(runner, image_folder, one_host, tmp_path):
    """Every example is visited once an epoch by one of the hosts: losses equal those of one host up to rounding."""
    words = clip_words(tmp_path, image_folder, STEPS - 4, "--multihost", "--config.workers=1")
    on_two_hosts(runner, *words)
    assert [line["step"] for line in logged(tmp_path)] == list(range(2, STEPS - 3, 2))
    InProcessRunner().run_ok(*clip_words(tmp_path, image_folder, STEPS))
    for line, other in zip(logged(tmp_path), logged(one_host), strict=True):
        assert line["step"] == other["step"]
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-4)
    rejected = {"missing": 1, "empty": len(BAD)}  # more than one epoch, so both hosts read each of them
    assert logged(one_host)[-1]["rejected"] == logged(tmp_path)[(STEPS - 4) // 2 - 1]["rejected"] == rejected


def test_two_hosts_embed_like_one(runner, image_folder, one_host, tmp_path):
    words = [
        "-m",
        "dalle2_jax",
        "data",
        "embed",
        "--system",
        one_host,
        "--data",
        f"folder:{image_folder}",
        "--shard_size",
        "9",
    ]
    outputs = on_two_hosts(runner, *words, "--out", tmp_path / "two", "--multihost")
    assert any("embeddings of 37 " in text for text in outputs)
    InProcessRunner().run_ok(*words, "--out", tmp_path / "one")
    assert contents(tmp_path / "two").keys() == {name.replace("/one/", "/two/") for name in contents(tmp_path / "one")}
    for path in sorted((tmp_path / "one").rglob("*.npy")):
        same = tmp_path / "two" / path.relative_to(tmp_path / "one")
        np.testing.assert_allclose(np.load(path), np.load(same), rtol=1e-5, atol=1e-6)
    assert (tmp_path / "one/train/index.json").read_bytes() == (tmp_path / "two/train/index.json").read_bytes()
