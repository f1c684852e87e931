"""Packages: pinned, verified, fetched by npm or read from a folder."""

import gzip

import pytest
from emoji_packages import register, tgz
from raised import mentions

from dalle2_jax.data.emoji import packages
from dalle2_jax.data.emoji.packages import PACKAGES, open_package
from dalle2_jax.errors import DataError, UserError

CONTENTS = {"a.json": '{"a": [1]}', "images/b.png": b"b", "c.txt": "c"}


def is_any(path):
    return True


def test_every_package_is_pinned():
    assert len({package.sha256 for package in PACKAGES.values()}) == len(PACKAGES)
    for package in PACKAGES.values():
        assert len(package.sha256) == 64 and package.version.count(".") == 2
    assert PACKAGES["noto_svg"].file_name == "iconify-json-noto-1.2.9.tgz"
    assert str(PACKAGES["fluent_3d"]) == "@lobehub/fluent-emoji-3d@1.1.0"


def test_wanted_files_are_read_and_links_are_not(tmp_path, monkeypatch):
    package = register(monkeypatch, "captions", tmp_path, tgz(CONTENTS, links=("d.json",)))
    files = open_package(package, tmp_path, lambda path: not path.endswith(".txt"))
    assert files.contents == {"a.json": b'{"a": [1]}', "images/b.png": b"b"} and files.json("a.json") == {"a": [1]}


@pytest.mark.parametrize("damage", ["missing", "changed", "longer", "a folder"])
def test_a_damaged_package_is_reported_with_its_path(tmp_path, monkeypatch, damage):
    package = register(monkeypatch, "captions", tmp_path, tgz(CONTENTS))
    path = tmp_path / package.file_name
    content = path.read_bytes()
    path.unlink()
    if damage == "changed":
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "longer":
        path.write_bytes(content + b"\0")
    elif damage == "a folder":
        path.mkdir()
    with pytest.raises(DataError) as caught:
        open_package(package, tmp_path, is_any)
    assert caught.value.path == path


WRONG_CONTENT = [b"no gzip", gzip.compress(b"no tar" * 200), tgz(CONTENTS)[:60]]


@pytest.mark.parametrize("content", WRONG_CONTENT, ids=["no gzip", "no tar", "cut"])
def test_content_that_is_no_package_is_rejected(tmp_path, monkeypatch, content):
    package = register(monkeypatch, "captions", tmp_path, content)
    with pytest.raises(DataError):
        open_package(package, tmp_path, is_any)


def test_a_decompression_bomb_is_rejected(tmp_path, monkeypatch):
    package = register(monkeypatch, "captions", tmp_path, tgz({"a": bytes(100_000)}))
    monkeypatch.setattr(packages, "MAX_UNPACKED", 50_000)
    with pytest.raises(DataError, check=mentions("@tiny/captions@1.0.0", "50000 bytes")):
        open_package(package, tmp_path, is_any)


def install_npm(folder, monkeypatch, script):
    """Makes a shell script the only program on the path, as npm."""
    folder.mkdir()
    (folder / "npm").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "npm").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))


def test_npm_fetches_a_package(tmp_path, monkeypatch):
    package = register(monkeypatch, "captions", tmp_path, tgz(CONTENTS))
    arguments = tmp_path / "arguments"
    script = f'echo "$@" > {arguments}; /bin/cp {tmp_path / package.file_name} .'
    install_npm(tmp_path / "bin", monkeypatch, script)
    assert open_package(package, None, is_any).contents.keys() == CONTENTS.keys()
    assert arguments.read_text().split() == ["pack", "@tiny/captions@1.0.0"]


def test_without_npm_the_error_names_the_alternative(tmp_path, monkeypatch):
    package = register(monkeypatch, "captions", tmp_path, tgz(CONTENTS))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, check=mentions("npm", "Node.js", "tiny-captions-1.0.0.tgz", "--from")):
        open_package(package, None, is_any)


def test_the_message_of_npm_is_passed_on(tmp_path, monkeypatch):
    package = register(monkeypatch, "captions", tmp_path, tgz(CONTENTS))
    install_npm(tmp_path / "bin", monkeypatch, "echo 'npm error code E404 \033[31m' >&2; exit 1")
    with pytest.raises(UserError, check=mentions("@tiny/captions@1.0.0", "E404", "--from")) as caught:
        open_package(package, None, is_any)
    assert str(caught.value).isprintable()
