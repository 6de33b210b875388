"""The parameters that are clipped together: where they come from, how they lie over ranks, how they are
measured.

Programs change their parameters after the first clip. So everything that is known of them lives here, and one
method, :meth:`ParameterSet.make_current`, looks whether it still holds. What makes it stale is what the
program does alike on all ranks: a module's dictionaries, an optimizer's groups, ``requires_grad``, the kind
of device, a new declaration, another life of the process group. Where ranks have a collective in every step
they tell each other in it, and plan anew together or raise together; where they have none (replicas), a rank
that changed alone waits for the others in ``_arrival`` and says so.
"""

from __future__ import annotations

import contextlib
import logging
import weakref
import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from itertools import count
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from distclip.current.as_called import AsCalled
from distclip.decide.norms import Norms
from distclip.errors import OwnershipError, SettingsError
from distclip.layout import declarations
from distclip.layout.arguments import require_material
from distclip.layout.declarations import Declared
from distclip.layout.in_backward import require_gradients_after_backward
from distclip.layout.life import Life, life_of
from distclip.layout.parameters import NamedParameter, Parameters, named_parameters
from distclip.layout.placement import MANAGED
from distclip.layout.source import Witness, begun_to_train, have_gradients, witness_of
from distclip.layout.synchronisation import Synchronisation
from distclip.measure.gradients import Gradients
from distclip.measure.measurement import Measurement
from distclip.measure.overlap import Overlap
from distclip.measure.reduction import WORDS, News
from distclip.planning.agreement import require_same_settings
from distclip.planning.arrival import leave_word
from distclip.planning.comparison import require_equal_gradients
from distclip.planning.news import AskedOtherwise, OutdatedPlan
from distclip.planning.plan import Plan, build_plan
from distclip.planning.settings import settings_of, state_of
from distclip.strategies._base import Strategy

logger = logging.getLogger("distclip")

_OTHER_GRADIENTS = ("main_grad", "decoupled_grad")  # where Megatron and others keep theirs


