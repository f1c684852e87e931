"""The files of deploy/ and the Dockerfile name options, extras and files that exist."""

import ast
import json
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


def instructions(name):
    """Returns the arguments of each instruction of the Dockerfile of a name."""
    return re.findall(rf"^{name} (.*)$", re.sub(r"\\\n\s*", "", DOCKERFILE), re.MULTILINE)


def test_the_dockerfile_copies_what_the_package_is_built_from():
    copied = {name for line in instructions("COPY") if "--from" not in line for name in line.split()[:-1]}
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert {"setup.py", "setup.cfg", "pyproject.toml", "MANIFEST.in", "configs", "dalle2_jax"} <= copied
    for name in copied:
        assert (ROOT / name).exists() and name not in ignored, name
    named = re.findall(r"\b[\w-]+\.(?:py|md)\b", (ROOT / "MANIFEST.in").read_text() + SETUP)
    assert {"train.py", "sample.py", "README.md"} <= {*named} <= copied


def test_the_dockerfile_installs_known_extras_on_a_known_python():
    extras = re.findall(r"EXTRAS=([\w,]+)", DOCKERFILE)
    assert set(extras) == {"serve", "serve,cuda"}
    for extra in extras:
        assert all(f"\n{name} =\n" in SETUP for name in extra.split(",")), extra
    build, final = (line.split()[0] for line in instructions("FROM"))
    assert build == final and f"Python :: {re.search('[0-9.]+', final)[0]}\n" in SETUP


def test_the_container_runs_the_command_as_the_user_of_kubernetes(client):
    """A name as user could not be checked by ``runAsNonRoot``."""
    [entry], [words], [user], [port], [check] = map(
        instructions, ("ENTRYPOINT", "CMD", "USER", "EXPOSE", r"HEALTHCHECK .*? CMD")
    )
    assert (entry, json.loads(words)[0]) == ('["dalle2"]', "serve") and "\n    dalle2 = dalle2_jax.cli:" in SETUP
    assert f"useradd --uid {user} " in DOCKERFILE
    assert f"runAsUser: {user}\n" in (ROOT / "deploy" / "k8s.yaml").read_text()
    [documented] = re.findall(r"docker run .* dalle2_jax serve (.*)$", DOCKERFILE, re.MULTILINE)
    assert str(read_config(make_parser().parse_args(documented.split())).port) == port
    program = json.loads(check)
    address = re.search(rf"http://127\.0\.0\.1:{port}(/\w+)'", program[2])
    compile(program[2], "HEALTHCHECK", "exec")
    assert client.get(address[1]).status_code == 200


def test_ray_serves_the_application_of_the_package():
    """The file's imports of this package; `test_ray` runs it where Ray is installed."""
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
