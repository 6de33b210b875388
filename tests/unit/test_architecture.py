"""Imports point one way, and collectives stay where they belong (DESIGN.md, section 2)."""

from __future__ import annotations

import ast
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import distclip

ROOT = Path(distclip.__file__).parent
OUTER = ("training", "integrations", "monitor", "cli", "bench")

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
    """The modules that a module imports, those of distclip in full (``from distclip import _kernels``)."""
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


def part(module: str) -> str:
    """The first name below distclip: ``strategies`` for distclip.strategies.value."""
    return [*module.split("."), ""][1]


def core() -> list[str]:
    return [m for m in trees() if m != "distclip" and part(m) not in OUTER]


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


def test_no_cycles() -> None:
    graph = {m: own_imports(m) - {m} for m in trees() if m != "distclip"}
    order = list(TopologicalSorter(graph).static_order())  # raises CycleError
    rank = {m: i for i, m in enumerate(order)}
    flow = ("_placement", "_plan", "_reduction", "clipper")
    assert [f"distclip.{m}" for m in flow] == sorted((f"distclip.{m}" for m in flow), key=rank.__getitem__)


def test_nothing_imports_the_package_itself() -> None:
    assert not [m for m in core() if "distclip" in imports(m)]


def test_strategies_see_norms_and_decisions_only() -> None:
    allowed = {"_norms", "_decision", "_parameters", "strategies"}
    strategies = [m for m in trees() if part(m) == "strategies"]
    assert len(strategies) > 3
    for m in strategies:
        assert {part(i) for i in own_imports(m)} <= allowed, m
        assert not [i for i in imports(m) if i.startswith("torch.distributed")], m


def test_strategies_never_wait_for_the_device() -> None:
    for m, tree in trees().items():
        if part(m) == "strategies":
            attributes = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
            assert not attributes & {"item", "tolist", "cpu", "numpy"}, m


def test_kernels_know_no_other_ranks() -> None:
    for m in trees():
        if part(m) == "_kernels":
            assert {part(i) for i in own_imports(m)} <= {"_kernels"}, m
            assert not [i for i in imports(m) if "distributed" in i], m


def test_core_does_not_know_what_is_built_on_it() -> None:
    for m in core():
        assert not [i for i in own_imports(m) if part(i) in OUTER], m


def test_who_talks_to_other_ranks() -> None:
    talking = {part(m) for m in core() if mentions_collectives(m)}
    every_step, planning, on_request = (
        {"_reduction"},
        {"_agreement", "_ownership", "_scope"},
        {"_description", "_diagnosis", "_verification"},
    )
    assert talking - on_request == every_step | planning
