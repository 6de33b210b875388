"""The images are built by hand (docker/README.md). What can be checked without Docker: that they name what
there is, and that the two containers are told to meet."""

from __future__ import annotations

import re
import shlex
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DOCKERFILES = ("docker/Dockerfile", "docker/Dockerfile.cuda")


def instructions(dockerfile: str) -> list[tuple[str, str]]:
    """Instructions and what follows them, continued lines joined."""
    lines = [line for line in (ROOT / dockerfile).read_text().splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in joined.splitlines()) if word]


def in_context(path: str) -> bool:
    """Whether .dockerignore lets it through; of its patterns, the last that fits counts."""
    let = True
    for pattern in (ROOT / ".dockerignore").read_text().splitlines():
        if pattern and not pattern.startswith("#"):
            plain = pattern.lstrip("!").removeprefix("**/")
            if any(fnmatch(part, plain) for part in (path, *Path(path).parts)):
                let = pattern.startswith("!")
    return let


@pytest.mark.parametrize("dockerfile", DOCKERFILES)
def test_what_is_copied_is_there_and_in_the_context(dockerfile: str) -> None:
    sources = []
    for word, rest in instructions(dockerfile):
        if word == "COPY" and "--from=" not in rest:
            *paths, _ = [part for part in shlex.split(rest) if not part.startswith("--")]
            sources += paths
    assert {"distclip", "examples", "launch", "pyproject.toml"} <= set(sources)
    for source in sources:
        assert (ROOT / source).exists(), source
        assert in_context(source), source
    for outside in (".venv", ".git", "tests", "runs", "distclip/__pycache__"):
        assert not in_context(outside), outside


@pytest.mark.parametrize("dockerfile", DOCKERFILES)
def test_the_user_is_not_root_and_no_index_is_named(dockerfile: str) -> None:
    every = instructions(dockerfile)
    user = [rest for word, rest in every if word == "USER"]
    assert len(user) == 1
    assert any(word == "RUN" and re.search(rf"useradd .*\b{user[0]}\b", rest) for word, rest in every)
    assert every[-1] == ("USER", user[0])  # nothing after it needs root
    assert "://" not in (ROOT / dockerfile).read_text()
    # Build arguments would stay readable in the image, were they those of its last stage.
    stages = [i for i, (word, _) in enumerate(every) if word == "FROM"]
    assert [rest for word, rest in every[stages[-1] :] if word == "ARG"] == []


def test_the_containers_meet() -> None:
    file = ROOT / "docker" / "compose.yaml"
    services = yaml.safe_load(file.read_text())["services"]
    assert len(services) == 2
    for service in services.values():
        environment = service["environment"]
        assert int(environment["NNODES"]) == len(services)
        host, port = environment["RDZV_ENDPOINT"].split(":")
        assert host in {other["hostname"] for other in services.values()}
        assert port.isdigit()
        shell, starter, script = shlex.split(re.sub(r"\$\{TRAIN:-(.*)\}", r"\1", service["command"]))
        assert shell == "bash"
        assert (ROOT / script).exists()
        known = (ROOT / starter).read_text()
        assert all(name in known for name in environment)

    (build,) = [service["build"] for service in services.values() if "build" in service]
    context = (file.parent / build["context"]).resolve()
    assert context == ROOT
    for dockerfile in {build["dockerfile"], *DOCKERFILES}:
        arguments = {rest.rstrip("=") for word, rest in instructions(dockerfile) if word == "ARG"}
        assert arguments - {"BASE=debian:bookworm-slim"} == set(build["args"])
