"""One use of EasyCache on a pipeline: the generation under way, and the report of the last finished one.

All transformers of a pipeline share one `EasyCacheRun`: their steps are the steps of one generation. It belongs to the
pipeline or transformer it was applied to; nothing is kept on a class or a module.
"""

from __future__ import annotations

import logging
import math
import weakref
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from vidaccel.catalog.table import batched_guidance_of, has_several_loops, pipeline_traits
from vidaccel.catalog.traits import GUIDANCE_CONTEXT
from vidaccel.easycache.batch import Batch, batch_of
from vidaccel.easycache.config import EasyCacheConfig
from vidaccel.easycache.ensemble import Ensemble
from vidaccel.easycache.layout import Pieces
from vidaccel.easycache.report import EasyCacheReport, Reason, StepDecision
from vidaccel.easycache.steps import Call, Place, PlaceTracker, is_view
from vidaccel.machine.timing import Moment, seconds_between

logger = logging.getLogger(__name__)

# A schedule given beforehand takes the place of the rule: what may be reused is reused.
_ALWAYS_REUSE: Mapping[str, Any] = MappingProxyType(
    {"threshold": math.inf, "warmup_steps": 0, "tail_steps": 0, "max_consecutive_reuses": None}
)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to do in one call: the groups of its batch that are reused, and those the model runs for."""

    branch: str
    batch: Batch
    reused: tuple[int, ...]
    computed: tuple[int, ...]


@dataclass(kw_only=True)
class _Step:
    """A step being recorded: its decision and what is only known later."""

    decision: StepDecision
    rate: Tensor | None = None
    num_passes: int = 1
    num_done: int = 0
    spans: list[tuple[Moment, Moment]]


class EasyCacheRun:
    """What `apply_easycache` returns: settings, the generation under way, the last report.

    on_step: called with every `StepDecision` when it is taken, before the model runs; may be set or cleared any time.
    """

    def __init__(
        self,
        config: EasyCacheConfig,
        *,
        pipe: Any = None,
        resets_after_call: bool = False,
        batched_guidance: Sequence[str] | None = None,
        schedule: Collection[int] | None = None,
        on_step: Callable[[StepDecision], None] | None = None,
    ) -> None:
        self.config = config if schedule is None else replace(config, **_ALWAYS_REUSE)
        self._schedule = schedule
        self.on_step = on_step
        self._resets_after_call = resets_after_call
        self._batched_guidance = batched_guidance
        self._pipe = (lambda: None) if pipe is None else weakref.ref(pipe)
        self._tracker = PlaceTracker(self._pipe)
        self._ensembles: dict[str, Ensemble] = {}
        self._active: str | None = None
        self._adapters: Hashable = ()
        self._steps: list[_Step] = []
        self._earlier: list[_Step] = []  # of the loops of this call that are through
        self._warned_few_steps = False
        self._warned_rising = False
        self._report: EasyCacheReport | None = None

    @property
    def report(self) -> EasyCacheReport | None:
        """The last finished call; None before there is one."""
        self._finish_if_complete()
        return self._report

    def ensemble(self, transformer: str) -> Ensemble:
        """The decisions and memory of one transformer of the pipeline."""
        if transformer not in self._ensembles:
            self._ensembles[transformer] = Ensemble(self.config)
        return self._ensembles[transformer]

    def tensors(self) -> list[Tensor]:
        """The latent-sized tensors held at the moment, of all transformers."""
        return [tensor for ensemble in self._ensembles.values() for tensor in ensemble.tensors()]

    def reset(self) -> None:
        """Drop the generation under way and release its tensors; the last report stays."""
        self._tracker.forget()
        for ensemble in self._ensembles.values():
            ensemble.reset()
        self._steps, self._earlier = [], []
        self._active = None

    def finish(self) -> None:
        """End the generation under way: its report becomes the last one, its tensors are released.

        Pipelines of diffusers do this at the end of a call. A loop of one's own may call it; without, a generation
        that is through its last step counts as finished as soon as the next one starts or a report is asked for.
        """
        if self._steps:
            self._report = EasyCacheReport(decisions=self._decisions(), config=self.config.to_dict())
            self._warn_if_nothing_was_reused(self._report)
        self.reset()

    def enter(self, transformer: str, call: Call) -> Plan:
        """Take in one call of a transformer: which of its outputs are reused."""
        ensemble, batch = self.ensemble(transformer), self._batch(call)
        place, estimate = self._locate(transformer, ensemble, call, batch)
        if place.kind == "generation":
            self._start_generation(place, call)
        else:
            self._tracker.enter(place, call)
        if place.kind == "branch":
            return self._follow(ensemble, call, batch, place.branch)
        decision = self._decide(transformer, call, batch, place, estimate)
        self._steps.append(_Step(decision=decision, spans=[]))
        if self.on_step is not None:
            self.on_step(decision)
        return _plan(place.branch, batch, [not computed for computed in self._computed_groups(batch)])

    def predict(self, transformer: str, call: Call, plan: Plan) -> Pieces:
        """The outputs of the reused groups of a pass."""
        ensemble = self._ensembles[transformer]
        pieces = ensemble.predict(plan.branch, plan.batch, call.streams, plan.reused)
        if not plan.computed:
            self._close_pass(ensemble)
        return pieces

    def record(self, transformer: str, call: Call, plan: Plan, pieces: Pieces, span: tuple[Moment, Moment]) -> None:
        """Remember the computed groups of a pass."""
        ensemble = self._ensembles[transformer]
        same_latents = self._tracker.has_same_latents(call)
        ensemble.record(plan.branch, plan.batch, call.streams, pieces, same_latents=same_latents)
        self._steps[-1].spans.append(span)
        self._close_pass(ensemble)

    def _close_pass(self, ensemble: Ensemble) -> None:
        step = self._steps[-1]
        step.rate = ensemble.transformation_rate
        step.num_done += 1

    def _follow(self, ensemble: Ensemble, call: Call, batch: Batch, branch: str) -> Plan:
        """A further branch follows the decision of the step, for every group whose vector is recent enough."""
        self._steps[-1].num_passes += 1
        computed = self._computed_groups(batch)
        able = ensemble.can_follow(branch, batch, call.streams)
        return _plan(branch, batch, [not one and can for one, can in zip(computed, able, strict=True)])

    def _computed_groups(self, batch: Batch) -> list[bool]:
        """Which groups of the batch the decision of the present step computes."""
        decision = self._steps[-1].decision
        if len(decision.samples) == batch.num_groups:
            return list(decision.samples)
        return [decision.computed] * batch.num_groups

    def _batch(self, call: Call) -> Batch:
        """The rows of a call. Samples decide for themselves where it is known which rows and arguments are theirs."""
        name = None if call.context is None else call.context.name
        pipe = self._pipe()
        is_known = pipe is not None or self._batched_guidance is not None or name not in (None, GUIDANCE_CONTEXT)
        per_sample = self.config.decisions == "sample" and call.splits_batch and is_known
        return batch_of(call.source.shape[0], self._branches(pipe, name), per_sample=per_sample)

    def _branches(self, pipe: Any, name: str | None) -> Sequence[str]:
        """The branches that the batch of a call is made of, in order; empty if there is one."""
        if name not in (None, GUIDANCE_CONTEXT) or not getattr(pipe, "do_classifier_free_guidance", True):
            return ()
        if self._batched_guidance is not None:
            return self._batched_guidance
        return () if pipe is None else batched_guidance_of(pipe, is_named=name is not None)

    def _locate(
        self, transformer: str, ensemble: Ensemble, call: Call, batch: Batch
    ) -> tuple[Place, list[float] | None]:
        """The place of the call; where it can only be read from the device, the estimate is read along with it."""
        found = self._tracker.locate(call, lambda: ensemble.previous_latents(batch))
        if isinstance(found, Place):
            return found, None
        next_index, num_steps = self._tracker.step_index + 1, self._tracker.num_steps
        reasons: list[Reason | None] = ["transformer_switch"]
        if transformer == self._active:
            reasons = ensemble.must_compute(batch, call.streams, step_index=next_index, num_steps=num_steps)
        if None not in reasons:
            return self._tracker.answer(call, found.tolist()), None
        estimate = ensemble.estimate(batch, call.streams, reasons)
        values = torch.cat([found, estimate.to(found.dtype)]).tolist()
        place = self._tracker.answer(call, values[: len(found)])
        return place, values[len(found) :] if place.kind == "step" else None

    def _start_generation(self, place: Place, call: Call) -> None:
        if place.rises and len(self._steps) == 1:
            self._warn_about_rising_timesteps()
        goes_on = self._is_next_section(call)
        if not goes_on:
            self._finish_if_complete()
        earlier = [*self._earlier, *self._steps] if goes_on else []
        self.reset()
        self._earlier = earlier
        self._tracker.enter(place, call)
        if self._tracker.num_steps is None:
            self._tracker.num_steps = self._planned_steps(call)
        self._warn_about_schedule()

    def _is_next_section(self, call: Call) -> bool:
        """Whether a new loop belongs to the same pipeline call as the last one, which is through (FramePack).

        Only of pipelines that have several loops, and end their calls themselves or encode every prompt anew.
        """
        pipe = self._pipe()
        ends = self._resets_after_call or (pipe is not None and not hasattr(pipe, "maybe_free_model_hooks"))
        return ends and has_several_loops(pipe) and self._tracker.is_through() and self._tracker.has_same_text(call)

    def _decide(
        self, transformer: str, call: Call, batch: Batch, place: Place, estimate: list[float] | None
    ) -> StepDecision:
        """The decision of a step's first call; another network, or another branch in front, begins without history."""
        ensemble, adapters = self._ensembles[transformer], call.find_adapters()
        change: Reason | None = None
        if self._active not in (None, transformer):
            self._ensembles[self._active or ""].reset()
            change = "transformer_switch"
        elif ensemble.leader is not None and adapters != self._adapters:
            change = "adapter_switch"
        if change is not None or ensemble.leader not in (None, place.branch):
            ensemble.reset()
        self._active, self._adapters = transformer, adapters
        decision = ensemble.decide(
            batch,
            call.streams,
            step_index=place.step_index,
            num_steps=self._tracker.num_steps,
            values=estimate,
            forced="scheduled" if place.step_index in (self._schedule or ()) else None,
        )
        if change is not None:
            decision = replace(decision, computed=True, reason=change)
        section = self._earlier[-1].decision.section + 1 if self._earlier else 0
        return replace(decision, transformer=transformer, section=section, num_computed_passes=int(decision.computed))

    def _planned_steps(self, call: Call) -> int | None:
        """Steps of this call: of the pipeline if its scheduler drives it, else of the settings, else unknown.

        A shortened schedule (`strength`) shows in where the first timestep lies in the scheduler's tensor of them.
        """
        scheduler = self._tracker.scheduler
        if not self._tracker.scheduler_is_live or self.config.num_inference_steps is not None:
            return self.config.num_inference_steps
        timesteps = scheduler.timesteps
        if self._tracker.pipe_is_live:
            return (
                getattr(self._pipe(), "_num_timesteps", len(timesteps)) - pipeline_traits(self._pipe()).left_out_steps
            )
        if is_view(call.timestep, timesteps):
            return len(timesteps) - (call.timestep.storage_offset() - timesteps.storage_offset())
        begin = getattr(scheduler, "begin_index", None)
        if begin is None:  # schedules of their own, such as a row of timesteps for every frame
            return getattr(self._pipe(), "_num_timesteps", len(timesteps))
        return len(timesteps) - begin

    def _finish_if_complete(self) -> None:
        """Take a loop that does not say when it ends as finished once every pass of its last step is done.

        Pipelines of diffusers do say it, so that a call that fails after its last step, in decoding, is not finished.
        """
        total = self._tracker.num_steps
        if self._resets_after_call or not self._steps or self._steps[-1].num_done == 0:
            return
        expected = self._steps[-2].num_passes if len(self._steps) > 1 else 1
        if self._tracker.step_index + 1 == total and self._steps[-1].num_done >= expected:
            self.finish()

    def _decisions(self) -> tuple[StepDecision, ...]:
        steps = [*self._earlier, *self._steps]
        rates = _read([step.rate for step in steps])
        return tuple(
            replace(
                step.decision,
                transformation_rate=rate,
                num_passes=step.num_passes,
                num_computed_passes=len(step.spans),
                seconds=sum(seconds_between(*span) for span in step.spans),
            )
            for step, rate in zip(steps, rates, strict=True)
        )

    def _warn_about_rising_timesteps(self) -> None:
        if self._warned_rising:
            return
        self._warned_rising = True
        logger.warning(
            "EasyCache took a timestep that rose after one step for the start of another generation. If your timesteps "
            "rise, nothing is reused: apply EasyCache to a pipeline, or give `step_index` to `cache_context`."
        )

    def _warn_about_schedule(self) -> None:
        config, total = self.config, self._tracker.num_steps
        kept = config.warmup_steps + config.tail_steps
        self._warned_few_steps = config.threshold > 0 and total is not None and total <= kept + 1
        if self._warned_few_steps:
            logger.warning(
                "EasyCache has next to nothing to reuse: of %d steps the first %d and the last %d are always computed. "
                "Use more steps or a smaller `warmup_steps`.",
                total,
                config.warmup_steps,
                config.tail_steps,
            )
        if total is not None and (late := sorted(step for step in self._schedule or () if step >= total)):
            logger.warning("EasyCache's `schedule` names the steps %s, but the call has %d, from 0.", late, total)
        if total is None and config.tail_steps:
            logger.warning(
                "EasyCache does not know the number of steps, so the last step may be reused. Apply it to the pipeline "
                "instead of the transformer, or set `num_inference_steps` in EasyCacheConfig."
            )
        if self._tracker.scheduler_is_live and (noise := _fresh_noise(self._tracker.scheduler)):
            logger.warning(
                "EasyCache will reuse little or nothing: %s adds fresh noise in every step, which hides how little the "
                "latents change. Use a deterministic scheduler.",
                noise,
            )

    def _warn_if_nothing_was_reused(self, report: EasyCacheReport) -> None:
        if report.num_reused or self.config.threshold == 0 or self._warned_few_steps:
            return
        known = [step.accumulated_error for step in report.decisions if step.accumulated_error is not None]
        errors = [error for error in known if math.isfinite(error)]
        reasons = ", ".join(dict.fromkeys(step.reason for step in report.decisions))
        least = f"; the smallest accumulated error was {min(errors):.4g}" if errors else ""
        logger.warning(
            "EasyCache reused none of %d steps at threshold %g (reasons: %s%s).",
            report.num_steps,
            self.config.threshold,
            reasons,
            least,
        )


