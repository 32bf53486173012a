"""The tab of a rollout: minutes of video seen while they are made, and changed on the way.

A visitor's rollout is a `LiveRollout` in the state of the browser's session; it is given up an hour after the page was
closed. Chunks are shown as animated pictures inside the page, so that playing them takes neither files nor an ffmpeg.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from easycache_tab import EXAMPLES
from live_rollout import MOST_SECONDS, LiveRollout, Studio, View

from vidaccel.errors import UserError

CAMERA_EXAMPLE = "2-2.75 right 1, 6-6.75 left 1"
VISITORS = 4  # rollouts at a time; further ones wait
Row = tuple[LiveRollout, str, str, str, str | None, str | None]


def add_rollout_tab(studio: Studio) -> None:
    """Put the tab into the `gradio.Blocks` that is being built."""
    import gradio

    live = gradio.State(None, delete_callback=_leave)
    memories = list(studio.memories())
    with gradio.Row():
        prompt = gradio.Textbox(EXAMPLES[0], label="Prompt (Enter: from the next chunk on)", scale=3)
        memory = gradio.Dropdown(memories, value=memories[0], label="Memory (latent frames)")
    with gradio.Row():
        seconds = gradio.Slider(1, MOST_SECONDS, 30, step=1, label="Length (s)")
        seed = gradio.Number(0, label="Seed", precision=0, minimum=0)
        second = gradio.Number(0, label="Branch from second", minimum=0)
    camera = []  # a field where the student is told of it
    if studio.takes_camera:
        camera.append(gradio.Textbox("", label="Camera (seconds, where to, screens)", placeholder=CAMERA_EXAMPLE))
    with gradio.Row():
        start = gradio.Button("Start", variant="primary")
        change = gradio.Button("Change the prompt")
        stop = gradio.Button("Stop", variant="stop")
        branch = gradio.Button("Branch")
    line, note = gradio.Markdown(), gradio.Markdown()
    with gradio.Row():
        screen = gradio.HTML(min_height=256)
        video = gradio.Video(label="The video", autoplay=True, loop=True)
    picture = gradio.Image(label="What was remembered when")
    gradio.Examples([[example] for example in EXAMPLES], inputs=[prompt])

    def on_start(
        live: LiveRollout | None, prompt: str, seconds: float, seed: float, memory: str, camera: str = ""
    ) -> Iterator[Row]:
        rollout = live or LiveRollout(studio)
        with _told():
            for view in rollout.start(prompt, seconds=seconds, seed=seed, memory=memory, camera=camera):
                yield _row(rollout, view)

    def on_branch(
        live: LiveRollout | None, prompt: str, second: float, seconds: float, camera: str = ""
    ) -> Iterator[Row]:
        rollout = live or LiveRollout(studio)
        with _told():
            for view in rollout.branch_from(prompt, second=second, seconds=seconds, camera=camera):
                yield _row(rollout, view)

    making: dict[str, Any] = {
        "outputs": [live, screen, line, note, video, picture],
        "show_progress": "hidden",
        "concurrency_id": "rollout",
        "concurrency_limit": VISITORS,
    }
    asking: dict[str, Any] = {"outputs": [note], "show_progress": "hidden", "concurrency_limit": None}
    start.click(on_start, [live, prompt, seconds, seed, memory, *camera], api_name="rollout", **making)
    branch.click(on_branch, [live, prompt, second, seconds, *camera], api_name="branch", **making)
    gradio.on([change.click, prompt.submit], _on_prompt, [live, prompt], api_name="change_prompt", **asking)
    stop.click(_on_stop, [live], api_name="stop", **asking)


def _on_prompt(live: LiveRollout | None, prompt: str) -> str:
    with _told():
        return _running(live).change_prompt(prompt)


def _on_stop(live: LiveRollout | None) -> str:
    with _told():
        return _running(live).stop()


def _running(live: LiveRollout | None) -> LiveRollout:
    if live is None:
        raise UserError("No rollout is running; start one.")
    return live


def _leave(live: LiveRollout | None) -> None:
    if live is not None:
        live.leave()


@contextmanager
def _told() -> Iterator[None]:
    """Tell the visitor what is wrong, in the page."""
    import gradio

    try:
        yield
    except ValueError as error:
        raise gradio.Error(str(error), print_exception=False) from error


def _row(live: LiveRollout, view: View) -> Row:
    video, picture = (None if path is None else str(path) for path in (view.video, view.picture))
    return live, _screen(view.moving), view.line, "", video, picture  # what was noted has come to pass


def _screen(moving: bytes) -> str:
    """HTML of an animated picture, which it holds itself."""
    if not moving:
        return ""
    source = f"data:image/webp;base64,{base64.b64encode(moving).decode('ascii')}"
    return f'<img src="{source}" alt="The chunk made last" style="width: 100%; max-width: 512px">'
