"""The house: rooms on floors, imports that point down, collectives where they belong."""

from __future__ import annotations

import ast
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import distclip
from tests.starting import python

ROOT = Path(distclip.__file__).parent

CORE = {
    "torch_private", "kernels", "decide", "layout", "planning", "measure", "current", "apply", "inspection",
    "step",
}  # fmt: skip
MOST_LINES, MOST_FILES = 400, 10

# What talks to other ranks (`new_group` too: it waits for them). Words that tensors have as methods as
# well count only on the module itself.
COLLECTIVES = {
    "all_gather", "all_gather_into_tensor", "all_gather_object", "all_reduce", "all_to_all", "barrier",
    "broadcast_object_list", "full_tensor", "gather_object", "init_device_mesh", "monitored_barrier",
    "new_group", "reduce_scatter", "reduce_scatter_tensor", "redistribute",
}  # fmt: skip
AMBIGUOUS = {"broadcast", "gather", "recv", "reduce", "scatter", "send"}


def module_name(path: Path) -> str:
    name = ".".join(("distclip", *path.relative_to(ROOT).with_suffix("").parts))
    return name.removesuffix(".__init__")


@cache
def trees() -> dict[str, ast.Module]:
    """Every module of the package, by dotted name."""
    return {module_name(path): ast.parse(path.read_text("utf-8")) for path in sorted(ROOT.rglob("*.py"))}


@cache
def imports(module: str) -> frozenset[str]:
    """The modules that a module imports, those of distclip in full (``from distclip import kernels``)."""
    found = set()
    for node in ast.walk(trees()[module]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively"
            inner = {f"{node.module}.{alias.name}" for alias in node.names} & set(trees())
            found |= inner or {str(node.module)}
    return frozenset(found)


def own_imports(module: str) -> set[str]:
    return {m for m in imports(module) if m.split(".")[0] == "distclip"}


def room(module: str) -> str:
    """The first name below distclip: ``strategies`` for distclip.strategies.value."""
    return [*module.split("."), ""][1] or "distclip"


def in_room(name: str) -> list[str]:
    return [m for m in trees() if room(m) == name]


def mentions_collectives(module: str) -> set[str]:
    found = set()
    for node in ast.walk(trees()[module]):
        if isinstance(node, ast.Attribute):
            base = node.value.id if isinstance(node.value, ast.Name) else ""
            if node.attr in COLLECTIVES or (node.attr in AMBIGUOUS and base in ("dist", "c10d", "funcol")):
                found.add(node.attr)
        elif isinstance(node, ast.ImportFrom):
            found |= {alias.name for alias in node.names} & (COLLECTIVES | AMBIGUOUS)
    return found


def test_imports_point_down() -> None:
    """The floors are in pyproject.toml; import-linter knows of every room, and of cycles between them. (In a
    process of its own, since it sets up logging as it likes.)"""
    python("-c", "from importlinter.cli import lint_imports as lint; raise SystemExit(lint(no_cache=True))")


def test_no_cycles() -> None:
    graph = {m: own_imports(m) - {m} for m in trees() if m != "distclip"}
    TopologicalSorter(graph).prepare()  # raises CycleError


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=module_name)
def test_no_file_is_long(path: Path) -> None:
    assert len(path.read_text("utf-8").splitlines()) <= MOST_LINES


def test_few_doors() -> None:
    assert len(list(ROOT.glob("*.py"))) <= MOST_FILES


@pytest.mark.parametrize(
    "name", sorted({room(m) for m in trees()} & {p.name for p in ROOT.iterdir() if p.is_dir()})
)
def test_a_room_says_what_it_is(name: str) -> None:
    """What comes in, what goes out, and what it never imports."""
    said = ast.get_docstring(trees()[f"distclip.{name}"]) or ""
    assert "import" in said.lower(), name
    assert len(said.split()) >= 20, name


@pytest.mark.parametrize("name", sorted(CORE))
def test_within_a_room_of_the_core_nothing_is_hidden(name: str) -> None:
    """The rooms are private as they are: no second underscore."""
    assert not [m for m in in_room(name) if m.rpartition(".")[2].startswith("_")]


def test_strategies_see_norms_and_decisions_only() -> None:
    for m in in_room("strategies"):
        assert {room(i) for i in own_imports(m)} <= {"decide", "strategies", "torch_private"}, m
        assert not [i for i in imports(m) if i.startswith("torch.distributed")], m


def test_strategies_never_wait_for_the_device() -> None:
    for m in in_room("strategies"):
        attributes = {node.attr for node in ast.walk(trees()[m]) if isinstance(node, ast.Attribute)}
        assert not attributes & {"item", "tolist", "cpu", "numpy"}, m


def test_kernels_know_no_other_ranks() -> None:
    for m in in_room("kernels"):
        assert not [i for i in imports(m) if "distributed" in i], m


def test_who_talks_to_other_ranks() -> None:
    core = [m for m in trees() if room(m) in CORE | {"functional", "clipper", "hooks", "ownership"}]
    talking = {m.removeprefix("distclip.") for m in core if mentions_collectives(m)}
    every_step = {"measure.reduction"}
    planning = {f"planning.{m}" for m in ("agreement", "comparison", "evidence", "ownership")} | {
        "layout.scope"
    }
    on_request = {"inspection.description", "inspection.diagnosis", "inspection.verification"}
    assert talking - on_request == every_step | planning
