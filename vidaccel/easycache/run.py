"""One use of EasyCache on a pipeline: the generation under way, and the report of the last finished one.

All transformers of a pipeline share one `EasyCacheRun`: their steps are the steps of one generation. It belongs to the
pipeline or transformer it was applied to; nothing is kept on a class or a module. What decides is a `ReuseRule` for
each sample; nothing here adds to the rule.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vidaccel.catalog.table import batched_guidance_of, has_several_loops
from vidaccel.catalog.traits import GUIDANCE_CONTEXT
from vidaccel.easycache import advice
from vidaccel.easycache.batch import Batch, batch_of
from vidaccel.easycache.conditions import Conditions
from vidaccel.easycache.config import EasyCacheConfig
from vidaccel.easycache.layout import Piece, Pieces
from vidaccel.easycache.recording import Recording, Step
from vidaccel.easycache.report import EasyCacheReport, Reason, StepDecision
from vidaccel.easycache.rule import ReuseRule
from vidaccel.easycache.steps import Call, Place, PlaceTracker
from vidaccel.machine.timing import Moment


@dataclass(frozen=True, kw_only=True)
class GroupSplit:
    """What to do in one call: the groups of its batch that are reused, and those the model runs for."""

    branch: str
    batch: Batch
    reused: tuple[int, ...]
    computed: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class _Prepared:
    """What a decision needs: for each group a reason to compute, or None and its numbers on the device.

    flags: whether the conditions of the deciding branch changed, whether those of another branch did, and whether the
        last two evaluations had different ones: what the host knows, else a tensor of shape ().
    values: the flags that are tensors, then three numbers for each group without a reason. None if all groups have one.
    """

    reasons: list[Reason | None]
    flags: tuple[bool | Tensor, ...] = ()
    values: Tensor | None = None

    def split(self, numbers: Sequence[float]) -> tuple[list[bool], Iterator[float]]:
        """All flags, and the numbers of the groups, of what was read of `values`."""
        rest = iter(numbers)
        return [bool(next(rest)) if isinstance(flag, Tensor) else flag for flag in self.flags], rest


class EasyCacheRun:
    """What `apply_easycache` returns: the generation under way, the last report.

    on_step: called with every `StepDecision` when it is taken, before the model runs; may be set or cleared any time.
    """

    def __init__(
        self,
        rule: ReuseRule,
        *,
        pipe: Any = None,
        resets_after_call: bool = False,
        batched_guidance: Sequence[str] | None = None,
        schedule: Collection[int] | None = None,
        on_step: Callable[[StepDecision], None] | None = None,
    ) -> None:
        self.on_step = on_step
        self._rule = rule
        self._schedule = schedule
        self._resets_after_call = resets_after_call
        self._batched_guidance = batched_guidance
        self._pipe = (lambda: None) if pipe is None else weakref.ref(pipe)
        self._places = PlaceTracker(self._pipe)
        self._conditions = Conditions()
        self._rules: list[ReuseRule] = []  # one for each group, of the transformer in use
        self._rests: dict[tuple[str, int], list[Tensor | None]] = {}
        self._active: str | None = None
        self._adapters: Hashable = ()
        self._recording = Recording()
        self._report: EasyCacheReport | None = None
        self._warned_rising = False
        self._why_away: str | None = None

    @property
    def config(self) -> EasyCacheConfig:
        """The settings."""
        return self._rule.config

    @property
    def report(self) -> EasyCacheReport | None:
        """The last finished call; None before there is one."""
        self._finish_if_complete()
        return self._report

    def is_of(self, pipe: Any) -> bool:
        """Whether EasyCache was applied to this pipeline, and not to a bare transformer."""
        return self._pipe() is pipe

    def explain_missing_report(self) -> str | None:
        """Why there is no report of the last call; None if there is one.

        A call whose end cannot be known is not held on to: its tensors are released.
        """
        num_seen, num_steps = len(self._recording.steps), self._places.at.num_steps
        if num_seen and not self._resets_after_call and (num_steps is None or num_seen > num_steps):
            self._forget_history()
            return advice.why_no_report(num_seen, num_steps)
        if self.report is not None:
            return None
        return advice.why_no_report(num_seen, num_steps) if self._why_away is None else self._why_away

    def tensors(self) -> list[Tensor]:
        """The latent-sized tensors held at the moment."""
        rests = [rest for parts in self._rests.values() for rest in parts if rest is not None]
        return [tensor for rule in self._rules for tensor in rule.tensors()] + rests

    def reset(self) -> None:
        """Drop the generation under way and release its tensors; the last report stays."""
        self._places.forget()
        self._forget_history()
        self._recording, self._active = Recording(), None

    def stay_away(self, why: str) -> None:
        """A call ran without EasyCache, so that the report of an earlier one is not that of the last."""
        self._report, self._why_away = None, why

    def finish(self) -> None:
        """End the generation under way: its report becomes the last one, its tensors are released.

        Pipelines of diffusers do this at the end of a call. A loop of one's own may call it; without, a generation
        that is through its last step counts as finished as soon as the next one starts or a report is asked for.
        """
        if self._recording.steps:
            self._report = EasyCacheReport(decisions=self._recording.decisions(), config=self.config.to_dict())
            advice.about_no_reuse(self._report, self.config)
        self.reset()

    def enter(self, transformer: str, call: Call) -> GroupSplit:
        """Take in one call of a transformer: which of its outputs are reused."""
        batch, prepared, numbers = self._batch(call), None, None
        place = self._places.locate(call)
        if isinstance(place, Tensor):
            place, prepared, numbers = self._read_place(place, transformer, call, batch)
        if place.kind == "generation":
            self._start_generation(place, call)
        else:
            self._places.enter(place, call)
        if place.kind == "branch":
            return self._follow(call, batch, place.branch)
        decision = self._decide(transformer, call, batch, place, prepared=prepared, numbers=numbers)
        self._recording.steps.append(Step(decision=decision))
        if self.on_step is not None:
            self.on_step(decision)
        return _split(place.branch, batch, [not computed for computed in self._computed_groups(batch)])

    def predict(self, call: Call, split: GroupSplit) -> Pieces:
        """The outputs of the reused groups of a pass: new tensors, and the rests of their last evaluation."""
        pieces: Pieces = {}
        for group in split.reused:
            outputs = self._rules[group].predict(split.branch, _streams(call, split.batch, group))
            pieces[group] = [Piece(*each) for each in zip(outputs, self._rests[split.branch, group], strict=True)]
        if not split.computed:
            self._close_pass()
        return pieces

    def record(self, call: Call, split: GroupSplit, pieces: Pieces, span: tuple[Moment, Moment]) -> None:
        """Remember the computed groups of a pass."""
        if len(self._rules) == split.batch.num_groups:  # else other samples than the deciding pass: never predicted
            same_latents = self._places.values.has_same_latents(call)
            for group, parts in pieces.items():
                streams, outputs = _streams(call, split.batch, group), [piece.reused for piece in parts]
                self._rules[group].record(split.branch, streams, outputs, same_latents=same_latents)
                self._rests[split.branch, group] = [None if part.rest is None else part.rest.clone() for part in parts]
        self._conditions.keep(split.branch, call.given)
        if self._recording.steps[-1].num_passes == 1:
            self._places.values.keep_values(call)
        self._recording.steps[-1].spans.append(span)
        self._close_pass()

    @property
    def _leader(self) -> str | None:
        return self._rules[0].leader if self._rules else None

    def _forget_history(self) -> None:
        for rule in self._rules:
            rule.reset()
        self._rests = {}
        self._conditions.forget()

    def _close_pass(self) -> None:
        """A pass is done; after the last one of a call its tensors are not needed any more."""
        step = self._recording.steps[-1]
        step.rates = tuple(rule.transformation_rate for rule in self._rules if rule.transformation_rate is not None)
        step.num_done += 1
        if self._is_complete():
            self._forget_history()

    def _follow(self, call: Call, batch: Batch, branch: str) -> GroupSplit:
        """A further branch follows the decision of the step, for every group whose vector is recent enough.

        Where its conditions are other tensors, and were not until now, it is computed; where they always are, whether
        their values differ too is read with the next step.
        """
        self._recording.steps[-1].num_passes += 1
        were_anew = self._conditions.are_made_anew(branch)
        changed = self._conditions.has_changed(branch, call.given, call.settings)
        computed = self._computed_groups(batch)
        if len(self._rules) != batch.num_groups or changed is True or (changed is not False and not were_anew):
            return _split(branch, batch, [False] * batch.num_groups)
        able = [rule.can_follow(branch, _streams(call, batch, group)) for group, rule in enumerate(self._rules)]
        split = _split(branch, batch, [not one and can for one, can in zip(computed, able, strict=True)])
        if not split.computed:
            self._conditions.leave_unread(branch)
        return split

    def _computed_groups(self, batch: Batch) -> list[bool]:
        """Which groups of the batch the decision of the present step computes."""
        decision = self._recording.steps[-1].decision
        if len(decision.samples) == batch.num_groups:
            return list(decision.samples)
        return [decision.computed] * batch.num_groups

    def _batch(self, call: Call) -> Batch:
        """The rows of a call. Samples decide for themselves where it is known which rows and arguments are theirs."""
        pipe = self._pipe()
        is_known = pipe is not None or self._batched_guidance is not None or call.name not in (None, GUIDANCE_CONTEXT)
        per_sample = self.config.decisions == "sample" and call.splits_batch and is_known
        return batch_of(call.source.shape[0], self._branches(pipe, call.name), per_sample=per_sample)

    def _branches(self, pipe: Any, name: str | None) -> Sequence[str]:
        """The branches that the batch of a call is made of, in order; empty if there is one."""
        if name not in (None, GUIDANCE_CONTEXT) or not getattr(pipe, "do_classifier_free_guidance", True):
            return ()
        if self._batched_guidance is not None:
            return self._batched_guidance
        return () if pipe is None else batched_guidance_of(pipe, is_named=name is not None)

    def _read_place(
        self, questions: Tensor, transformer: str, call: Call, batch: Batch
    ) -> tuple[Place, _Prepared | None, list[float] | None]:
        """The place of a call that can only be read from the device; what a decision needs is read along with it."""
        step_index, branch = self._places.at.step_index + 1, call.name or "#0"
        prepared = self._prepare(transformer, call, batch, step_index=step_index, branch=branch)
        if prepared.values is None:
            return self._places.answer(call, questions.tolist()), None, None
        numbers = torch.cat([questions, prepared.values.to(questions.dtype)]).tolist()
        place = self._places.answer(call, numbers[: len(questions)])
        return (place, prepared, numbers[len(questions) :]) if place.kind == "step" else (place, None, None)

    def _prepare(self, transformer: str, call: Call, batch: Batch, *, step_index: int, branch: str) -> _Prepared:
        """What the decision of a step needs, not yet read."""
        changed = self._conditions.has_changed(branch, call.given, call.settings)
        streams = [_streams(call, batch, group) for group in range(batch.num_groups)]
        reasons: list[Reason | None] = ["no_history"] * batch.num_groups
        if transformer == self._active and len(self._rules) == batch.num_groups:
            num_steps = self._places.at.num_steps
            each = zip(self._rules, streams, strict=True)
            reasons = [rule.must_compute(parts, step_index=step_index, num_steps=num_steps) for rule, parts in each]
        if changed is True:
            reasons = [reason or "condition_changed" for reason in reasons]
        if None not in reasons:
            return _Prepared(reasons=reasons)
        mixed, others = self._conditions.take_unread(branch)
        flags = (changed, others, mixed)
        unread = [flag.to(call.latents.device).float().reshape(1) for flag in flags if isinstance(flag, Tensor)]
        asked = [self._rules[group].estimate(parts) for group, parts in enumerate(streams) if reasons[group] is None]
        values = asked[0] if len(asked) == 1 and not unread else torch.cat([*unread, *asked])
        return _Prepared(reasons=reasons, flags=flags, values=values)

    def _start_generation(self, place: Place, call: Call) -> None:
        if place.rises and len(self._recording.steps) == 1 and not self._warned_rising:
            self._warned_rising = True
            advice.about_rising_timesteps()
        goes_on = self._is_next_section(call)
        if not goes_on:
            self._finish_if_complete()
        recording = self._recording.next_loop() if goes_on else Recording()
        self.reset()
        self._recording = recording
        self._places.enter(place, call)
        at, scheduler = self._places.at, self._places.scheduler
        if at.num_steps is None:
            at.num_steps = self.config.num_inference_steps or scheduler.planned_steps(call)
        advice.about_a_call(
            self.config,
            num_steps=at.num_steps,
            schedule=self._schedule,
            scheduler=scheduler.scheduler if scheduler.is_live else None,
        )

    def _is_next_section(self, call: Call) -> bool:
        """Whether a new loop belongs to the same pipeline call as the last one, which is through (FramePack).

        Only of pipelines that have several loops, and end their calls themselves or encode every prompt anew.
        """
        pipe = self._pipe()
        ends = self._resets_after_call or (pipe is not None and not hasattr(pipe, "maybe_free_model_hooks"))
        seems = ends and self._places.is_through() and self._places.has_same_text(call)
        if not seems:
            return False
        several = has_several_loops(pipe)
        if several is None:
            advice.about_another_loop(pipe)
        return bool(several)

    def _decide(
        self,
        transformer: str,
        call: Call,
        batch: Batch,
        place: Place,
        *,
        prepared: _Prepared | None,
        numbers: list[float] | None,
    ) -> StepDecision:
        """The decision of a step's first call; another network, or another branch in front, begins without history."""
        adapters = call.find_adapters()
        change = self._change_of_model(transformer, adapters)
        is_other = len(self._rules) != batch.num_groups
        if change is not None or is_other or self._leader not in (None, place.branch):
            self._forget_history()
            prepared = numbers = None
        if is_other:
            self._rules = [self._rule.fresh() for _ in range(batch.num_groups)]
        for rule in self._rules:
            rule.num_branches, rule.deciding_branch = batch.num_branches, batch.deciding_branch
        self._active, self._adapters = transformer, adapters
        if prepared is None:
            prepared = self._prepare(transformer, call, batch, step_index=place.step_index, branch=place.branch)
        forced: Reason | None = change or ("scheduled" if place.step_index in (self._schedule or ()) else None)
        reasons = [forced] * batch.num_groups if forced is not None else prepared.reasons
        if None in reasons and prepared.values is not None and numbers is None:
            numbers = prepared.values.tolist()
        flags, rest = ([], iter(())) if numbers is None else prepared.split(numbers)
        if flags:
            reasons = _with_changes(reasons, flags)
        decisions = [
            rule.decide(
                _streams(call, batch, group),
                step_index=place.step_index,
                num_steps=self._places.at.num_steps,
                estimate=[next(rest) for _ in range(3)] if prepared.reasons[group] is None and numbers else None,
                forced=reasons[group],
            )
            for group, rule in enumerate(self._rules)
        ]
        decision = StepDecision.of_samples(decisions)
        computed = int(decision.computed)
        return replace(decision, transformer=transformer, section=self._recording.section, num_computed_passes=computed)

    def _change_of_model(self, transformer: str, adapters: Hashable) -> Reason | None:
        if self._active not in (None, transformer):
            return "transformer_switch"
        return "adapter_switch" if self._leader is not None and adapters != self._adapters else None

    def _is_complete(self) -> bool:
        """Whether every pass of the last step is done, as far as the number of steps is known."""
        return self._places.at.step_index + 1 == self._places.at.num_steps and self._recording.has_all_passes()

    def _finish_if_complete(self) -> None:
        """Take a loop that does not say when it ends as finished once it is complete.

        Pipelines of diffusers do say it, so that a call that fails after its last step, in decoding, is not finished.
        """
        if not self._resets_after_call and self._is_complete():
            self.finish()


def _streams(call: Call, batch: Batch, group: int) -> list[Tensor]:
    return [batch.take(stream, group) for stream in call.streams]


def _split(branch: str, batch: Batch, reused: Sequence[bool]) -> GroupSplit:
    groups = range(batch.num_groups)
    return GroupSplit(
        branch=branch,
        batch=batch,
        reused=tuple(group for group in groups if reused[group]),
        computed=tuple(group for group in groups if not reused[group]),
    )


def _with_changes(reasons: Sequence[Reason | None], flags: Sequence[bool]) -> list[Reason | None]:
    """The reasons of a step, with what was read of its conditions, see `_Prepared`."""
    now, others, mixed = flags
    change: Reason | None = "condition_changed" if now or others else ("no_history" if mixed else None)
    return [reason or change for reason in reasons]
