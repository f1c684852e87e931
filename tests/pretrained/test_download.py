"""Packed systems at a URL: downloaded once, again when they change, and never used when damaged."""

import json
import shutil

import jax
import numpy as np
import pytest
from raised import mentions
from web_server import served
from written_system import write_system

import dalle2_jax as d2
from dalle2_jax import weights
from dalle2_jax.cli import args
from dalle2_jax.pretrained.download import fetch_system
from dalle2_jax.workdir import digests

pytest.importorskip("fsspec")


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    root = tmp_path_factory.mktemp("packed")
    write_system(root / "system")
    return weights.pack(root / "system", root / "packed", stages=("clip",)).path


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of the user."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "dalle2_jax" / "systems"


@pytest.fixture
def site(packed, tmp_path):
    """A server of a copy of the packed system."""
    with served(shutil.copytree(packed, tmp_path / "site")) as site:
        yield site


def names(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_it_is_downloaded_once(site, packed, cache):
    url = d2.load(site.url), d2.load(packed)
    jax.tree.map(np.testing.assert_array_equal, *(dict(system.stages["clip"].variables.params) for system in url))
    assert names(url[0].path) == names(packed) and digests.check(url[0].path)
    site.requests.clear()
    assert fetch_system(f"{site.url}/") == args.system(site.url) == url[0].path
    assert {name for _, name, _ in site.requests} == {digests.NAME}
    (site.folder / "README.md").write_text("another")
    digests.write(site.folder)
    assert fetch_system(site.url) != url[0].path and len([*cache.iterdir()]) == 2


def test_damage(site, cache):
    (site.folder / "clip" / "experiment.json").write_text("{}")
    with pytest.raises(d2.UserError, check=mentions(site.url, "clip/experiment.json")):
        fetch_system(site.url)
    assert not [*cache.iterdir()]


@pytest.mark.parametrize("name", ["/etc/x", "../x", "a\0b"])
def test_a_file_outside_the_folder(site, cache, name):
    files = {name: [1, "0" * 32]}
    manifest = {"files": files, "digest": digests._of_manifest(files)}
    (site.folder / digests.NAME).write_text(json.dumps(manifest))
    with pytest.raises(d2.UserError, check=mentions(site.url, "damaged", digests.NAME)):
        fetch_system(site.url)
    assert not [*cache.iterdir()]


def test_more_than_the_disk_has(site, cache, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1000, 0, 1000))
    with pytest.raises(d2.UserError, check=mentions(site.url, cache, "1,000")):
        fetch_system(site.url)
    assert not [*cache.iterdir()]


def test_no_system_there(site, cache):
    (site.folder / digests.NAME).unlink()
    with pytest.raises(d2.UserError, check=mentions(f"{site.url}/{digests.NAME}", "dalle2 weights pack")):
        fetch_system(site.url)
    with pytest.raises(d2.UserError, check=mentions("nosuch://bucket/system", "[remote]")):
        d2.load("nosuch://bucket/system")
