"""The clipping functions that a script may use, and how a watch stands in their place."""

from __future__ import annotations

import contextlib
import functools
import importlib.abc
import importlib.util
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Function:
    """A function that clips.

    Attributes:
        module: where it is defined.
        name: in the module; ``Class.method`` for methods.
        gets: what its first argument is (after self): "parameters", "gradients", "module" or, for methods of
            FSDP1, "self".
        kind: "norm" clips by norm, "measure" only measures, "scale" gets a norm that is known, "value"
            clamps.
        max_norm, norm_type: their names as arguments; "" where there is none.
    """

    module: str
    name: str
    gets: str = "parameters"
    kind: str = "norm"
    max_norm: str = "max_norm"
    norm_type: str = "norm_type"

    @property
    def label(self) -> str:
        return f"{self.module}.{self.name}"


_NN = "torch.nn.utils"  # under their public names
FUNCTIONS = (
    Function(_NN, "clip_grad_norm_"),
    Function(_NN, "clip_grad_norm"),
    Function(_NN, "clip_grad_value_", kind="value", max_norm="clip_value", norm_type=""),
    Function(_NN, "get_total_norm", gets="gradients", kind="measure", max_norm=""),
    Function(_NN, "clip_grads_with_norm_", kind="scale", norm_type=""),
    Function(
        "torch.distributed.fsdp.fully_sharded_data_parallel",
        "FullyShardedDataParallel.clip_grad_norm_",
        gets="self",
    ),
    Function("accelerate.accelerator", "Accelerator.clip_grad_norm_"),
    Function(
        "accelerate.accelerator",
        "Accelerator.clip_grad_value_",
        kind="value",
        max_norm="clip_value",
        norm_type="",
    ),
    Function("lightning.fabric.fabric", "Fabric.clip_gradients", gets="module"),
    # What the stacks keep for themselves.
    Function("torchtitan.distributed.utils", "clip_grad_norm_"),
    Function("verl.utils.fsdp_utils", "fsdp2_clip_grad_norm_"),
    Function("areal.engine.fsdp_utils.grad", "fsdp2_clip_grad_norm"),
    Function("veomni.distributed.fsdp2.clip_grad_norm", "veomni_clip_grad_norm", gets="module"),
    Function("axolotl.utils.gradient_clipping", "clip_grad_norm_"),
    Function("cosmos_rl.utils.distributed", "gradient_norm_clipping"),
)


@dataclass(frozen=True)
class Call:
    """A call of one of them, as the script made it.

    Attributes:
        tensors: the parameters, or gradients, that it was given.
        args, kwargs: with another iterator where it was given one, which can be read only once.
        exhausted: whether that was an iterator with nothing left in it, which had something before.
    """

    function: Function
    tensors: list[Tensor]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    exhausted: bool

    def argument(self, name: str) -> Any:
        """Its value, the function's default where it was not given, None where there is no such argument."""
        return self.bound.get(name) if name else None

    @functools.cached_property
    def bound(self) -> Mapping[str, Any]:
        found = dict(self.kwargs)
        positions = _POSITIONS.get((self.function.module, self.function.name), ())
        found.update(zip(positions, self.args, strict=False))
        return found


_POSITIONS: dict[tuple[str, str], tuple[str, ...]] = {}  # the names of arguments, read from the originals


def _call(function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    names = _POSITIONS[function.module, function.name]
    at = 1 if "." in function.name and function.gets != "self" else 0
    name = names[at]
    given = kwargs[name] if name in kwargs else args[at]
    exhausted = False
    if function.gets in ("self", "module"):
        tensors = list(given.parameters())
    elif isinstance(given, Tensor):
        tensors = [given]
    elif isinstance(given, nn.Module):
        tensors = list(given.parameters())
    else:
        items = list(given)
        if isinstance(given, Iterator) and items:
            _note_used(given)
            again = (item for item in items)  # an iterator too: functions treat those in ways of their own
            if name in kwargs:
                kwargs = {**kwargs, name: again}
            else:
                args = (*args[:at], again, *args[at + 1 :])
        elif isinstance(given, Iterator):
            exhausted = given in _used
        tensors = [t for t in items if isinstance(t, Tensor)]
    return Call(function, tensors, args, kwargs, exhausted)


_used: weakref.WeakSet[Any] = weakref.WeakSet()  # iterators that a call has read


def _note_used(iterator: Any) -> None:
    with contextlib.suppress(TypeError):  # of a class that has no weak references
        _used.add(iterator)


Replacement = Callable[[Function, Callable[..., Any], Call], Any]


class Watch:
    """Puts ``replacement(function, original, call)`` in the place of the functions, also of those whose
    module is imported later, and under every name that a module has given them."""

    def __init__(self, replacement: Replacement, functions: Sequence[Function] = FUNCTIONS) -> None:
        self._replacement, self._functions = replacement, functions
        self._undo: list[tuple[Any, str, Any]] = []
        self._depth = 0  # of calls within one another, of which the outermost counts
        self._finder = _Finder({f.module for f in functions}, self._patch)

    def install(self) -> None:
        for name in {f.module for f in self._functions if f.module.startswith("torch.")}:
            importlib.import_module(name)
        for name in {f.module for f in self._functions} & set(sys.modules):
            self._patch(sys.modules[name])
        sys.meta_path.insert(0, self._finder)

    def remove(self) -> None:
        if self._finder in sys.meta_path:
            sys.meta_path.remove(self._finder)
        for holder, name, original in reversed(self._undo):
            setattr(holder, name, original)
        self._undo.clear()

    def _patch(self, module: ModuleType) -> None:
        for function in self._functions:
            if function.module != module.__name__:
                continue
            holder: Any = module
            *classes, name = function.name.split(".")
            for part in classes:
                holder = getattr(holder, part, None)
            original = None if holder is None else vars(holder).get(name)
            if original is None or hasattr(original, _ORIGINAL):
                continue
            code = getattr(getattr(original, "__wrapped__", original), "__code__", None)
            if code is None:
                continue  # nothing tells what its arguments are called
            _POSITIONS[function.module, function.name] = code.co_varnames[: code.co_argcount]
            watched = self._watched(function, original)
            self._put(holder, name, watched)
            if not classes:  # other modules may have it under names of their own
                for other in list(sys.modules.values()):
                    for key, value in list(getattr(other, "__dict__", {}).items()):
                        if value is original and other is not module:
                            self._put(other, key, watched)

    def _put(self, holder: Any, name: str, watched: Any) -> None:
        self._undo.append((holder, name, vars(holder)[name]))
        setattr(holder, name, watched)

    def _watched(self, function: Function, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def watched(*args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling() or self._depth:
                return original(*args, **kwargs)
            try:
                call = _call(function, args, kwargs)
            except Exception:  # what the original says of such arguments is what the script is to see
                return original(*args, **kwargs)
            self._depth += 1
            try:
                return self._replacement(function, original, call)
            finally:
                self._depth -= 1

        setattr(watched, _ORIGINAL, original)
        return watched


_ORIGINAL = "_distclip_original"


class _Finder(importlib.abc.MetaPathFinder):
    """Sees a module once it has been imported."""

    def __init__(self, names: set[str], then: Callable[[ModuleType], None]) -> None:
        self._names, self._then = names, then

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name not in self._names:
            return None
        self._names.discard(name)  # once
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self._then)
        return spec


class _Loader(importlib.abc.Loader):
    def __init__(self, loader: Any, then: Callable[[ModuleType], None]) -> None:
        self._loader, self._then = loader, then

    def create_module(self, spec: Any) -> Any:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        self._then(module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)
