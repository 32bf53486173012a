"""The videos of a benchmark: every prompt with every seed, and what is written down about each one that was made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vidaccel.catalog.spec import GenerationDefaults
from vidaccel.generation.generate import Generation
from vidaccel.generation.request import GenerationRequest, request_for


def bench_requests(
    defaults: GenerationDefaults, prompts: Sequence[str], *, seeds: Sequence[int], **settings: Any
) -> list[GenerationRequest]:
    """Prompt number i with seed s gets noise seed 1000 s + i; a setting that is None is the model's own."""
    return [
        request_for(defaults, prompt, seed=1000 * seed + index, **settings)
        for index, prompt in enumerate(prompts)
        for seed in seeds
    ]


def decision_letters(made: Generation) -> str:
    """One letter a step: C computed, . reused; empty without EasyCache."""
    if made.report is None:
        return ""
    return "".join("C" if decision.computed else "." for decision in made.report.decisions)
