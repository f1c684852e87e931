"""Training on data with every kind of bad record: they are counted by cause and do not stop the run.

The images are files in a folder and in tar shards; a worker process reads them.
"""

import io
import json
import re
import struct
import tarfile
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from command_line import CommandRunner, assert_one_line, environment, train_words
from PIL import Image
from raised import mentions

VALID = 40
STEPS = 14
"""Steps of 8 examples: two epochs of all valid and invalid records."""


def image(number, kind="PNG", size=(12, 10)):
    content = io.BytesIO()
    Image.fromarray(np.random.default_rng(number).integers(256, size=(*size, 3), dtype=np.uint8)).save(content, kind)
    return content.getvalue()


def bomb():
    """Returns a PNG whose header claims 900 million pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))


BAD = {
    # file: its content, and the cause of its rejection
    "empty.png": (b"", "empty"),
    "text.jpg": (b"not an image at all", "not an image"),
    "torn.png": (image(1)[:200], "not an image"),
    "torn.jpg": (image(2, "JPEG")[:300], "not an image"),
    "torn.webp": (image(3, "WEBP")[:100], "not an image"),
    "bomb.png": (bomb(), "far too large"),
    "long.png": (image(4, size=(1, 99)), "far too long"),
}


def write_folder(folder):
    """Writes the data set; returns its path and the expected number of rejected records by cause."""
    folder.mkdir()
    lines = []
    for number in range(VALID):
        (folder / f"{number}.png").write_bytes(image(number))
        lines.append(json.dumps({"file_name": f"{number}.png", "text": ["red", f"ein Bild \u00fc {number}"]}).encode())
    counted = {"broken metadata": 2, "no caption": 1, "missing": 1, "not UTF-8 (used)": 1}
    for name, (content, cause) in BAD.items():
        (folder / name).write_bytes(content)
        lines.append(json.dumps({"file_name": name, "text": "blue"}).encode())
        counted[cause] = counted.get(cause, 0) + 1
    lines += [b'{"file_name": "3.png", "text": ', b'{"file_name": "3.png"}', b'{"file_name": "4.png", "text": null}']
    lines += [b'{"file_name": "../../etc/passwd", "text": "a"}', b'{"file_name": "5.png", "text": "caf\xe9"}', b""]
    (folder / "metadata.jsonl").write_bytes(b"\n".join(lines))
    return str(folder), counted


def write_shards(folder):
    """Writes the data set; returns its path and the expected number of rejected records by cause."""
    folder.mkdir()
    shards, counted = [[], [], []], {"no caption": 1, "no image": 1, "named twice": 1, "unsafe name": 1}
    counted["not UTF-8 (used)"] = VALID // 2
    for number in range(VALID):
        content = json.dumps({"key": f"{number}", "caption": "by its JSON"}).encode()
        text = ("json", content) if number % 2 else ("txt", b"caf\xe9 \xff")
        shards[number % 2] += [(f"{number}.png", image(number)), (f"{number}.{text[0]}", text[1])]
    for name, (content, cause) in BAD.items():
        stem, ending = name.split(".")
        shards[0] += [(f"{stem}-{ending}.{ending}", content), (f"{stem}-{ending}.txt", b"blue")]
        counted[cause] = counted.get(cause, 0) + 1
    shards[0] += [("a.png", image(50)), ("b.txt", b"b"), ("../c.png", image(51)), ("../c.txt", b"c")]
    shards[0] += [("d.png", image(52)), ("d.png", image(53)), ("d.txt", b"d")]
    shards[0] += [("e.png", image(54)), ("e.json", b'{"caption": ')]
    shards[2] += [("f.txt", b"f"), ("f.png", image(5)), ("g.txt", b"g"), ("g.png", image(6))]
    counted |= {"broken JSON": 1, "shard cut short": 23, "not a tar": 24, "shard lost": 24}
    for number, members in enumerate(shards):
        with tarfile.open(folder / f"{number}.tar", "w") as tar:
            for name, content in members:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    complete = (folder / "2.tar").read_bytes()
    (folder / "2.tar").write_bytes(complete[: complete.index(b"g.png") + 600])  # cut in the middle of the last image
    (folder / "3.tar").write_bytes(b"<html>moved</html>" * 99)
    return f"{folder}/{{0..4}}.tar", counted


FORMS = {"folder": write_folder, "webdataset": write_shards}


@pytest.fixture(scope="module")
def runner():
    with ThreadPoolExecutor(2) as pool:
        yield CommandRunner(environment(), pool)


def train_args(root, kind, path, limit):
    data = f"{{'kind': '{kind}', 'path': '{path}', 'resolution': 8, 'max_rejected': {limit}}}"
    return train_words("clip", root, f"--config.data={data}", f"--config.total_steps={STEPS}", "--config.workers=1")


def test_every_fault_is_counted_once_and_training_completes(runner, tmp_path):
    written = {kind: write(tmp_path / kind) for kind, write in FORMS.items()}

    def trained(kind):
        return runner.run_ok(*train_args(tmp_path / f"run_{kind}", kind, written[kind][0], 0.7))

    for kind, done in zip(FORMS, runner.pool.map(trained, FORMS), strict=True):
        lines = [json.loads(line) for line in (tmp_path / f"run_{kind}/clip/metrics.jsonl").read_text().splitlines()]
        assert lines[-1]["step"] == STEPS and all(np.isfinite(line["loss"]) for line in lines)
        counted = written[kind][1]
        assert lines[-1]["rejected"] == counted, kind
        causes = re.findall(r"is rejected \((.*?)\)", done.stderr)
        assert len(causes) == len({*causes}) and {*causes} <= counted.keys() and "Traceback" not in done.stderr
        assert done.stderr.count("rejected at opening:") == 1


def test_too_many_bad_records_end_a_run_that_a_higher_limit_continues(runner, tmp_path):
    """Both rejections at opening, before any step, and rejections during training, after which no step is lost."""
    path, counted = write_folder(tmp_path / "folder")
    done = runner.run(*train_args(tmp_path / "run", "folder", path, 0.01))
    assert_one_line(done, 1, "4 of 51 records", "broken metadata", "metadata.jsonl:48", "max_rejected=0.01")
    assert not (tmp_path / "run" / "clip").exists()
    done = runner.run(*train_args(tmp_path / "run", "folder", path, 0.1))
    assert done.returncode == 1 and "max_rejected=0.1" in done.stderr
    assert mentions("error", "11 of 51 records")(done.stderr.splitlines()[-1])
    assert [*(tmp_path / "run" / "clip" / "checkpoints").iterdir()]
    resumed = runner.run_ok(*train_args(tmp_path / "run", "folder", path, 0.5))
    assert "from step" in resumed.stdout
