"""Published settings: the right row for every model, and a word where there is none."""

from __future__ import annotations

import logging

import pytest

from tests.support.tiny_models import TINY_PIPELINES, tiny_wan_i2v, tiny_wan_t2v, tiny_wan_two_experts, tiny_wan_vace
from vidaccel import EasyCacheConfig, apply_easycache, easycache_report
from vidaccel.catalog.presets import PRESETS, Preset

EXPECTED = {
    "t2v": ("Wan2.1", 0.05, 10),
    "i2v": ("Wan2.1", 0.05, 10),
    "two_experts": ("Wan2.2 A14B text to video", 0.06, 7),
    "5b": ("Wan2.2 5B", 0.05, 7),
    "v2v": None,
    "vace": None,
}


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    """Not what is only information, which a test of the command line may have switched on."""
    return [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_every_model_gets_its_own_row(name: str) -> None:
    preset = Preset.for_pipeline(TINY_PIPELINES[name]())
    found = None if preset is None else (preset.name, preset.threshold, preset.warmup_steps)
    assert found == EXPECTED[name]


def test_every_row_has_a_source_and_takes_effect() -> None:
    for preset in PRESETS:
        assert preset.source
        assert EasyCacheConfig.published(preset) == EasyCacheConfig(
            threshold=preset.threshold, warmup_steps=preset.warmup_steps
        )


def test_without_settings_the_published_ones_are_used() -> None:
    run = apply_easycache(tiny_wan_two_experts())
    assert (run.config.threshold, run.config.warmup_steps) == (0.06, 7)


def test_a_class_derived_from_a_pipeline_has_its_settings() -> None:
    class Own(type(tiny_wan_t2v())):  # type: ignore[misc]
        pass

    assert Preset.for_pipeline(Own(**tiny_wan_t2v().components)).name == "Wan2.1"  # type: ignore[union-attr]


def test_a_model_without_published_settings_is_told_so(caplog: pytest.LogCaptureFixture) -> None:
    for known in (tiny_wan_t2v(), tiny_wan_i2v()):
        apply_easycache(known)
    assert not warnings_of(caplog)
    run = apply_easycache(tiny_wan_vace())
    assert run.config == EasyCacheConfig()
    (record,) = warnings_of(caplog)
    assert "no published settings for WanVACEPipeline" in record.message


def test_own_settings_are_not_commented_on(caplog: pytest.LogCaptureFixture) -> None:
    pipe = tiny_wan_vace()
    apply_easycache(pipe, EasyCacheConfig(threshold=0.3))
    assert not warnings_of(caplog)
    with pytest.raises(ValueError, match="no report yet"):
        easycache_report(pipe)
