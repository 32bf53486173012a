"""In a checkout the pipelines live in the top-level folder of the same name."""

from pathlib import Path

__path__ = [str(Path(__file__).parents[2] / "pipelines")]
