"""Data with everything wrong that the world has, trained on by the real command: counted by cause, never in the way.

The pictures are real files, in a folder and in tar shards; a worker process reads them.
"""

import io
import json
import os
import re
import struct
import tarfile
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from command_line import Shop, assert_one_line, train_words
from PIL import Image

GOOD = 40
STEPS = 14
"""Of 8 examples: two passes over all that are good and bad."""


def picture(number, kind="PNG", size=(12, 10)):
    content = io.BytesIO()
    Image.fromarray(np.random.default_rng(number).integers(256, size=(*size, 3), dtype=np.uint8)).save(content, kind)
    return content.getvalue()


def bomb():
    """A PNG of 900 million pixels, by its header."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))


BAD = {
    # file: its content, and why it is refused
    "empty.png": (b"", "empty"),
    "text.jpg": (b"no picture at all", "not a picture"),
    "torn.png": (picture(1)[:200], "not a picture"),
    "torn.jpg": (picture(2, "JPEG")[:300], "not a picture"),
    "torn.webp": (picture(3, "WEBP")[:100], "not a picture"),
    "bomb.png": (bomb(), "far too large"),
    "long.png": (picture(4, size=(1, 99)), "far too long"),
}


def write_folder(folder):
    """Returns what is to be counted."""
    folder.mkdir()
    lines = []
    for number in range(GOOD):
        (folder / f"{number}.png").write_bytes(picture(number))
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
    """Returns what is to be counted."""
    folder.mkdir()
    shards, counted = [[], [], []], {"no caption": 1, "no picture": 1, "named twice": 1, "unsafe name": 1}
    counted["not UTF-8 (used)"] = GOOD // 2
    for number in range(GOOD):
        said = json.dumps({"key": f"{number}", "caption": "by its JSON"}).encode()
        text = ("json", said) if number % 2 else ("txt", b"caf\xe9 \xff")
        shards[number % 2] += [(f"{number}.png", picture(number)), (f"{number}.{text[0]}", text[1])]
    for name, (content, cause) in BAD.items():
        stem, ending = name.split(".")
        shards[0] += [(f"{stem}-{ending}.{ending}", content), (f"{stem}-{ending}.txt", b"blue")]
        counted[cause] = counted.get(cause, 0) + 1
    shards[0] += [("a.png", picture(50)), ("b.txt", b"b"), ("../c.png", picture(51)), ("../c.txt", b"c")]
    shards[0] += [("d.png", picture(52)), ("d.png", picture(53)), ("d.txt", b"d")]
    shards[0] += [("e.png", picture(54)), ("e.json", b'{"caption": ')]
    shards[2] += [("f.txt", b"f"), ("f.png", picture(5)), ("g.txt", b"g"), ("g.png", picture(6))]
    counted |= {"broken JSON": 1, "shard cut short": 23, "not a tar": 24, "shard lost": 24}
    for number, members in enumerate(shards):
        with tarfile.open(folder / f"{number}.tar", "w") as tar:
            for name, content in members:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    whole = (folder / "2.tar").read_bytes()
    (folder / "2.tar").write_bytes(whole[: whole.index(b"g.png") + 600])  # in the middle of the last picture
    (folder / "3.tar").write_bytes(b"<html>moved</html>" * 99)
    return f"{folder}/{{0..4}}.tar", counted


FORMS = {"folder": write_folder, "webdataset": write_shards}


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment["JAX_COMPILATION_CACHE_DIR"] = str(tmp_path_factory.mktemp("compiled"))
    with ThreadPoolExecutor(2) as pool:
        yield Shop(environment, pool)


def words(root, kind, path, limit):
    data = f"{{'kind': '{kind}', 'path': '{path}', 'resolution': 8, 'max_rejected': {limit}}}"
    return train_words("clip", root, f"--config.data={data}", f"--config.total_steps={STEPS}", "--config.workers=1")


def test_every_fault_is_counted_once_and_stops_nothing(shop, tmp_path):
    written = {kind: write(tmp_path / kind) for kind, write in FORMS.items()}

    def trained(kind):
        return shop.good(*words(tmp_path / f"run_{kind}", kind, written[kind][0], 0.7))

    for kind, done in zip(FORMS, shop.pool.map(trained, FORMS), strict=True):
        lines = [json.loads(line) for line in (tmp_path / f"run_{kind}/clip/metrics.jsonl").read_text().splitlines()]
        assert lines[-1]["step"] == STEPS and all(np.isfinite(line["loss"]) for line in lines)
        counted = written[kind][1]
        assert lines[-1]["rejected"] == counted, kind
        said = re.findall(r"is refused \((.*?)\)", done.stderr)
        assert len(said) == len({*said}) and {*said} <= counted.keys() and "Traceback" not in done.stderr
        assert done.stderr.count("left out are") == 1


def test_too_many_end_a_run_which_goes_on_with_more_patience(shop, tmp_path):
    """Those found at once, before anything is trained; and those found on the way, after which nothing is lost."""
    path, counted = write_folder(tmp_path / "folder")
    done = shop.run(*words(tmp_path / "run", "folder", path, 0.01))
    assert_one_line(done, 1, "4 of 51 records", "broken metadata (first metadata.jsonl:48", "max_rejected=0.01")
    assert not (tmp_path / "run" / "clip").exists()
    done = shop.run(*words(tmp_path / "run", "folder", path, 0.1))
    assert done.returncode == 1 and "more than max_rejected=0.1" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: 11 of 51 records"), "the last word, whatever workers left"
    assert [*(tmp_path / "run" / "clip" / "checkpoints").iterdir()]
    resumed = shop.good(*words(tmp_path / "run", "folder", path, 0.5))
    assert "clip: continues from step" in resumed.stdout
