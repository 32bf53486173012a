"""A page to try vidaccel: EasyCache beside its twin without reuse, and rollouts that are changed while they are made.

    pip install "vidaccel[demo]"
    python demos/app.py            # then open the address it prints; only this machine can reach it

The embedded models run on a CPU; `--model`, `--student`, `--host` and `--port` change models and address.
"""

import argparse
import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

from easycache_tab import add_easycache_tab
from live_rollout import Studio
from rollout_tab import add_rollout_tab
from vidaccel.pipelines.context_forcing_wan import ContextForcingWanPipeline

from vidaccel.catalog.models import EMBEDDED_MODEL, EMBEDDED_STUDENT
from vidaccel.catalog.registry import spec_of
from vidaccel.catalog.spec import GenerationDefaults
from vidaccel.errors import UserError
from vidaccel.generation.loading import load_pipeline

_LOOK_EVERY, _OLD = 600, 7200  # seconds: files that gradio sends are removed when they are old


def build_app(pipe: Any, defaults: GenerationDefaults, studio: Studio) -> Any:
    """The page as a `gradio.Blocks`: `pipe` makes the videos of EasyCache, the studio the rollouts.

    Raises `UserError` where gradio is not installed.
    """
    try:
        import gradio
    except ImportError as error:
        raise UserError('The demo needs gradio: pip install -c constraints.txt ".[demo]"') from error
    with gradio.Blocks(title="vidaccel", analytics_enabled=False, delete_cache=(_LOOK_EVERY, _OLD)) as app:
        gradio.Markdown("# vidaccel")
        with gradio.Tab("EasyCache"):
            gradio.Markdown("One prompt, with every step computed and with EasyCache.")
            add_easycache_tab(pipe, defaults, studio.folder)
        with gradio.Tab("Rollout"):
            gradio.Markdown("Video of any length, chunk after chunk, from a student with a bounded memory.")
            add_rollout_tab(studio)
    return app.queue(default_concurrency_limit=1)


def open_studio(model: str, folder: Path) -> Studio:
    """Load the student of the rollouts. Raises UserError for a model of another kind."""
    pipe = load_pipeline(model)
    if not isinstance(pipe, ContextForcingWanPipeline):
        raise UserError(
            f"A rollout needs a causal student and {model!r} is a {type(pipe).__name__}; make one with "
            "`vidaccel convert causal-wan`, or leave out --student."
        )
    return Studio(pipe, spec_of(model).defaults, folder)


def main() -> None:
    """Load the models and serve the page; its files are in a private folder that goes with it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default=EMBEDDED_MODEL, help="model of the EasyCache tab")
    parser.add_argument("--student", default=EMBEDDED_STUDENT, help="causal student of the rollout tab")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; the default is this machine only")
    parser.add_argument("--port", type=int, default=7860)
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # as Ctrl-C: the folder is removed
    with tempfile.TemporaryDirectory(prefix="vidaccel-") as name:
        folder = Path(name, "work")
        folder.mkdir()
        os.environ["GRADIO_TEMP_DIR"] = str(Path(name, "sent"))
        try:
            studio = open_studio(arguments.student, folder)
            app = build_app(load_pipeline(arguments.model), spec_of(arguments.model).defaults, studio)
            app.launch(server_name=arguments.host, server_port=arguments.port)
        except (UserError, OSError) as error:
            raise SystemExit(f"demo: {error}") from error


if __name__ == "__main__":
    main()