class ParameterSet:
    """Owns plan, measurement and what watches backward; keeps parameters alive only where the source does.

    Args:
        strategy: what it is measured for.
        keep: whether the source, and so its tensors, may be kept alive.
        stages, process_group: as for ``Clipper``.
        options: what else must be the same on every rank, by name.
        overlap: measure in backward what can be.
        watched: modules that synchronise the gradients, beside those in the source.

    Attributes:
        groups: ``stages`` and ``process_group``, which whoever does not keep the source gives for each call.
        options: as passed; they may change.
        asked: what this rank is asked for in this step, in words; ranks see there whether all are asked for
            the same.
        loss_scale: of the scaler that this rank is passed, read where ranks look closer.
        plan, measurement: None before the first :meth:`make_current`.
        overlap: what has been gathered in backward; None where nothing is.
    """

    def __init__(
        self,
        strategy: Strategy,
        *,
        keep: bool = True,
        stages: dist.ProcessGroup | DeviceMesh | None = None,
        process_group: dist.ProcessGroup | DeviceMesh | None = None,
        accumulate: torch.dtype = torch.float32,
        options: Mapping[str, object] | None = None,
        overlap: bool = False,
        watched: Sequence[nn.Module] = (),
    ) -> None:
        self._strategy, self._keep = strategy, keep
        self.groups = stages, process_group
        self._accumulate, self.options = accumulate, dict(options or {})
        self._overlaps, self._watched = overlap, list(watched)
        self.asked = ""
        self.loss_scale: Callable[[], float | None] | None = None
        self.plan: Plan | None = None
        self.measurement: Measurement | None = None
        self.overlap: Overlap | None = None
        self.tensors: list[Tensor] = []  # as read last, where they may be kept
        self._witness: Witness | None = None
        self._read: _Read | None = None
        self._synchronisation = Synchronisation([])
        self._managed: list[int] = []  # positions of those of FSDP1
        self._life: weakref.ref[dist.ProcessGroup] | None = None
        self._calls = 0
        self._call_before = 0  # of the set that this one takes the place of
        self._agreed_on_state = not strategy.state_dict()  # a drop-in has none
        self._settled: dict[str, str] = {}  # the settings, as agreed upon
        self._looks = False  # whether at what other ranks say in this step, wherever it is said
        self._param_norms = False  # whether ranks have agreed that they are measured at times
        # By id of the parameter: what its source calls it, and what it is called here.
        self._names: dict[int, tuple[weakref.ref[Life], str, str]] = {}

    # --- is it current? ---------------------------------------------------------------------------------

    def make_current(
        self,
        parameters: Parameters,
        tensors: list[Tensor] | None = None,
        *,
        param_norms: bool = False,
        weighted: bool = False,
    ) -> list[Tensor]:
        """The tensors of ``parameters``, with a plan that describes them as they are, for one step.

        ``weighted``: whether a weight travels in this step. ``tensors``: those, where the source is not kept
        and they are known to be the same as ever.

        Every rank in scope calls this, or none. Costs no message while nothing changes, except at calls 1, 2,
        4, 8, …, where the gradients of plain copies are compared.

        Raises:
            OwnershipError, SettingsError, ValueError: on every rank in scope alike.
        """
        if self.plan is not None and torch.compiler.is_compiling():
            return self.tensors if tensors is None else tensors
        looks, compares = self._count_call()
        self._looks = looks
        current = self._look(parameters, tensors)
        is_elsewhere = current is not None and looks and _are_elsewhere(current)
        is_set_otherwise = (looks and self._is_set_otherwise()) or (
            param_norms and not self._param_norms and self._sends_more_with_param_norms()
        )
        if current is None or is_elsewhere or is_set_otherwise:
            calls = self._calls if current is not None else 1
            settings = None if current is None or is_elsewhere else self._settings_now(param_norms)
            self._tell_others(compares, param_norms and self._param_norms, weighted, settings)
            current = self._plan_anew(parameters, param_norms)
            self._calls = calls
        else:
            assert self.plan is not None
            culprit = self._require_synchronised(current)
            if (culprit == "DDP" or compares) and self.plan.compared != ():
                try:
                    require_equal_gradients(self.plan, current, self._settings_now(param_norms))
                except OutdatedPlan:
                    raise OwnershipError(_CHANGED_ELSEWHERE) from None
        if not self._keep:
            self.groups = None, None
        return current

    def _count_call(self) -> tuple[bool, bool]:
        """Whether to look closer in this one, and whether gradients of plain copies are compared."""
        if self.plan is not None and self._synchronisation.joins():
            return False, False  # some ranks may be absent
        self._calls += 1
        looks = self._calls & (self._calls - 1) == 0
        return looks, looks and not (self._calls == 1 and self._is_proven())

    def tensors_of(self, parameters: Parameters) -> list[Tensor]:
        """As :meth:`make_current`, for something else than a step: every rank in scope calls this, or
        none."""
        tensors = self._look(parameters)
        return self._plan_anew(parameters) if tensors is None else tensors

    def _look(self, parameters: Parameters, tensors: list[Tensor] | None = None) -> list[Tensor] | None:
        """The tensors, where the plan still holds for them."""
        if self._witness is not None:
            tensors = self._witness.tensors(parameters)
        if self.plan is None or not self._lives_on():
            return None
        if tensors is None or self._read is None or self._read.declared.made != declarations.made:
            try:
                read = _Read(parameters)
            except (ValueError, TypeError):
                return None  # it is raised together with the others, who may not know of it
            if self._read is None or not read.same_as(self._read):
                return None
            tensors = self._take(parameters, read)
        plan = self.plan
        if plan.positions:  # module.to() changes plain parameters in place, and puts others for DTensors
            first = tensors[plan.positions[0]]
            if first.device.type != plan.first_device_type or first.dtype != plan.first_dtype:
                return None
        if plan.frozen and (begun_to_train(tensors, plan.frozen) or have_gradients(tensors, plan.frozen)):
            return None
        return tensors

    def _is_set_otherwise(self) -> bool:
        """Whether this rank has other settings than were agreed upon, and nothing that is compared tells so.
        (A drop-in is told its settings in each call.)"""
        compares = self.plan is not None and self.plan.compared != ()
        as_called = isinstance(self._strategy, AsCalled)
        return not as_called and not compares and self._settings() != self._settled

    def _sends_more_with_param_norms(self) -> bool:
        """Whether a rank that measured them alone would send a message of another size than the others."""
        alike = self._strategy.per_parameter or self._strategy.per_unit
        return self.plan is not None and self.plan.group_name is not None and not alike

    def _is_proven(self) -> bool:
        """Whether a plan that was made before the first step has compared all gradients that it has to."""
        return self.plan is not None and self.plan.proven

    def _lives_on(self) -> bool:
        """Whether the process group is the one that the plan was made in."""
        now = dist.group.WORLD if dist.is_available() and dist.is_initialized() else None
        then = None if self._life is None else self._life()
        return now is then and (now is None) == (self._life is None)

    # --- what to do where it is not -----------------------------------------------------------------------

    def leave(self, successor: ParameterSet) -> None:
        """In place of :meth:`make_current`, where what is to be clipped from now on is the successor's, on
        this rank at least.

        Raises:
            OwnershipError: only some ranks go there.
        """
        if self.plan is not None:
            _, compares = self._count_call()
            self._tell_others(compares, param_norms=False, weighted=False)
            successor._call_before = self._calls

    def _tell_others(
        self,
        compares: bool,
        param_norms: bool,
        weighted: bool,
        settings: Mapping[str, str] | None = None,
    ) -> None:
        """If the other ranks, where nothing has changed for them, wait for this one in the step's message:
        join the step as they see it, and say there that the plan is out of date. Returns if all ranks say so.

        Args:
            settings: where it is these that have changed, and nothing else.

        Raises:
            OwnershipError, SettingsError: on every rank: only some do.
        """
        if self.plan is None or not self._lives_on():
            return
        try:
            _ = self.plan.group
        except ValueError:
            return  # it has been destroyed: nobody waits there
        if settings is not None and not (self._looks or self.plan.device.type == "cpu"):
            settings = None  # the others would not hear what they are
        try:
            if compares:
                require_equal_gradients(self.plan, settings=settings)
            if self.plan.group_name is not None:
                self._call_off(param_norms, weighted, settings)
        except AskedOtherwise:
            self._quote_both(settings or {})
        except OutdatedPlan as news:
            if not news.everyone:
                self._leave_word(_CHANGED_HERE)
                raise OwnershipError(_CHANGED_HERE) from None

    def decline(self, param_norms: bool = False, *, weighted: bool = False) -> None:
        """Something that only this rank may have noticed keeps it from the step: the others, who may wait in
        the step's message, are told there. Then raise."""
        if self.plan is not None and self.plan.group_name is not None:
            with contextlib.suppress(OutdatedPlan):
                self._call_off(param_norms, weighted)
            self._leave_word("something keeps it from this step")

    def _leave_word(self, why: str) -> None:
        """This rank raises. Those that the step's message has not reached may all have changed their
        parameters, and wait for it in the next plan."""
        assert self.plan is not None
        group = self.plan.group
        if group is not None and group.size() < self.plan.scope.size:
            scope = self.plan.scope.group()
            assert scope is not None
            leave_word(scope, self._calls, why)

    def _quote_both(self, settings: Mapping[str, str]) -> None:
        """Ranks have found that they are asked for different things. Those of the plan's group call this.

        Raises:
            SettingsError: always.
        """
        self._leave_word(_ASKED_OTHERWISE)
        assert self.plan is not None
        assert self.plan.group is not None
        require_same_settings(settings, self.plan.group, self.plan.device)
        raise SettingsError(_ASKED_OTHERWISE)

    def _call_off(self, param_norms: bool, weighted: bool, settings: Mapping[str, str] | None = None) -> None:
        """The step's message, without gradients.

        Raises:
            OutdatedPlan: always, unless it is the ``settings`` that this rank has to tell.
            AskedOtherwise: then, where other ranks have others.
        """
        assert self.plan is not None
        assert self.measurement is not None
        weight = torch.zeros(1, dtype=torch.float64, device=self.plan.device) if weighted else None
        if weight is not None and not self.measurement.carries:
            self.measurement.everywhere(weight)
        news = News(outdated=True)
        if settings is not None:
            news = News(word=_word_of(f"{sorted(settings.items())}"), looks=self._looks)
        self.measurement.norms((), Gradients([], []), param_norms, weight=weight, news=news)

    def measure(
        self,
        tensors: Sequence[Tensor],
        param_norms: bool = False,
        factor: Tensor | None = None,
        loss: Tensor | None = None,
        weight: Tensor | None = None,
    ) -> tuple[Gradients | None, Norms, Norms | None]:
        """The gradients (None where they had been measured in backward), the norms that the strategy wants of
        them and those of the parameters: one all-reduce at most.

        Raises:
            ValueError, OwnershipError: on every rank that joins it: the gradients of some cannot be measured.
            SettingsError: likewise: ranks are asked for different things in this step.
        """
        assert self.measurement is not None
        ready = None if self.overlap is None else self.overlap.sums()
        gradients, complaint = None, None
        if ready is None:
            try:
                gradients = self.measurement.collect(tensors, param_norms)
            except ValueError as error:  # others may wait for this rank
                gradients, complaint = Gradients([], []), error
        assert self.plan is not None
        silent = self.plan.group_name is None or torch.compiler.is_compiling()
        asked = "" if silent else self._asked_now(param_norms)
        news = News(complaint is not None, _word_of(asked) if asked else 0, self._looks)
        try:
            norms, by_parameter = self.measurement.norms(
                tensors, gradients, param_norms, factor, loss, ready, weight, news=news
            )
        except AskedOtherwise:
            self._quote_both(self._settings_now(param_norms))
            raise
        except OutdatedPlan:
            self._leave_word(_CHANGED_ELSEWHERE if complaint is None else str(complaint))
            if complaint is None:
                raise OwnershipError(_CHANGED_ELSEWHERE) from None
        if complaint is not None:
            raise complaint
        return gradients, norms, by_parameter

    def _plan_anew(self, parameters: Parameters, param_norms: bool = False) -> list[Tensor]:
        """Every rank in scope together."""
        before, (stages, process_group) = self._read, self.groups
        call, self._call_before = self._call_before if self.plan is None else self._calls, 0
        with torch.inference_mode(False), torch.no_grad(), _on_cpu():
            named: list[NamedParameter] = []
            read, complaint = None, None
            try:
                read = _Read(parameters)
                named = read.named
                require_material((p.name for p in named), [p.tensor for p in named])
                require_gradients_after_backward(named)
                _require_gradients_in_grad(named)
                if before is not None:
                    read.require_declarations_kept(before)
            except (ValueError, TypeError) as error:
                complaint = error
                named = [p for p in named if not torch.nn.parameter.is_lazy(p.tensor)]  # which have no shape
            tensors = [p.tensor for p in named]
            synchronisation = Synchronisation(
                [*_modules_of(parameters), *self._watched], tensors, keep=self._keep
            )
            self.plan, self._settled = None, self._settings()
            settings = self._settled | self._settings_of_plan(param_norms)
            self._param_norms = self._param_norms or param_norms
            plan = build_plan(
                self._told_apart(named),
                process_group,
                stages,
                everyone=self._strategy.uses_loss,
                ordered=self._param_norms or _tells_apart(self._strategy),
                averaged=synchronisation.averaged(),
                settings=settings,
                complaint=complaint,
                call=call,
            )
            assert read is not None
            measurement = Measurement(plan, self._strategy, tensors, self._accumulate)
            self._strategy.prepare(plan.every)
            self._strategy.to(plan.device)
            if before is not None:
                _say_what_changed(before.names, read.names)
            self.plan, self.measurement, self._agreed_on_state = plan, measurement, True
            world = dist.group.WORLD if dist.is_available() and dist.is_initialized() else None
            self._life = None if world is None else weakref.ref(world)
            for info, p in zip(plan.parameters, map(named.__getitem__, plan.positions), strict=True):
                self._names[id(p.tensor)] = weakref.ref(life_of(p.tensor)), p.name, info.name
            self._take(parameters, read, synchronisation)
            self._gather_in_backward(parameters, tensors)
        self._require_synchronised(tensors)  # DDP's have been compared
        return tensors

    def _told_apart(self, named: Sequence[NamedParameter]) -> list[NamedParameter]:
        """Two models may use the same names: the second to come is ``name#2``. What has a name keeps it while
        its source calls it the same, since state goes on by name."""
        names: dict[int, str] = {}
        for p in named:
            life, called, name = self._names.get(id(p.tensor), (None, "", ""))
            if life is not None and life() is life_of(p.tensor) and called == p.name:
                names[id(p.tensor)] = name
        taken, wanted = set(names.values()), {p.name for p in named}
        for p in named:
            if id(p.tensor) not in names:
                others = (other for n in count(2) if (other := f"{p.name}#{n}") not in wanted)
                name = p.name if p.name not in taken else next(o for o in others if o not in taken)
                taken.add(name)
                names[id(p.tensor)] = name
        self._names = {
            id(p.tensor): (weakref.ref(life_of(p.tensor)), p.name, names[id(p.tensor)]) for p in named
        }
        return [p._replace(name=names[id(p.tensor)]) for p in named]

    def _settings(self) -> dict[str, str]:
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return {}
        return settings_of(self._strategy, self.options)

    def _settings_now(self, param_norms: bool) -> dict[str, str]:
        return self._settings() | {"call": self._asked_now(param_norms)}

    def _asked_now(self, param_norms: bool) -> str:
        """Replicas may measure parameters on some ranks only."""
        says = self.asked and self.plan is not None and self.plan.group_name is not None
        asked = f"{self.asked}, param_norms={param_norms}" if says else self.asked
        if self.loss_scale is None or not self._looks:
            return asked
        return f"{asked}, loss scale {self.loss_scale()}"

    def _settings_of_plan(self, param_norms: bool) -> dict[str, str]:
        """Those that are agreed upon when a plan is made, and not looked at later."""
        if not self._settled:
            return {}
        options = f"{self._settled['options']}, param_norms={param_norms}"
        return {"options": options, "call": self._asked_now(param_norms=False)} | (
            {} if self._agreed_on_state else {"state": state_of(self._strategy)}
        )

    def agree_on_state(self) -> None:
        """A state has been loaded, as on every rank: compare it at the next step."""
        self._agreed_on_state, self._read = False, None

    def _take(
        self, parameters: Parameters, read: _Read, synchronisation: Synchronisation | None = None
    ) -> list[Tensor]:
        """What was read is what there is now."""
        tensors = [p.tensor for p in read.named]
        self._read, self._witness = read, witness_of(parameters) if self._keep else None
        self._managed = [i for i, t in enumerate(tensors) if hasattr(t, MANAGED)]
        modules = [*_modules_of(parameters), *self._watched]
        self._synchronisation = synchronisation or Synchronisation(modules, tensors, keep=self._keep)
        if self._keep:
            self.tensors = tensors
        read.named = []
        return tensors

    def _gather_in_backward(self, parameters: Parameters, tensors: list[Tensor]) -> None:
        if self.overlap is not None:
            self.overlap.remove()
            self.overlap = None
        plan = self.plan
        assert plan is not None
        if not self._overlaps or plan.partial or any(p.partial for p in plan.placements):
            return  # those are summed first, after backward
        modules = _modules_of(parameters)
        overlap = Overlap(plan, tensors, modules, self._strategy.norm_type, self._accumulate)
        if overlap.listens:
            self.overlap = overlap

    # --- are the gradients synchronised? --------------------------------------------------------------------

    def watch(self, modules: Sequence[nn.Module]) -> None:
        """Modules that synchronise the gradients, beside those in the source."""
        self._watched = list(modules)
        self._read = None  # look again

    def synchronisation_of(self, parameters: Parameters) -> Synchronisation:
        """What synchronises the gradients, also before the first :meth:`make_current`; does not
        communicate."""
        if self._read is None:
            return Synchronisation([*_modules_of(parameters), *self._watched])
        return self._synchronisation

    def _require_synchronised(self, tensors: Sequence[Tensor]) -> str | None:
        """``"DDP"`` where the gradients have to be compared to know.

        Raises:
            ValueError: on every rank: the gradients there are now are only this rank's own.
        """
        culprit = self._synchronisation.was_off([tensors[i] for i in self._managed])
        if culprit is not None and culprit != "DDP":
            raise ValueError(
                f"the gradients under {culprit} have not been synchronised: the last backward pass ran in "
                "no_sync() or after set_requires_gradient_sync(False). Synchronise in the last micro-batch "
                "(clipper.accumulate does), then clip."
            )
        return culprit


