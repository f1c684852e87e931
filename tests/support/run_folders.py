"""Folders as training and evaluation write them, without training: for reports."""

import json

import numpy as np

from dalle2_jax.files import write_png

HOSTILE = '<script>alert("x")</script>&\'<img src=http://x.example/y onerror=z>'


def write_stage(root, name, steps=1000, total_steps=1000, lr=1e-3, lines=None, **run):
    """Writes the folder of a stage whose loss falls as 1 / step, with a line for every ten steps; returns it."""
    folder = root / name
    folder.mkdir(parents=True)
    config = {"stage": name, "total_steps": total_steps, "batch_size": 8, "optim": {"lr": lr, "clip_norm": 1.0}}
    (folder / "experiment.json").write_text(json.dumps(config))
    (folder / "run.json").write_text(json.dumps({"config": "configs/shapes.py:clip", "parameters": 1234, **run}))
    if lines is None:
        lines = [json.dumps(metrics(step)) for step in range(10, steps + 1, 10)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def metrics(step):
    """Returns the metrics of a step: one of 8 examples takes a tenth of a second."""
    held_out = {"val/loss": 2 / step, "val/cosine_image": 0.9, "val/cosine_other": 0.1} if step % 100 == 0 else {}
    quartiles = {f"loss_quartile_{n}": n / step for n in (1, 2, 3, 4)}
    return {"step": step, "loss": 1 / step, "learning_rate": 1e-3, **quartiles, **held_out, "examples_per_second": 80.0}


def write_samples(folder, steps):
    """Writes sample grids of random pixels."""
    noise = np.random.default_rng(0)
    for step in steps:
        write_png(folder / "samples" / f"{step:08d}.png", noise.integers(256, size=(24, 36, 3), dtype=np.uint8))


def write_results(folder, figures):
    """Writes the results.json of an evaluation."""
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(figures))


def write_system(root):
    """Writes a system of two stages with samples and an evaluation, whose names and captions hold markup."""
    write_stage(root, "clip")
    decoder = write_stage(root, "decoder", steps=500, config=HOSTILE, environment={"jax": "0.10", "commit": "abc"})
    write_samples(decoder, range(100, 1001, 100))
    figure = {"value": 0.949, "n": 256, "share": True, "interval": [0.915, 0.97], "baseline": {"value": 0.2, "n": 256}}
    write_results(root / "attributes", {"title": HOSTILE, "figures": {"all": figure, HOSTILE: {"value": 3.25}}})
    return root