def _plan(branch: str, batch: Batch, reused: Sequence[bool]) -> Plan:
    groups = range(batch.num_groups)
    return Plan(
        branch=branch,
        batch=batch,
        reused=tuple(group for group in groups if reused[group]),
        computed=tuple(group for group in groups if not reused[group]),
    )


def _fresh_noise(scheduler: Any) -> str | None:
    """The name of a scheduler that adds noise in every step, else None."""
    name, config = type(scheduler).__name__, getattr(scheduler, "config", {})
    noisy_name = any(word in name for word in ("Ancestral", "SDE", "LCM", "SASolver"))
    noisy_setting = bool(config.get("stochastic_sampling")) or str(config.get("algorithm_type", "")).startswith("sde")
    return name if noisy_name or noisy_setting else None


def _read(rates: list[Tensor | None]) -> list[float | None]:
    """The largest rate of every step, in one read for each device."""
    values: dict[int, float] = {}
    known = {index: rate.max() for index, rate in enumerate(rates) if rate is not None}
    for device in {rate.device for rate in known.values()}:
        here = {index: rate for index, rate in known.items() if rate.device == device}
        values |= dict(zip(here, torch.stack([rate.float() for rate in here.values()]).tolist(), strict=True))
    return [values.get(index) for index in range(len(rates))]