class _Read:
    """What was read from a source."""

    def __init__(self, parameters: Parameters) -> None:
        self.named = named_parameters(parameters)
        self.names = tuple(p.name for p in self.named)
        self._places = [(p.name, p.optimizer_group) for p in self.named]
        self._lives = [weakref.ref(life_of(p.tensor)) for p in self.named]
        declarations.require_none_pickled(_modules_of(parameters))
        self.declared = Declared(self.named)
        self._declarations = [self.declared.of.get(id(p.tensor)) for p in self.named]

    def same_as(self, before: _Read) -> bool:
        return (
            self._places == before._places
            and all(ref() is life_of(p.tensor) for ref, p in zip(before._lives, self.named, strict=True))
            and self._declarations == before._declarations
        )

    def require_declarations_kept(self, before: _Read) -> None:
        """
        Raises:
            ValueError: something was declared of a parameter object, or of a module, that another has taken
                the place of.
        """
        known = {
            name: declaration
            for name, declaration in zip(before.names, before._declarations, strict=True)
            if declaration is not None
        }
        for p in self.named:
            old = known.get(p.name)
            if old is not None and id(p.tensor) not in self.declared.of:
                raise ValueError(
                    f"another parameter has taken the place of {p.name}, of which was {old.label}: declare "
                    "that of the new one too, or of its module, whose names stay"
                )


