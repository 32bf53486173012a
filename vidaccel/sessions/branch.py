"""The finished chunks of one branch of a session: appended one by one, read when asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from vidaccel.errors import UserError
from vidaccel.sessions.files import SessionFiles
from vidaccel.sessions.head import Head, Parent, Snapshot, Span
from vidaccel.sessions.store import json_values, sync_folder

_SEGMENT_SUFFIX = ".h264"


class Branch:
    """The finished chunks of one branch, counted from 0; made by `Session.branch`.

    Raises UserError if there is no such branch, or its journals are damaged.
    """

    def __init__(self, files: SessionFiles, name: str) -> None:
        self.name = name
        self._files = files
        with files.guard:
            for span in self._head.spans:
                files.journal(span.journal).verify(span.num_chunks, span.digest)

    @property
    def num_chunks(self) -> int:
        """Finished chunks."""
        return self._head.num_chunks

    @property
    def parent(self) -> Parent | None:
        """The branch this one was made from, and how many of its chunks were taken and not given up since."""
        return self._head.parent

    @property
    def snapshots(self) -> tuple[int, ...]:
        """After how many chunks there is an exact state, in rising order."""
        return tuple(snapshot.num_chunks for snapshot in self._head.snapshots)

    def append(
        self,
        values: Mapping[str, Any],
        latents: Mapping[str, Tensor],
        segment: bytes | None = None,
        state: tuple[Mapping[str, Tensor], Mapping[str, Any]] | None = None,
        *,
        index: int | None = None,
    ) -> None:
        """Add a finished chunk; it is on disk, whole, when this returns.

        values: JSON values (prompt, sink, slow, fast, ...); the command line shows seconds of video if the chunks have
        `num_pixel_frames` and the settings `fps`.
        latents: tensors of any shape, on any device.
        segment: the encoded frames (H.264).
        state: tensors and JSON values from which the rollout goes on exactly; older ones are removed as the session's
        `keep_snapshots` and `snapshot_every` say.
        index: of the chunk, counted from 0, where the caller knows it: refused unless it is the next.

        Raises UserError for values that are no JSON, tensors that safetensors cannot hold, another `index`, and a full
        disk. The branch is then as it was before and can be appended to again; only if the disk fails in the very last
        step, bringing the name of the branch's file to disk, the chunk counts already, as `num_chunks` says.
        """
        files = self._files
        plain = json_values(values, "The values of a chunk")
        with files.change():
            head = self._head
            if index not in (None, head.num_chunks):
                raise UserError(
                    f"Branch {self.name!r} has {head.num_chunks} chunks and this is chunk {index}, counted from 0: "
                    "somebody else has written to it; let one rollout write to a branch, or make another branch."
                )
            record: dict[str, Any] = {"index": head.num_chunks, "values": plain}
            record["latents"] = files.objects.put_tensors(latents)
            record["segment"] = None if segment is None else files.objects.put_bytes(segment, _SEGMENT_SUFFIX)
            sync_folder(files.objects.folder)
            snapshots = head.snapshots
            if state is not None:
                snapshots = (*snapshots, Snapshot(head.num_chunks + 1, files.states.put_tensors(*state)))
                sync_folder(files.states.folder)
            kept = files.rule.kept(snapshots)
            files.replace_head(self.name, replace(head, spans=self._write(head, record), snapshots=kept))
            files.remove_states({snapshot.state for snapshot in snapshots if snapshot not in kept})

    def chunks(self, start: int = 0, stop: int | None = None) -> Iterator[dict[str, Any]]:
        """The values of the chunks start, ..., stop - 1 (None: to the last), read one by one.

        Raises UserError for chunks that there are not, and for a damaged journal.
        """
        stop = self.num_chunks if stop is None else stop
        if not 0 <= start <= stop <= self.num_chunks:
            raise UserError(f"Branch {self.name!r} has {self.num_chunks} chunks; got a range from {start} to {stop}.")
        return (record["values"] for record in self._records(start, stop))

    def latents(self, index: int) -> dict[str, Tensor]:
        """The latents of a chunk, on the CPU. Raises UserError for no such chunk and for a damaged file."""
        digest = self._record(index)["latents"]
        return self._files.objects.tensors(digest, remedy=self._remedy(index))[0]

    def segment(self, index: int) -> bytes | None:
        """The encoded frames of a chunk, if it has any. Raises UserError as `latents` does."""
        digest = self._record(index)["segment"]
        if digest is None:
            return None
        return self._files.objects.content(digest, _SEGMENT_SUFFIX, remedy=self._remedy(index))

    def snapshot_at_or_before(self, num_chunks: int) -> tuple[int, dict[str, Tensor], dict[str, Any]] | None:
        """The last exact state after at most `num_chunks` chunks: (after how many, tensors, values), or None.

        Raises UserError for a damaged file.
        """
        found = [one for one in self._head.snapshots if one.num_chunks <= num_chunks]
        if not found:
            return None
        remedy = self._remedy(found[-1].num_chunks - 1)
        return found[-1].num_chunks, *self._files.states.tensors(found[-1].state, remedy=remedy)

    def cut(self, num_chunks: int | None) -> Head:
        """The head of a branch with only the first `num_chunks` chunks (None: all). Raises UserError for too many."""
        wanted = self.num_chunks if num_chunks is None else num_chunks
        if not 0 <= wanted <= self.num_chunks:
            raise UserError(
                f"Branch {self.name!r} has {self.num_chunks} finished chunks; cannot keep {wanted} of them."
            )
        return self._head.cut(wanted, lambda journal, num_lines: self._files.journal(journal).digest(num_lines))

    def files(self) -> set[Path]:
        """Every object, state and journal that the branch refers to. Raises UserError for a damaged journal."""
        found = {self._files.journal(span.journal).path for span in self._head.spans}
        found |= {self._files.states.path(snapshot.state) for snapshot in self._head.snapshots}
        for record in self._records(0, self.num_chunks):
            found.add(self._files.objects.path(record["latents"]))
            if record["segment"] is not None:
                found.add(self._files.objects.path(record["segment"], _SEGMENT_SUFFIX))
        return found

    @property
    def _head(self) -> Head:
        return self._files.head(self.name)

    def _write(self, head: Head, record: Mapping[str, Any]) -> tuple[Span, ...]:
        """Write the line of a chunk, in a journal of its own where another branch goes on in the last one."""
        spans = head.spans
        if not spans or self._files.is_continued(spans[-1]):
            spans = (*spans, Span(self._files.new_journal(self.name), 0, ""))
        *others, last = spans
        digest = self._files.journal(last.journal).append(last.num_chunks, record)
        return (*others, Span(last.journal, last.num_chunks + 1, digest))

    def _records(self, start: int, stop: int) -> Iterator[dict[str, Any]]:
        for journal, first, end in self._head.ranges(start, stop):
            yield from self._files.journal(journal).read(first, end)

    def _record(self, index: int) -> dict[str, Any]:
        if not 0 <= index < self.num_chunks:
            raise UserError(f"Branch {self.name!r} has {self.num_chunks} chunks, counted from 0; got {index}.")
        return next(self._records(index, index + 1))

    def _remedy(self, index: int) -> str:
        command = f"vidaccel session rewind {self._files.folder} --branch {self.name} --to {index}"
        return f"restore it from a copy, or go on before it: `{command}`."
