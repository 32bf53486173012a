"""One use of EasyCache on a pipeline: the generation under way, and the report of the last finished one.

All transformers of a pipeline share one `EasyCacheRun`: their steps are the steps of one generation. It belongs to the
pipeline or transformer it was applied to; nothing is kept on a class or a module.
"""

from __future__ import annotations

import logging
import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from vidaccel.easycache import EasyCacheConfig, EasyCacheController
from vidaccel.hooks.place import Call, Place, PlaceTracker, is_view
from vidaccel.hooks.timing import Moment, seconds_between
from vidaccel.report import EasyCacheReport, StepDecision

logger = logging.getLogger(__name__)

Guidance = Literal["cond_first", "uncond_first"]


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
        batched_guidance: Guidance | None = None,
        on_step: Callable[[StepDecision], None] | None = None,
    ) -> None:
        self.config = config
        self.on_step = on_step
        self._batched_guidance = batched_guidance
        self._pipe = (lambda: None) if pipe is None else weakref.ref(pipe)
        self._tracker = PlaceTracker(self._pipe)
        self._controllers: dict[str, EasyCacheController] = {}
        self._active: str | None = None
        self._steps: list[_Step] = []
        self._warned_few_steps = False
        self._warned_rising = False
        self._report: EasyCacheReport | None = None

    @property
    def report(self) -> EasyCacheReport | None:
        """The last finished call; None before there is one."""
        self._finish_if_complete()
        return self._report

    def controller(self, transformer: str) -> EasyCacheController:
        """The decisions and memory of one transformer of the pipeline."""
        if transformer not in self._controllers:
            self._controllers[transformer] = EasyCacheController(self.config)
        return self._controllers[transformer]

    def tensors(self) -> list[Tensor]:
        """The latent-sized tensors held at the moment, of all transformers."""
        return [tensor for controller in self._controllers.values() for tensor in controller.tensors()]

    def reset(self) -> None:
        """Drop the generation under way and release its tensors; the last report stays."""
        self._tracker.forget()
        for controller in self._controllers.values():
            controller.reset()
        self._steps = []
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

    def enter(self, transformer: str, call: Call) -> tuple[bool, str]:
        """Take in one call of a transformer: whether its output is reused, and the name of its branch."""
        controller = self.controller(transformer)
        place, estimate = self._locate(transformer, controller, call)
        if place.kind == "generation":
            self._finish_if_complete()
            self._start_generation(place, call)
        else:
            self._tracker.enter(place, call)
        if place.kind == "branch":
            step = self._steps[-1]
            step.num_passes += 1
            return not step.decision.computed and controller.can_follow(place.branch, call.latents), place.branch
        decision = self._decide(transformer, controller, call, place, estimate)
        self._steps.append(_Step(decision=decision, spans=[]))
        if self.on_step is not None:
            self.on_step(decision)
        return not decision.computed, place.branch

    def predict(self, transformer: str, branch: str, latents: Tensor) -> Tensor:
        """The output of a reused pass."""
        output = self._controllers[transformer].predict(branch, latents)
        self._steps[-1].rate = self._controllers[transformer].transformation_rate
        self._steps[-1].num_done += 1
        return output

    def record(self, transformer: str, branch: str, call: Call, output: Tensor, span: tuple[Moment, Moment]) -> None:
        """Remember a computed pass."""
        controller = self._controllers[transformer]
        controller.record(branch, call.latents, output, same_latents=self._tracker.has_same_latents(call))
        step = self._steps[-1]
        step.rate = controller.transformation_rate
        step.num_done += 1
        step.spans.append(span)

    def _locate(
        self, transformer: str, controller: EasyCacheController, call: Call
    ) -> tuple[Place, list[float] | None]:
        """The place of the call; where it can only be read from the device, the estimate is read along with it."""
        found = self._tracker.locate(call, controller.previous_latents)
        if isinstance(found, Place):
            return found, None
        next_index, num_steps = self._tracker.step_index + 1, self._tracker.num_steps
        if transformer != self._active or controller.must_compute(
            call.latents, step_index=next_index, num_steps=num_steps
        ):
            return self._tracker.answer(call, found.tolist()), None
        values = torch.cat([found, controller.estimate(call.latents).to(found.dtype)]).tolist()
        place = self._tracker.answer(call, values[: len(found)])
        return place, values[len(found) :] if place.kind == "step" else None

    def _start_generation(self, place: Place, call: Call) -> None:
        if place.rises and len(self._steps) == 1:
            self._warn_about_rising_timesteps()
        self.reset()
        self._tracker.enter(place, call)
        if self._tracker.num_steps is None:
            self._tracker.num_steps = self._planned_steps(call)
        self._warn_about_schedule()

    def _decide(
        self,
        transformer: str,
        controller: EasyCacheController,
        call: Call,
        place: Place,
        estimate: list[float] | None,
    ) -> StepDecision:
        """The decision of a step's first call; another expert, or another branch in front, begins without history."""
        switched = self._active is not None and self._active != transformer
        if switched:
            self._controllers[self._active or ""].reset()
            controller.reset()
        if controller.leader not in (None, place.branch):
            controller.reset()
        self._active = transformer
        controller.conditional_half = self._conditional_half()
        decision = controller.decide(
            call.latents, step_index=place.step_index, num_steps=self._tracker.num_steps, estimate=estimate
        )
        if switched:
            decision = replace(decision, computed=True, reason="transformer_switch")
        return replace(decision, transformer=transformer, num_computed_passes=int(decision.computed))

    def _conditional_half(self) -> Literal["first", "second"] | None:
        pipe = self._pipe()
        if self._batched_guidance is None or not getattr(pipe, "do_classifier_free_guidance", True):
            return None
        return "first" if self._batched_guidance == "cond_first" else "second"

    def _planned_steps(self, call: Call) -> int | None:
        """Steps of this call: of the pipeline if its scheduler drives it, else of the settings, else unknown.

        A shortened schedule (`strength`) shows in where the first timestep lies in the scheduler's tensor of them.
        """
        scheduler = self._tracker.scheduler
        if not self._tracker.scheduler_is_live or self.config.num_inference_steps is not None:
            return self.config.num_inference_steps
        timesteps = scheduler.timesteps
        if self._tracker.pipe_is_live:
            return getattr(self._pipe(), "_num_timesteps", len(timesteps))
        if is_view(call.timestep, timesteps):
            return len(timesteps) - (call.timestep.storage_offset() - timesteps.storage_offset())
        return len(timesteps) - (getattr(scheduler, "begin_index", None) or 0)

    def _finish_if_complete(self) -> None:
        """Take a loop that does not say when it ends as finished once every pass of its last step is done.

        Pipelines of diffusers do say it, so that a call that fails after its last step, in decoding, is not finished.
        """
        total = self._tracker.num_steps
        if hasattr(self._pipe(), "maybe_free_model_hooks") or not self._steps or self._steps[-1].num_done == 0:
            return
        expected = self._steps[-2].num_passes if len(self._steps) > 1 else 1
        if self._tracker.step_index + 1 == total and self._steps[-1].num_done >= expected:
            self.finish()

    def _decisions(self) -> tuple[StepDecision, ...]:
        rates = _read([step.rate for step in self._steps])
        return tuple(
            replace(
                step.decision,
                transformation_rate=rate,
                num_passes=step.num_passes,
                num_computed_passes=len(step.spans),
                seconds=sum(seconds_between(*span) for span in step.spans),
            )
            for step, rate in zip(self._steps, rates, strict=True)
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