_CHANGED_HERE = (
    "the parameters have changed on this rank (replaced, added, removed, or begun to train), and not on all "
    "ranks that clip together, which cannot know of it: nothing was clipped. Change them on every rank in "
    "the same step, or make a new Clipper on every rank then."
)
_CHANGED_ELSEWHERE = (
    "on another rank, which raises too, the parameters have changed (replaced, added, removed, or begun to "
    "train), or something else keeps it from this step; not so on this rank. Nothing was clipped. Change "
    "them on every rank in the same step, or make a new Clipper on every rank then."
)


_ASKED_OTHERWISE = (
    "ranks are asked for different things in this step (another max_norm, a GradScaler on some of them, "
    "another policy, param_norms=): nothing was clipped. Give every rank the same."
)


@lru_cache(maxsize=256)
def _word_of(asked: str) -> int:
    return 1 + zlib.crc32(asked.encode()) % (WORDS - 1)


def _on_cpu() -> contextlib.AbstractContextManager[object]:
    """Numbers are made on the CPU, where the default device may be one without memory. (Only there, since
    torch then passes each of its functions through Python.)"""
    cpu = torch.device("cpu")
    return contextlib.nullcontext() if torch.get_default_device() == cpu else cpu


def _tells_apart(strategy: Strategy) -> bool:
    """Whether which parameter is which matters to it."""
    return strategy.per_parameter or strategy.per_unit or len(strategy.groups) > 1


