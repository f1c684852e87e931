"""Two hosts, which are two processes here, of two devices each: they find each other as under SLURM."""

import dataclasses
import json
import os
import socket
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pytest
from command_line import Shop, contents, train_words

STEPS = 12
BAD = (3, 17, 30)


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    environment["JAX_COMPILATION_CACHE_DIR"] = str(tmp_path_factory.mktemp("compiled"))
    with ThreadPoolExecutor(2) as pool:
        yield Shop(environment, pool)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Forty pictures, three of which are none; metadata names one that is not there."""
    folder, noise = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for number in range(40):
        cv2.imwrite(str(folder / f"{number}.png"), noise.integers(256, size=(8, 8, 3), dtype=np.uint8))
    for number in BAD:
        (folder / f"{number}.png").write_bytes(b"")
    lines = [json.dumps({"file_name": f"{number}.png", "text": f"red {number}"}) for number in range(41)]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def free_job():
    """Returns the number of a SLURM job whose port, which jax makes of it, is free."""
    for job in range(4096):
        with socket.socket() as server:
            try:
                server.bind(("localhost", 65535 - 4096 + 1 + job))
                return job
            except OSError:
                continue
    raise AssertionError("no port is free")


def on_two_hosts(shop, *words):
    """Runs a command on two hosts, which must end well; returns what each printed."""
    job = {"SLURM_JOB_ID": free_job(), "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": 2, "SLURM_LOCALID": 0}

    def on_host(number):
        told = {name: str(value) for name, value in {**job, "SLURM_PROCID": number}.items()}
        return dataclasses.replace(shop, environment={**shop.environment, **told}).good(*words)

    return [done.stdout for done in shop.pool.map(on_host, (0, 1))]


def clip_words(root, pictures, steps, *words):
    data = f"--config.data={{'kind': 'folder', 'path': '{pictures}', 'resolution': 8}}"
    run = [data, f"--config.total_steps={steps}", "--config.optim.schedule=constant", *words]
    return train_words("clip", root, *run)


def logged(root):
    return [json.loads(line) for line in (root / "clip" / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def alone(shop, pictures, tmp_path_factory):
    root = tmp_path_factory.mktemp("alone")
    shop.good(*clip_words(root, pictures, STEPS))
    return root


def test_two_hosts_train_as_one_and_one_goes_on(shop, pictures, alone, tmp_path):
    """Each example is seen once a pass, by whichever host: the losses are those of one host, to rounding."""
    words = clip_words(tmp_path, pictures, STEPS - 4, "--multihost", "--config.workers=1")
    on_two_hosts(shop, *words)
    assert [line["step"] for line in logged(tmp_path)] == list(range(2, STEPS - 3, 2))
    shop.good(*clip_words(tmp_path, pictures, STEPS))
    for line, other in zip(logged(tmp_path), logged(alone), strict=True):
        assert line["step"] == other["step"]
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-4)
    refused = {"missing": 1, "empty": len(BAD)}  # after more than one pass, in which both hosts met each of them
    assert logged(alone)[-1]["rejected"] == logged(tmp_path)[(STEPS - 4) // 2 - 1]["rejected"] == refused


def test_two_hosts_embed_as_one(shop, pictures, alone, tmp_path):
    words = ["-m", "dalle2_jax.data", "embed", "--system", alone, "--data", f"folder:{pictures}", "--shard_size", "9"]
    told = on_two_hosts(shop, *words, "--out", tmp_path / "two", "--multihost")
    assert any("embeddings of 37 pictures" in text for text in told)
    shop.good(*words, "--out", tmp_path / "one")
    assert contents(tmp_path / "two").keys() == {name.replace("/one/", "/two/") for name in contents(tmp_path / "one")}
    for path in sorted((tmp_path / "one").rglob("*.npy")):
        same = tmp_path / "two" / path.relative_to(tmp_path / "one")
        np.testing.assert_allclose(np.load(path), np.load(same), rtol=1e-5, atol=1e-6)
    assert (tmp_path / "one/train/index.json").read_bytes() == (tmp_path / "two/train/index.json").read_bytes()
