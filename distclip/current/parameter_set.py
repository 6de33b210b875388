"""The parameters that are clipped together: where they come from, how they lie over ranks, how they are
measured.

Programs change their parameters after the first clip. So everything that is known of them lives here, and one
method, :meth:`ParameterSet.make_current`, looks whether it still holds. What makes it stale is what the
program does alike on all ranks: a module's dictionaries, an optimizer's groups, ``requires_grad``, the kind
of device, a new declaration, another life of the process group. Where ranks have a collective in every step
they tell each other in it, and plan anew together or raise together; where they have none (replicas), a rank
that changed alone waits for the others in ``planning.arrival`` and says so.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from distclip.current.as_called import AsCalled
from distclip.current.asked import Asked, Beside, word_of
from distclip.current.calls import Calls
from distclip.current.names import Names
from distclip.current.others import CHANGED_ELSEWHERE, Others
from distclip.current.reading import (
    Read,
    are_elsewhere,
    modules_of,
    on_cpu,
    require_gradients_in_grad,
    say_what_changed,
    tells_apart,
)
from distclip.decide.norms import Norms
from distclip.errors import OwnershipError
from distclip.layout import declarations
from distclip.layout.arguments import require_material
from distclip.layout.in_backward import require_gradients_after_backward
from distclip.layout.parameters import NamedParameter, Parameters
from distclip.layout.placement import MANAGED
from distclip.layout.source import Witness, begun_to_train, have_gradients, witness_of
from distclip.layout.synchronisation import Synchronisation
from distclip.measure.gradients import Gradients
from distclip.measure.measurement import Measurement
from distclip.measure.overlap import Overlap
from distclip.measure.reduction import News
from distclip.planning.comparison import require_equal_gradients
from distclip.planning.news import AskedOtherwise, OutdatedPlan
from distclip.planning.plan import Plan, build_plan
from distclip.strategies._base import Strategy


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
        asked: what this rank is asked for, in words.
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
        self._accumulate, self.asked = accumulate, Asked(strategy, options or {})
        self._overlaps, self._watched = overlap, list(watched)
        self.plan: Plan | None = None
        self.measurement: Measurement | None = None
        self.overlap: Overlap | None = None
        self.tensors: list[Tensor] = []  # as read last, where they may be kept
        self._witness: Witness | None = None
        self._read: Read | None = None
        self._synchronisation = Synchronisation([])
        self._managed: list[int] = []  # positions of those of FSDP1
        self._life: weakref.ref[dist.ProcessGroup] | None = None
        self._calls = Calls()
        self._call_before = 0  # of the set that this one takes the place of
        self._is_due = False  # whether gradients of plain copies are compared in this step
        self._names = Names()

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
        asked = self.asked
        asked.beside = Beside(param_norms, weighted)
        asked.looks, compares = self._count_call()
        self._is_due = False
        current = self._look(parameters, tensors)
        is_elsewhere = current is not None and asked.looks and are_elsewhere(current)
        if current is None or is_elsewhere or self._is_asked_otherwise():
            calls = self._calls.number if current is not None or self.plan is None else 1
            settings = None if current is None or is_elsewhere else self._whole()
            if self.plan is not None and self._lives_on():
                self._others().tell(compares and not self._compares_late(), asked.expected(), settings)
            if settings is not None and self.plan is not None and self.plan.apart:
                assert current is not None
                self._require_synchronised(current)
                asked.settle()  # as those have whom the message went to; a plan is made with others too
            else:
                current = self._plan_anew(parameters)
                self._calls.number = calls
        else:
            assert self.plan is not None
            culprit = self._require_synchronised(current)
            self._is_due = culprit == "DDP" or compares
            if not self._compares_late():
                self.compare(current)
        if not self._keep:
            self.groups = None, None
        return current

    def _count_call(self) -> tuple[bool, bool]:
        """Whether to look closer in this one, and whether gradients of plain copies are compared."""
        if self.plan is not None and self._synchronisation.joins():
            return False, False  # some ranks may be absent
        looks = self._calls.another()
        return looks, looks and not (self._calls.number == 1 and self._is_proven())

    def tensors_of(self, parameters: Parameters) -> list[Tensor]:
        """As :meth:`make_current`, for something else than a step: every rank in scope calls it, or none."""
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
                read = Read(parameters)
            except (ValueError, TypeError):
                return None  # it is raised together with the others, who may not know of it
            if self._read is None or not read.same_as(self._read):
                return None
            tensors = self._take(parameters, read)
        plan = self.plan
        if tensors:  # module.to() changes plain parameters in place, and puts others for DTensors
            first = tensors[plan.positions[0] if plan.positions else 0]
            if first.device.type != plan.first_device_type or first.dtype != plan.first_dtype:
                return None
        if plan.frozen and (begun_to_train(tensors, plan.frozen) or have_gradients(tensors, plan.frozen)):
            return None
        return tensors

    def _compares_late(self) -> bool:
        """What is clipped as called is found by its list, which only some ranks may know from before, and
        then compare in other calls. So the message of the step comes first, which tells of other lists, and
        is as long for each; unless it does not go to all that compare."""
        called, plan = isinstance(self._strategy, AsCalled), self.plan
        return called and plan is not None and plan.group_name is not None and not plan.apart

    def compare(self, tensors: Sequence[Tensor]) -> None:
        """The gradients of plain copies, where that is due in this step and has not been done.

        Raises:
            OwnershipError, SettingsError: on every rank.
        """
        assert self.plan is not None
        if self._is_due and self.plan.compared != ():
            self._is_due = False
            try:
                require_equal_gradients(self.plan, tensors, self._whole())
            except OutdatedPlan:
                raise OwnershipError(CHANGED_ELSEWHERE) from None

    def _is_asked_otherwise(self) -> bool:
        """Whether this rank is set otherwise than was agreed upon, and nothing that is compared tells so; or
        would be the first to send another number of numbers."""
        plan, asked = self.plan, self.asked
        assert plan is not None
        if asked.looks and plan.compared == () and asked.is_set_otherwise():
            return True
        return plan.group_name is not None and asked.is_first()

    def _whole(self) -> dict[str, str]:
        return self.asked.whole(sends=self.plan is not None and self.plan.group_name is not None)

    def _is_proven(self) -> bool:
        """Whether a plan that was made before the first step has compared all gradients that it has to."""
        return self.plan is not None and self.plan.proven

    def _lives_on(self) -> bool:
        """Whether the process group is the one that the plan was made in."""
        now = dist.group.WORLD if dist.is_available() and dist.is_initialized() else None
        then = None if self._life is None else self._life()
        return now is then and (now is None) == (self._life is None)

    # --- what to do where it is not -----------------------------------------------------------------------

    def leave(self, successor: ParameterSet, words: str = "") -> None:
        """In place of :meth:`make_current`, where what is to be clipped from now on is the successor's, on
        this rank at least. ``words``: for what, where that is another norm of the same tensors.

        Raises:
            OwnershipError, SettingsError: only some ranks go there.
        """
        if self.plan is not None:
            self.asked.looks, compares = self._count_call()
            if self._lives_on():
                settings = successor.asked.settings() | {"call": words} if words else None
                self._others().tell(compares and not self._compares_late(), Beside(), settings)
            successor._call_before = self._calls.number
            successor._calls = self._calls if words else successor._calls

    def decline(self) -> None:
        """Something that only this rank may have noticed keeps it from the step: the others, who may wait in
        the step's message, are told there. Then raise."""
        if self.plan is not None:
            self._others().decline(self.asked.expected())

    def _others(self) -> Others:
        assert self.plan is not None
        assert self.measurement is not None
        return Others(self.plan, self.measurement, self._calls.number, self.asked.looks)

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
        word = 0 if silent else word_of(self.asked.now(sends=True))
        news = News(complaint is not None, word, self.asked.looks)
        try:
            norms, by_parameter = self.measurement.norms(
                tensors, gradients, param_norms, factor, loss, ready, weight, news=news
            )
        except AskedOtherwise:
            self._others().quote_both(self._whole())
        except OutdatedPlan:
            self._others().leave_word(CHANGED_ELSEWHERE if complaint is None else str(complaint))
            if complaint is None:
                raise OwnershipError(CHANGED_ELSEWHERE) from None
        if complaint is not None:
            raise complaint
        if self._compares_late() and not torch.compiler.is_compiling():
            self.compare(tensors)
        return gradients, norms, by_parameter

    def _plan_anew(self, parameters: Parameters) -> list[Tensor]:
        """Every rank in scope together."""
        before, (stages, process_group) = self._read, self.groups
        call, self._call_before = self._call_before if self.plan is None else self._calls.number, 0
        with torch.inference_mode(False), torch.no_grad(), on_cpu():
            named: list[NamedParameter] = []
            read, complaint = None, None
            try:
                read = Read(parameters)
                named = read.named
                require_material((p.name for p in named), [p.tensor for p in named])
                require_gradients_after_backward(named)
                require_gradients_in_grad(named)
                if before is not None:
                    read.require_declarations_kept(before)
            except (ValueError, TypeError) as error:
                complaint = error
                named = [p for p in named if not torch.nn.parameter.is_lazy(p.tensor)]  # which have no shape
            tensors = [p.tensor for p in named]
            modules = [*modules_of(parameters), *self._watched]
            synchronisation = Synchronisation(modules, tensors, keep=self._keep)
            complaint = complaint or synchronisation.not_final()
            self.plan, settings = None, self.asked.for_plan()
            plan = build_plan(
                self._names.told_apart(named),
                process_group,
                stages,
                everyone=self._strategy.uses_loss,
                ordered=self.asked.agreed.param_norms or tells_apart(self._strategy),
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
                say_what_changed(before.names, read.names)
            self.plan, self.measurement, self.asked.state_is_settled = plan, measurement, True
            world = dist.group.WORLD if dist.is_available() and dist.is_initialized() else None
            self._life = None if world is None else weakref.ref(world)
            for info, p in zip(plan.parameters, map(named.__getitem__, plan.positions), strict=True):
                self._names.keep(p.tensor, p.name, info.name)
            self._take(parameters, read, synchronisation)
            self._gather_in_backward(parameters, tensors)
        self._require_synchronised(tensors)  # DDP's have been compared
        return tensors

    def _take(
        self, parameters: Parameters, read: Read, synchronisation: Synchronisation | None = None
    ) -> list[Tensor]:
        """What was read is what there is now."""
        tensors = [p.tensor for p in read.named]
        self._read, self._witness = read, witness_of(parameters) if self._keep else None
        self._managed = [i for i, t in enumerate(tensors) if hasattr(t, MANAGED)]
        modules = [*modules_of(parameters), *self._watched]
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
        modules = modules_of(parameters)
        overlap = Overlap(plan, tensors, modules, self._strategy.norm_type, self._accumulate)
        if overlap.listens:
            self.overlap = overlap

    def agree_on_state(self) -> None:
        """A state has been loaded, as on every rank: compare it at the next step."""
        self.asked.state_is_settled, self._read = False, None

    # --- are the gradients synchronised? --------------------------------------------------------------------

    def watch(self, modules: Sequence[nn.Module]) -> None:
        """Modules that synchronise the gradients, beside those in the source."""
        self._watched = list(modules)
        self._read = None  # look again

    def synchronisation_of(self, parameters: Parameters) -> Synchronisation:
        """What synchronises the gradients, also before the first :meth:`make_current`; does not
        communicate."""
        if self._read is None:
            return Synchronisation([*modules_of(parameters), *self._watched])
        return self._synchronisation

    def _require_synchronised(self, tensors: Sequence[Tensor]) -> str | None:
        return self._synchronisation.require([tensors[i] for i in self._managed])
