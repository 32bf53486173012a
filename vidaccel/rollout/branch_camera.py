"""The camera of a rollout that goes on in a branch of a session: moves that were begun, then those that are planned.

As with prompts: what the branch took from another may have been made with any camera, its own chunks must have been
made with the one that is asked for. A chunk has the move that begins with it written down, so that a move that was
begun comes to its end.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from vidaccel.errors import UserError
from vidaccel.rollout.camera import CameraMove, PlacedMove, PlacedPath
from vidaccel.sessions.branch import Branch


def move_values(path: PlacedPath | None, chunk: int) -> dict[str, Any]:
    """What a session notes of the camera for a chunk: the move that begins with it, if one does."""
    placed = None if path is None else path.begun_with(chunk)
    return {} if placed is None else {"camera_move": {**vars(placed.move), "end": placed.end}}


def camera_of_branch(branch: Branch | None, num_chunks: int, planned: PlacedPath | None) -> PlacedPath | None:
    """The camera of a rollout that goes on after `num_chunks` chunks of a branch: moves begun there, then planned ones.

    planned: of the whole rollout; None: the student is not told of a camera.
    """
    if branch is None or planned is None:
        return planned
    values = list(branch.chunks(0, num_chunks))
    begun = [move for chunk, one in enumerate(values) if (move := _move_of(one, chunk)) is not None]
    free = begun[-1].end if begun else 0
    moves: list[PlacedMove] = begun
    for placed in planned.moves:
        if placed.chunk >= num_chunks:
            moves = [*moves, placed.after(free)]
            free = moves[-1].end
    cuts = [chunk for chunk, one in enumerate(values) if chunk and one["cut"] == "hard" and one["start_chunk"] == chunk]
    cuts += [cut for cut in planned.grid.cuts if cut >= num_chunks]
    return PlacedPath(replace(planned.grid, cuts=tuple(cuts)), tuple(moves))


def check_camera(branch: Branch, planned: PlacedPath | None, num_chunks: int) -> None:
    """Raise UserError where a move of the first `num_chunks` chunks of a branch is another one than is planned."""
    own = 0 if branch.parent is None else min(branch.parent.num_chunks, num_chunks)
    path = camera_of_branch(branch, own, planned)
    for chunk, values in enumerate(branch.chunks(own, num_chunks), own):
        made, wanted = _move_of(values, chunk), None if path is None else path.begun_with(chunk)
        if _words(made) != _words(wanted):
            raise UserError(
                f"Chunk {chunk} of branch {branch.name!r} was made with {_words(made)}, and asked for is "
                f"{_words(wanted)}. Give the moves (--camera, or camera lines of the timeline) that its {num_chunks} "
                "chunks were made with and change what comes after them, or go on in a branch: --branch NAME "
                f"--branch-from {num_chunks}."
            )


def _move_of(values: Mapping[str, Any], chunk: int) -> PlacedMove | None:
    """The move that begins with a chunk of a branch."""
    noted = values.get("camera_move")
    if noted is None:
        return None
    return PlacedMove(CameraMove(noted["start_seconds"], noted["end_seconds"], noted["screens"]), chunk, noted["end"])


def _words(placed: PlacedMove | None) -> str:
    if placed is None:
        return "no camera move there"
    length = placed.end - placed.chunk
    return f"the camera move {placed.move.words!r} of {length} {'chunk' if length == 1 else 'chunks'} there"
