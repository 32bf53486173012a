"""A rollout and its session on disk: what a finished chunk leaves there, and how the rollout goes on from any chunk.

Latents, prompts and the seed are enough to go on exactly: where no exact state was kept, the latents are passed once
more through the student, which writes the same memory bit for bit (one pass a chunk instead of all). An exact state
only saves that time.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor

from vidaccel.errors import UserError
from vidaccel.rollout.branch import Branch
from vidaccel.rollout.chunk import Chunk, Scene, Student
from vidaccel.rollout.loop import replay, scene_at
from vidaccel.rollout.state import RolloutState
from vidaccel.rollout.timeline import Cut


def save_chunk(
    branch: Branch,
    chunk: Chunk,
    scene: Scene,
    state: RolloutState,
    *,
    segment: bytes | None = None,
    exact: bool = True,
) -> None:
    """Add the chunk that `state` is after to a branch.

    exact: also keep the state (keys, values and features of the decoder), so that going on takes no passes. It is the
    size of the memory; without it a chunk costs its latents.
    """
    values: dict[str, Any] = {
        "prompt": chunk.prompt,
        "cut": scene.cut,
        "start_chunk": scene.start_chunk,
        "first_frame": chunk.first_frame,
        "num_frames": chunk.latents.shape[2],
        "num_pixel_frames": 0 if chunk.frames is None else chunk.frames.shape[1],
        "sink": list(chunk.sink),
        "slow": list(chunk.slow),
        "fast": list(chunk.fast),
        "is_keyframe": chunk.is_keyframe,
        "similarity": chunk.similarity,
    }
    branch.append(values, {"latents": chunk.latents}, segment, state.save_state() if exact else None)


def past_scenes(branch: Branch, num_chunks: int, encode: Callable[[str], tuple[Tensor, ...]]) -> list[Scene]:
    """The scenes that the first `num_chunks` chunks of a branch were made in. `encode`: the embeddings of a prompt."""
    scenes: list[Scene] = []
    for values in branch.chunks(0, num_chunks):
        if not scenes or scenes[-1].start_chunk != values["start_chunk"]:
            cut: Cut = values["cut"]
            scenes.append(
                Scene(
                    start_chunk=values["start_chunk"],
                    prompt=values["prompt"],
                    cut=cut,
                    embeddings=encode(values["prompt"]),
                )
            )
    return scenes


def restore(
    student: Student,
    state: RolloutState,
    branch: Branch,
    scenes: Sequence[Scene],
    *,
    num_chunks: int | None = None,
    on_chunk: Callable[[int], None] | None = None,
) -> None:
    """Bring a new state to where the rollout was after `num_chunks` chunks of a branch (None: all of them).

    scenes: those its chunks were made in (`past_scenes`). on_chunk: called with the number of each chunk that is
    passed again.
    Raises UserError for a session of another model, seed or size, and for damaged files.
    """
    wanted = branch.num_chunks if num_chunks is None else num_chunks
    if not 0 <= wanted <= branch.num_chunks:
        raise UserError(f"Branch {branch.name!r} has {branch.num_chunks} finished chunks; cannot go on after {wanted}.")
    snapshot = branch.snapshot_at_or_before(wanted)
    if snapshot is not None:
        state.load_state(*snapshot[1:])

    def left() -> Iterator[Tensor]:
        for index in range(state.num_chunks, wanted):
            if on_chunk is not None:
                on_chunk(index)
            yield branch.latents(index)["latents"]

    replay(student, state, scenes, left())


def scenes_to_come(past: Sequence[Scene], planned: Sequence[Scene], num_chunks: int) -> list[Scene]:
    """The scenes of a rollout that goes on after `num_chunks` chunks: what was, and from there on what is planned.

    A plan that goes on with the prompt of the last chunk starts no new scene.
    """
    if not num_chunks:
        return list(planned)
    scenes = [scene for scene in past if scene.start_chunk < num_chunks]
    now = scene_at(planned, num_chunks)
    if now.start_chunk == num_chunks or now.prompt != scenes[-1].prompt:
        scenes.append(Scene(start_chunk=num_chunks, prompt=now.prompt, cut=now.cut, embeddings=now.embeddings))
    return [*scenes, *[scene for scene in planned if scene.start_chunk > num_chunks]]