def _modules_of(parameters: Parameters) -> list[nn.Module]:
    source: Any = parameters if isinstance(parameters, list | tuple) else [parameters]
    return [m for m in source if isinstance(m, nn.Module)]


def _require_gradients_in_grad(named: Sequence[NamedParameter]) -> None:
    """
    Raises:
        ValueError: gradients are kept where nothing here reads them.
    """
    for p in named:
        for attribute in _OTHER_GRADIENTS:
            if _is_kept_in(attribute, p.tensor):
                raise ValueError(
                    f"{p.name} has its gradient in .{attribute} and none in .grad, which is what is clipped: "
                    f"set parameter.grad = parameter.{attribute} for each before the clip (Megatron's "
                    "optimizer.prepare_grads() does), or clip the optimizer's own copies, "
                    "optimizer.get_parameters()"
                )


def _are_elsewhere(tensors: Sequence[Tensor]) -> bool:
    """Whether any has its gradient where nothing here reads it."""
    return any(_is_kept_in(attribute, t) for attribute in _OTHER_GRADIENTS for t in tensors)


def _is_kept_in(attribute: str, tensor: Tensor) -> bool:
    return tensor.grad is None and isinstance(getattr(tensor, attribute, None), Tensor)


def _say_what_changed(before: Sequence[str], now: Sequence[str]) -> None:
    gone, new = sorted(set(before) - set(now)), sorted(set(now) - set(before))
    if (gone or new) and (not dist.is_initialized() or dist.get_rank() == 0):
        parts = [
            f"{len(names)} {word} ({_listed(names)})"
            for word, names in (("new", new), ("gone", gone))
            if names
        ]
        logger.info(
            "the parameters have changed: %s; what was learned of the others goes on", ", ".join(parts)
        )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if names[3:] else "")
