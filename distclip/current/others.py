"""The ranks that clip together with this one, and wait for it in the message of a step."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NoReturn

import torch

from distclip.current.asked import Beside, word_of
from distclip.errors import OwnershipError, SettingsError
from distclip.measure.gradients import Gradients
from distclip.measure.measurement import Measurement
from distclip.measure.reduction import News
from distclip.planning.agreement import require_same_settings
from distclip.planning.arrival import leave_word
from distclip.planning.comparison import require_equal_gradients
from distclip.planning.news import AskedOtherwise, OutdatedPlan
from distclip.planning.plan import Plan


@dataclass(frozen=True)
class Others:
    """What is said to them where something keeps this rank from the step.

    Attributes:
        plan, measurement: as they have them.
        call: the how manieth step this is.
        looks: whether all look in it at what the others say.
    """

    plan: Plan
    measurement: Measurement
    call: int
    looks: bool

    def tell(self, compares: bool, beside: Beside, settings: Mapping[str, str] | None = None) -> None:
        """If the other ranks, where nothing has changed for them, wait for this one in the step's message:
        join the step as they see it, and say there that the plan is out of date. Returns if all ranks say so.

        Args:
            beside: as they send it.
            settings: where it is these that have changed, and nothing else.

        Raises:
            OwnershipError, SettingsError: on every rank: only some do.
        """
        try:
            _ = self.plan.group
        except ValueError:
            return  # it has been destroyed: nobody waits there
        if settings is not None and not (self.looks or self.plan.device.type == "cpu"):
            settings = None  # the others would not hear what they are
        try:
            if compares:
                require_equal_gradients(self.plan, settings=settings)
            if self.plan.group_name is not None:
                self._call_off(beside, settings)
        except AskedOtherwise:
            self.quote_both(settings or {})
        except OutdatedPlan as news:
            if not news.everyone:
                self.leave_word(_CHANGED_HERE)
                raise OwnershipError(_CHANGED_HERE) from None

    def decline(self, beside: Beside) -> None:
        """Something that only this rank may have noticed keeps it from the step. Then it raises."""
        if self.plan.group_name is not None:
            with contextlib.suppress(OutdatedPlan):
                self._call_off(beside)
            self.leave_word("something keeps it from this step")

    def leave_word(self, why: str) -> None:
        """This rank raises. Those that the step's message has not reached may all have changed their
        parameters, and wait for it in the next plan."""
        group = self.plan.group
        if group is not None and group.size() < self.plan.scope.size:
            scope = self.plan.scope.group()
            assert scope is not None
            leave_word(scope, self.call, why)

    def quote_both(self, settings: Mapping[str, str]) -> NoReturn:
        """Ranks have found that they are asked for different things. Those of the plan's group call this.

        Raises:
            SettingsError: always.
        """
        self.leave_word(_ASKED_OTHERWISE)
        assert self.plan.group is not None
        require_same_settings(settings, self.plan.group, self.plan.device)
        raise SettingsError(_ASKED_OTHERWISE)

    def _call_off(self, beside: Beside, settings: Mapping[str, str] | None = None) -> None:
        """The step's message, without gradients.

        Raises:
            OutdatedPlan: always, unless it is the ``settings`` that this rank has to tell.
            AskedOtherwise: then, where other ranks have others.
        """
        weight = torch.zeros(1, dtype=torch.float64, device=self.plan.device) if beside.weighted else None
        if weight is not None and not self.measurement.carries:
            self.measurement.everywhere(weight)
        news = News(outdated=True)
        if settings is not None:
            news = News(word=word_of(f"{sorted(settings.items())}"), looks=self.looks)
        self.measurement.norms((), Gradients([], []), beside.param_norms, weight=weight, news=news)


_CHANGED_HERE = (
    "the parameters have changed on this rank (replaced, added, removed, or begun to train), and not on all "
    "ranks that clip together, which cannot know of it: nothing was clipped. Change them on every rank in "
    "the same step, or make a new Clipper on every rank then."
)
CHANGED_ELSEWHERE = (
    "on another rank, which raises too, the parameters have changed (replaced, added, removed, or begun to "
    "train), or something else keeps it from this step; not so on this rank. Nothing was clipped. Change "
    "them on every rank in the same step, or make a new Clipper on every rank then."
)
_ASKED_OTHERWISE = (
    "ranks are asked for different things in this step (another max_norm, a GradScaler on some of them, "
    "another policy, param_norms= or weights): nothing was clipped. Give every rank the same."
)
