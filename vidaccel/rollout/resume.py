"""A rollout and its session on disk: what a finished chunk leaves there, and how the rollout goes on from any chunk.

Latents, prompts and the seed are enough to go on exactly: where no exact state was kept, the latents are passed once
more through the student, which writes the same memory bit for bit (one pass a chunk instead of all). An exact state
only saves that time.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from vidaccel.errors import UserError
from vidaccel.rollout.branch_camera import move_values
from vidaccel.rollout.camera import ChunkCamera, PlacedPath
from vidaccel.rollout.chunk import Chunk, Shot, Student, shot_at
from vidaccel.rollout.loop import replay
from vidaccel.rollout.state import RolloutState
from vidaccel.rollout.timeline import Cut, PromptChange
from vidaccel.sessions.branch import Branch

_SMALL_STATE_BYTES = 64 * 2**20


def save_chunk(
    branch: Branch,
    chunk: Chunk,
    shot: Shot,
    state: RolloutState,
    *,
    segment: bytes | None = None,
    exact: bool = True,
    camera: PlacedPath | None = None,
) -> None:
    """Add the chunk that `state` is after to a branch.

    exact: also keep the state (keys, values and features of the decoder), so that going on takes no passes. It is the
    size of the memory; without it a chunk costs its latents. camera: of the rollout.
    """
    values: dict[str, Any] = {
        "prompt": chunk.prompt,
        "cut": shot.cut,
        "start_chunk": shot.start_chunk,
        "first_frame": chunk.first_frame,
        "num_frames": chunk.latents.shape[2],
        "num_pixel_frames": 0 if chunk.frames is None else chunk.frames.shape[1],
        "sink": list(chunk.sink),
        "slow": list(chunk.slow),
        "fast": list(chunk.fast),
        "is_keyframe": chunk.is_keyframe,
        "similarity": chunk.similarity,
        **({} if chunk.camera is None else {"camera": chunk.camera}),
        **move_values(camera, chunk.index),
    }
    branch.append(values, {"latents": chunk.latents}, segment, state.save_state() if exact else None, index=chunk.index)


def usual_snapshot_every(state: RolloutState) -> int:
    """Chunks between exact states: every chunk while they are small, else so that disks keep up."""
    reserved = sum(memory.bytes_by_part()["reserved"] for memory in state.memories)
    return 1 if reserved < _SMALL_STATE_BYTES else 20


def shots_of_branch(
    branch: Branch | None, num_chunks: int, planned: Sequence[Shot], encode: Callable[[str], tuple[Tensor, ...]]
) -> list[Shot]:
    """The shots of a rollout that goes on after `num_chunks` chunks of a branch: past ones, then those planned.

    planned: of the whole rollout. encode: the embeddings of a prompt.
    """
    if branch is None or not num_chunks:
        return list(planned)
    return shots_to_come(past_shots(branch, num_chunks, encode), planned, num_chunks)


def past_shots(branch: Branch, num_chunks: int, encode: Callable[[str], tuple[Tensor, ...]]) -> list[Shot]:
    """The shots that the first `num_chunks` chunks of a branch were made in. `encode`: the embeddings of a prompt."""
    shots: list[Shot] = []
    for values in branch.chunks(0, num_chunks):
        if not shots or shots[-1].start_chunk != values["start_chunk"]:
            cut: Cut = values["cut"]
            shots.append(
                Shot(
                    start_chunk=values["start_chunk"],
                    prompt=values["prompt"],
                    cut=cut,
                    embeddings=encode(values["prompt"]),
                )
            )
    return shots


def restore(
    student: Student,
    state: RolloutState,
    branch: Branch,
    shots: Sequence[Shot],
    *,
    num_chunks: int | None = None,
    camera: ChunkCamera | None = None,
    on_chunk: Callable[[int], None] | None = None,
) -> None:
    """Bring a new state to where the rollout was after `num_chunks` chunks of a branch (None: all of them).

    shots: those its chunks were made in (`past_shots`). camera: what they were made with (`camera_of_branch`).
    on_chunk: called with the number of each chunk that is passed again.
    Raises UserError for a session of another model, seed or size, and for damaged files.
    """
    wanted = branch.num_chunks if num_chunks is None else num_chunks
    if not 0 <= wanted <= branch.num_chunks:
        raise UserError(f"Branch {branch.name!r} has {branch.num_chunks} finished chunks; cannot go on after {wanted}.")
    state.archive.read_from(branch)
    snapshot = branch.snapshot_at_or_before(wanted)
    if snapshot is not None:
        state.load_state(*snapshot[1:])

    def left() -> Iterator[Tensor]:
        for index in range(state.num_chunks, wanted):
            if on_chunk is not None:
                on_chunk(index)
            yield branch.latents(index)["latents"]

    if state.num_chunks < wanted:
        replay(student, state, shots, left(), camera=camera)


def check_prompts(branch: Branch, planned: Sequence[PromptChange], num_chunks: int) -> None:
    """Raise UserError where one of the first `num_chunks` chunks of a branch was made in another shot than is planned.

    What the branch took from another may have been made in any shot. From there on prompts must agree, and for what
    is planned to begin there also the chunk that it begins with, and the cut.
    """
    own = 0 if branch.parent is None else branch.parent.num_chunks
    for index, values in enumerate(branch.chunks(min(own, num_chunks), num_chunks), own):
        change = [change for change in planned if change.chunk <= index][-1]
        made = _Beginning(values["prompt"], values["start_chunk"], values["cut"])
        wanted = _Beginning(change.span.prompt, change.chunk, change.span.cut)
        if made.prompt != wanted.prompt or (change.chunk >= own and made.place != wanted.place):
            raise UserError(
                f"Chunk {index} of branch {branch.name!r} was made with {made}, and asked for is {wanted}. Give the "
                f"prompts that its {num_chunks} chunks were made with and change what comes after them, or go on in a "
                f"branch: --branch NAME --branch-from {num_chunks}."
            )


class _Beginning(NamedTuple):
    """How a shot begins."""

    prompt: str
    chunk: int
    cut: Cut

    @property
    def place(self) -> tuple[int, Cut | None]:
        """The first shot of a video has no cut."""
        return self.chunk, self.cut if self.chunk else None

    def __str__(self) -> str:
        return f"{self.prompt!r}{f' from a {self.cut} cut at chunk {self.chunk} on' if self.chunk else ''}"


def shots_to_come(past: Sequence[Shot], planned: Sequence[Shot], num_chunks: int) -> list[Shot]:
    """The shots of a rollout that goes on after `num_chunks` chunks: what was, and from there on what is planned.

    A plan that goes on with the prompt of the last chunk starts no new shot.
    """
    if not num_chunks:
        return list(planned)
    shots = [shot for shot in past if shot.start_chunk < num_chunks]
    now = shot_at(planned, num_chunks)
    if now.start_chunk == num_chunks or now.prompt != shots[-1].prompt:
        shots.append(Shot(start_chunk=num_chunks, prompt=now.prompt, cut=now.cut, embeddings=now.embeddings))
    return [*shots, *[shot for shot in planned if shot.start_chunk > num_chunks]]
