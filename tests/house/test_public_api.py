"""What `import vidaccel` gives, and what it costs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import vidaccel

PUBLIC_NAMES = [
    *("CameraMove", "CameraPath"),
    *("ContextForcingWanPipeline", "EasyCacheConfig", "EasyCacheReport", "Generation", "GenerationRequest"),
    *("MemoryConfig", "PromptSpan", "PromptTimeline", "UserError", "apply_easycache", "compare_videos"),
    *("easycache_report", "generate", "load_pipeline", "read_video", "remove_easycache", "write_video"),
]
LARGE = ("torch", "numpy", "diffusers", "transformers", "matplotlib", "gradio", "typer", "cv2", "xformers")


def test_the_package_exports_these_names_sorted_and_nothing_else() -> None:
    assert vidaccel.__all__ == PUBLIC_NAMES == sorted(PUBLIC_NAMES)
    assert set(PUBLIC_NAMES) <= set(dir(vidaccel))


@pytest.mark.parametrize("name", PUBLIC_NAMES)
def test_a_public_name_is_what_its_module_defines(name: str) -> None:
    found = getattr(vidaccel, name)
    assert found.__name__ == name
    assert found.__module__.startswith("vidaccel.")
    assert getattr(sys.modules[found.__module__], name) is found


def test_the_package_is_marked_as_typed() -> None:
    assert (Path(vidaccel.__file__).parent / "py.typed").is_file()


@pytest.mark.slow
def test_the_import_loads_no_large_package_and_prints_nothing() -> None:
    code = f"import sys, vidaccel; print(sorted(set({LARGE}) & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [["--help"], ["no-such-command"]])
def test_the_list_of_commands_does_not_wait_for_large_libraries(arguments: list[str]) -> None:
    code = (
        f"import sys; from vidaccel.cli import run; run({arguments}); "
        "print(sorted({'torch', 'diffusers', 'transformers', 'matplotlib'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip().splitlines()[-1] == "[]"


def test_a_name_the_package_lacks_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        vidaccel.no_such_name  # noqa: B018


@pytest.mark.slow
def test_python_minus_m_is_the_command() -> None:
    result = subprocess.run([sys.executable, "-m", "vidaccel", "--help"], capture_output=True, text=True, check=True)
    assert "generate" in result.stdout
