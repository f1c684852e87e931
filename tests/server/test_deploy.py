"""The files of deploy/ and the Dockerfile name options, extras and files that exist."""

import ast
import re

import pytest
from doc_blocks import ROOT

from dalle2_jax.cli.serve import make_parser, read_config

SETUP, DOCKERFILE = (ROOT / "setup.cfg").read_text(), (ROOT / "Dockerfile").read_text()


def test_the_arguments_of_kubernetes_are_a_valid_command(tmp_path):
    yaml = pytest.importorskip("yaml")
    deployment, service = yaml.safe_load_all((ROOT / "deploy" / "k8s.yaml").read_text())
    pod = deployment["spec"]["template"]["spec"]
    [container] = pod["containers"]
    command, *words = container["args"]
    config = read_config(make_parser().parse_args(words))
    assert command == "serve" and not config.is_local and config.api_keys is not None and config.warmup
    assert pod["terminationGracePeriodSeconds"] > config.drain
    assert container["ports"][0]["containerPort"] == config.port
    assert service["spec"]["selector"] == deployment["spec"]["selector"]["matchLabels"]
    for probe, path in [("startupProbe", "/readyz"), ("readinessProbe", "/readyz"), ("livenessProbe", "/healthz")]:
        assert container[probe]["httpGet"]["path"] == path


def test_the_dockerfile_copies_files_that_exist_and_installs_known_extras():
    [copied] = re.findall(r"^COPY (setup.*) \./$", DOCKERFILE, re.MULTILINE)
    assert all((ROOT / name).is_file() for name in copied.split())
    for extra in re.findall(r"EXTRAS=([\w,]+)", DOCKERFILE):
        assert all(f"\n{name} =\n" in SETUP for name in extra.split(",")), extra
    assert "USER dalle2" in DOCKERFILE and "--api_keys" in DOCKERFILE


def test_ray_serves_the_application_of_the_package():
    """Ray is not installed for tests: the file's imports of this package are checked."""
    tree = ast.parse((ROOT / "deploy" / "ray_serve.py").read_text())
    import dalle2_jax.server as server

    imported = [
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == "dalle2_jax.server"
        for alias in node.names
    ]
    assert imported and all(name in server.__all__ for name in imported)


def test_the_page_is_packaged():
    folder = ROOT / "dalle2_jax" / "server" / "page"
    patterns = re.search(r"^dalle2_jax\.server\.page = (.*)$", SETUP, re.MULTILINE)[1]
    packaged = {path for pattern in patterns.split(", ") for path in folder.glob(pattern)}
    assert packaged == {path for path in folder.iterdir() if path.suffix not in (".py", "") and path.is_file()}
