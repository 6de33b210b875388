"""What torch does not promise is used in distclip/torch_private, and nowhere else."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import distclip

ROOT = Path(distclip.__file__).parent
DOOR = ROOT / "torch_private"

# Files that have still to be brought to it.
PENDING: set[str] = set()

# Attributes of torch's objects, which are seen on anything but ``self``; and as the whole of a string, which
# getattr() and itemgetter() take.
PRIVATE = {
    # tensors
    "_version", "_cdata", "_values", "_indices", "_local_tensor", "_spec",
    # scalers and optimizers
    "_per_optimizer_states", "_scale", "_enabled", "_device", "_lazy_init_scale_growth_tracker",
    "_step_supports_amp_scaling", "_optimizer_step_pre_hooks", "_optimizer_step_post_hooks",
    "_in_backward_optimizers",
    # modules
    "_modules", "_buffers", "_non_persistent_buffers_set", "_orig_mod", "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module", "_forward_hooks", "_backward_hooks",
    # groups and meshes
    "_world", "_device_types", "_get_backend", "_timeout", "_get_root_mesh", "_process_group_name",
    "_resolve_process_group", "_get_default_store", "default_pg_timeout", "bound_device_id",
    # DDP
    "_comm_hooks", "_delay_all_reduce_params", "_join_config", "_module_parameters", "reducer",
    "require_forward_param_sync", "require_backward_grad_sync",
    # FSDP1
    "_handle", "_inter_node_pg", "_sync_gradients", "_use_orig_params", "_unpadded_unsharded_size", "_shapes",
    "_params", "_param_infos", "_shared_params", "_shared_param_infos", "_shard_param_infos",
    "_numels_with_padding", "flat_param",
    # FSDP2
    "_get_fsdp_state", "_fsdp_param_group", "_fsdp_param_groups", "fsdp_params", "sharded_param",
    "unsharded_accumulated_grad", "_unsharded_param", "_partial_reduce_output", "_module_state_mapping",
    # operators and the engine
    "_schema", "_execution_engine", "_current_graph_task_id",
}  # fmt: skip


def is_private(name: str) -> bool:
    return name.startswith("_") and not (name.startswith("__") and name.endswith("__"))


def private_names(source: str) -> Iterator[tuple[int, str]]:
    """The line and the name of each use of what is torch's own."""
    tree = ast.parse(source)
    torchs: set[str] = set()  # names that are torch's, as this file knows them
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "torch":
                    torchs.add(alias.asname or "torch")
                    if any(map(is_private, alias.name.split("."))):
                        yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            for alias in node.names:
                torchs.add(alias.asname or alias.name)
                whole = f"{node.module}.{alias.name}"
                if any(map(is_private, whole.split("."))):
                    yield node.lineno, whole
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            root = node.value
            while isinstance(root, ast.Attribute):
                root = root.value
            own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            of_torch = isinstance(root, ast.Name) and root.id in torchs and is_private(node.attr)
            if of_torch or (node.attr in PRIVATE and not own):
                yield node.lineno, ast.unparse(node)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield from ((node.lineno, repr(name)) for name in PRIVATE & {node.value} if is_private(name))


def files() -> list[Path]:
    return [path for path in sorted(ROOT.rglob("*.py")) if DOOR not in path.parents]


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_nothing_private_of_torch_is_used_elsewhere() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in files()
        if str(path.relative_to(ROOT)) not in PENDING
        for line, name in private_names(path.read_text())
    ]
    assert not found, "\n".join(found)


def test_what_is_pending_is_pending() -> None:
    for name in PENDING:
        assert list(private_names((ROOT / name).read_text())), f"{name} is done: take it out of PENDING"


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch._foreach_mul_([], 2)",
        "import torch\ntorch._C._current_graph_task_id()",
        "import torch._C",
        "from torch._subclasses.fake_tensor import FakeTensor",
        "from torch.distributed.tensor._utils import compute_local_shape_and_global_offset",
        "from torch.distributed.distributed_c10d import _world",
        "from torch.distributed import distributed_c10d as c10d\nc10d._world.pg_map",
        "def f(gradient): return gradient._local_tensor",
        "def f(scaler): return getattr(scaler, '_per_optimizer_states', None)",
        "from operator import attrgetter\nspec = attrgetter('_spec')",
    ],
)
def test_each_way_of_using_it_is_seen(source: str) -> None:
    assert list(private_names(source))


@pytest.mark.parametrize(
    "source",
    [
        "class A:\n    def f(self): return self._scale + self._private",
        "import torch\ntorch.__version__",
        "from distclip.layout.memory import _begin_of",
    ],
)
def test_what_is_ours_is_not_meant(source: str) -> None:
    assert not list(private_names(source))


def test_the_door_knows_nothing_of_distclip() -> None:
    for path in DOOR.glob("*.py"):
        own = {name for name in imports(path) if name.split(".")[0] == "distclip"}
        assert not [n for n in own if not n.startswith(("distclip.errors", "distclip.torch_private"))], path


def test_kernels_come_through_a_part_of_it_that_knows_no_other_ranks() -> None:
    for path in (ROOT / "kernels").glob("*.py"):
        used = {name.split(".")[2] for name in imports(path) if name.startswith("distclip.torch_private.")}
        for file in used:
            assert not [n for n in imports(DOOR / f"{file}.py") if "distributed" in n], (path.name, file)


def test_every_entry_says_what_it_is() -> None:
    """A docstring, also behind what is no function or class. (What is imported has a comment.)"""
    for path in DOOR.glob("*.py"):
        if path.name in ("__init__.py", "writes.py"):
            continue
        body = ast.parse(path.read_text()).body
        for node, following in zip(body, [*body[1:], None], strict=True):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                assert ast.get_docstring(node), (path.name, node.name)
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                names = node.targets if isinstance(node, ast.Assign) else [node.target]
                if any(isinstance(n, ast.Name) and n.id == "__all__" for n in names):
                    continue
                said = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
                assert said, (path.name, node.lineno)
