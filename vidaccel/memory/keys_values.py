"""The memory of one rollout: a policy's decisions for every sample, and the keys and values that follow them.

Paper: Context Forcing, arXiv 2602.06028, section 3.3.
"""

from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vidaccel.errors import UserError
from vidaccel.memory.answers import check_entries, check_policy
from vidaccel.memory.buffers import FrameBuffers, FrameKey, Layout, MemoryShape
from vidaccel.memory.camera import Camera
from vidaccel.memory.config import MemoryConfig
from vidaccel.memory.index import MemoryIndex
from vidaccel.memory.official import check_keys_can_follow
from vidaccel.memory.policy import MemoryPolicy
from vidaccel.memory.prefixes import with_prefix, without_prefix
from vidaccel.memory.retrieval import check_can_retrieve
from vidaccel.memory.rotary import RotaryTable
from vidaccel.memory.seen_frames import SeenFrames, coming_columns


class KeyValueMemory:
    """Keys and values of the remembered frames of a rollout, of any `MemoryPolicy`.

    Every sample of a batch has its own index, so that it remembers what it would alone.
    For every chunk: `begin_chunk` (and `recover`, where frames come back), any number of passes of the transformer at
    falling noise (`observe` after each), one pass with the finished latents at timestep 0, `commit`. Of students that
    are told of a camera, every frame is remembered with the place of its own.

    indexes: the integers, one `MemoryIndex` a sample. buffers: the tensors.
    """

    def __init__(
        self,
        policy: MemoryPolicy,
        shape: MemoryShape,
        table: RotaryTable,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Reserve the buffers.

        Raises ValueError for more frames than `table` has positions, for policies whose copies keys cannot follow, for
        what is no policy, and for one by whose views nothing can come back: a transformer that is told of no camera.
        """
        check_policy(policy)
        if isinstance(policy, MemoryConfig):
            check_keys_can_follow(policy)
        check_can_retrieve(policy.retrieval, has_camera=shape.has_camera)
        self.policy, self.shape = policy, shape
        self.buffers = FrameBuffers(
            shape,
            table,
            num_frames=policy.total_frames,
            chunk_frames=policy.chunk_frames,
            depth=policy.depth_map(shape.num_layers),
            device=device,
            dtype=dtype,
        )
        self.reset()

    def _nothing_seen(self) -> list[SeenFrames]:
        retrieval, count = self.policy.retrieval, self.shape.batch_size
        return [] if retrieval is None else [SeenFrames(retrieval, self.shape.num_columns) for _ in range(count)]

    def compile(self) -> None:
        """Compile the rotation of remembered keys."""
        self.buffers.compile()

    def reset(self) -> None:
        """Forget everything: the next chunk is the first of a video."""
        self._indexes = [MemoryIndex(self.policy) for _ in range(self.shape.batch_size)]
        self._seen = self._nothing_seen()
        self.buffers.clear()
        self._previous: Tensor | None = None
        self._similarity: Tensor | None = None
        self._is_changed_by_pass = False
        self._is_rewritten = False

    # What the transformer reads

    @property
    def device(self) -> torch.device:
        """Where the buffers are."""
        return self.buffers.raw.device

    @property
    def dtype(self) -> torch.dtype:
        """Number format of keys and values."""
        return self.buffers.raw.dtype

    @property
    def rotary(self) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the chunk's tokens, two tensors (B, L, 1, D)."""
        return self.buffers.rotary

    @property
    def motions(self) -> Tensor | None:
        """How the camera moves in the chunk's latent frames, (B, F) in patch columns; None: there is no camera."""
        return self.buffers.motions

    @property
    def attention_mask(self) -> Tensor | None:
        """Which keys count, (B, 1, 1, S) bool; None while all samples remember equally many frames."""
        return self.buffers.mask

    def view(self, block_index: int) -> tuple[Tensor, Tensor, Tensor]:
        """Of one block: the chunk's keys before rotation, all attended keys, all attended values.

        To be asked for in the order of the blocks, each when the one before has written.
        """
        return self.buffers.view(block_index)

    @property
    def attended_frames(self) -> int:
        """Frames that the passes of this chunk attend to, the chunk's own among them."""
        return self.buffers.current.stop

    @property
    def is_rewritten(self) -> bool:
        """Whether frames of the past are being written, by groups of `recover` or `rebuild`, and no chunk."""
        return self._is_rewritten

    # What the rollout calls

    @property
    def indexes(self) -> Sequence[MemoryIndex]:
        """The index of every sample."""
        return self._indexes

    def begin_chunk(
        self,
        num_frames: int | None = None,
        *,
        camera: Camera | None = None,
        wanted: Sequence[Sequence[int]] | None = None,
    ) -> Sequence[Sequence[int]]:
        """Make room for a chunk of `num_frames` (`chunk_frames` by default): evict, promote, rotate.

        Where frames come back, their keys are missing and passes must wait until `recover` is done. Returns for every
        sample which frames should come back, for the memories of other branches.

        camera: of the chunk's frames, on the host; they are remembered with it. None: it holds at 0.
        wanted: what another branch's memory returned, to be taken instead of an own search.
        A chunk that was begun and not committed begins again, with nothing left of its passes or its camera. Raises
        UserError in the official mode, whose passes change the memory, and ValueError for a camera of another size or
        for a transformer that is not told of one.
        """
        if self._is_changed_by_pass:
            raise UserError(
                "The memory was changed by passes of a chunk that was interrupted, as the official mode does; go on "
                "from a saved state, or use the clean mode."
            )
        self._check_camera(camera, self.policy.chunk_frames if num_frames is None else num_frames)
        for index in self._indexes:
            index.begin_chunk(num_frames)
        wanted = self._wanted(camera) if wanted is None else wanted
        if self._seen:
            for index, frames in zip(self._indexes, wanted, strict=True):
                index.retrieve(frames)
        self._check_entries()
        self.buffers.set_camera([index.current for index in self._indexes], camera)
        if not self._seen or not any(self.buffers.missing(self._layouts())):
            self._arrange()
        return wanted

    def recover(self) -> Generator[tuple[tuple[int, ...], ...]]:
        """Let the frames that came back with `begin_chunk` be written; as `rebuild`, and nothing where none did."""
        layouts = self._layouts() if self._seen else []
        missing = self.buffers.missing(layouts) if self._seen else []
        if not any(missing):
            return
        cameras = [
            {frame: seen.camera_of(frame) for frame, _ in row} for seen, row in zip(self._seen, missing, strict=True)
        ]
        room = len(self._indexes[0].current)  # behind what is remembered
        yield from self._rewriting(self.buffers.write_missing(missing, layouts, cameras, group_frames=room))
        self._arrange()

    def _rewriting(self, groups: Iterator[list[list[FrameKey]]]) -> Generator[tuple[tuple[int, ...], ...]]:
        self._is_rewritten = True
        try:
            for group in groups:
                yield tuple(tuple(frame for frame, _ in row) for row in group)
        finally:
            self._is_rewritten = False

    def _wanted(self, camera: Camera | None) -> Sequence[Sequence[int]]:
        found = []
        for sample, (index, seen) in enumerate(zip(self._indexes, self._seen, strict=False)):
            present = [entry.frame for entry in index.entries if entry.frame not in index.current]
            found.append(seen.wanted(present, coming_columns(camera, sample, len(index.current))))
        return found

    def observe(self, similarity: Tensor | None = None) -> Tensor | None:
        """To be called after a denoising pass: the official mode may copy a frame of that pass into the slow part.

        Differs from the released code in one thing: one decision for all layers, after the pass instead of inside
        it, so that the pass which decides does not see the copy beside the same frame.

        similarity: as `commit` takes it. Returns the similarity that decided, for the memories of other branches.
        """
        if not self.policy.observes_passes:
            return None
        mean, similarity, values = self._evidence(similarity)
        self._previous, self._is_changed_by_pass = mean, True
        for index, value in zip(self._indexes, values, strict=True):
            index.observe(value)
        self._check_entries()
        self._arrange()
        return similarity

    def commit(self, similarity: Tensor | None = None) -> None:
        """To be called after the pass at timestep 0: the chunk is now remembered. Waits for the device.

        similarity: (B,) to decide with another memory's similarity, as the branches of guidance must.
        """
        mean, similarity, values = self._evidence(similarity)  # the wait; what comes now is not interrupted by errors
        on_host = None if mean is None or not self._seen else mean.cpu()
        chunks = [index.current for index in self._indexes]
        for index, value in zip(self._indexes, values, strict=True):
            index.commit(value)
        for sample, (seen, index) in enumerate(zip(self._seen, self._indexes, strict=False)):
            cameras = self.buffers.cameras_of(sample, chunks[sample])
            own = None if on_host is None else on_host[:, sample]
            seen.add(cameras, is_keyframe=index.is_keyframe, mean=own)
        self.buffers.keep(chunks)
        self._is_changed_by_pass, self._similarity, self._previous = False, similarity, mean
        self._check_entries()

    @property
    def similarity(self) -> Tensor | None:
        """Similarity of the last committed chunk's keys with those of the chunk before, (B,) on the device, or None.

        The cosine of the keys' means over the tokens (arXiv 2602.06028, equation 7), averaged over the kept layers.
        """
        return self._similarity

    def bytes_by_part(self) -> dict[str, int]:
        """Bytes in use by the frames of each part, and all bytes reserved."""
        parts = ("sink", "slow", "fast")
        counts = {part: sum(len(getattr(index, part)) for index in self.indexes) for part in parts}
        used = {part: self.buffers.frame_bytes * count for part, count in counts.items()}
        return used | {"reserved": self.buffers.nbytes}

    def save_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything that later chunks depend on, between two chunks: tensors and JSON values.

        The tensors are the frames in use; rotated keys follow from them. They are views of the buffers: write or clone
        them before the next chunk.
        """
        tensors, values = self.buffers.save_state()
        if self._previous is not None:
            tensors["previous"] = self._previous
        if self._seen:
            parts = [seen.state() for seen in self._seen]
            for number, (saved, _) in enumerate(parts):
                tensors |= with_prefix(f"seen{number}", saved)
            values["seen"] = [saved for _, saved in parts]
        return tensors, {"indexes": [index.state() for index in self.indexes], **values}

    def load_state(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Take over what `save_state` gave. Raises UserError if it is of another memory."""
        indexes = [MemoryIndex.from_state(self.policy, state) for state in values["indexes"]]
        seen = self._seen_in(tensors, values, [index.num_frames for index in indexes])
        self.buffers.load_state(tensors, values)
        self._indexes, self._is_changed_by_pass, self._similarity = indexes, False, None
        self._previous = tensors["previous"].to(self.device) if "previous" in tensors else None
        self._seen = seen

    def _seen_in(
        self, tensors: Mapping[str, Tensor], values: Mapping[str, Any], num_frames: Sequence[int]
    ) -> list[SeenFrames]:
        found, saved = self._nothing_seen(), values.get("seen", ())
        if len(saved) != len(found):
            raise UserError("The saved memory does not say what was seen before; take one that retrieves as this does.")
        for number, seen in enumerate(found):
            count = num_frames[number]
            seen.load(without_prefix(f"seen{number}", tensors), saved[number])
            if len(seen) != count:
                raise UserError(
                    f"The saved memory is damaged: it saw {len(seen)} frames of {count}. Take an older one."
                )
        return found

    def rebuild(self) -> Generator[tuple[tuple[int, ...], ...]]:
        """Let the remembered frames be written anew, under another prompt for one.

        Yields groups of at most `chunk_frames` frames in the order of their positions, for every sample its frames;
        the caller runs a pass at timestep 0 with their latents before it takes the next group; positions and camera
        are those of the group. A sample with fewer frames than the others gets its last frame repeated, which is then
        not kept.
        """
        kept = [layout.kept for layout in self._layouts()]
        yield from self._rewriting(self.buffers.write_anew(kept, self.policy.chunk_frames))
        self._previous = self._mean_of_last_chunk()

    def _check_camera(self, camera: Camera | None, num_frames: int) -> None:
        if camera is None:
            return
        if not self.shape.has_camera:
            raise ValueError("This memory is of a transformer that is not told of a camera; leave it out.")
        wanted = (self.shape.batch_size, num_frames)
        if not camera.columns.shape == camera.motions.shape == wanted:
            raise ValueError(
                f"The camera of this chunk must have columns and motions {wanted} (videos, latent frames), got "
                f"{tuple(camera.columns.shape)} and {tuple(camera.motions.shape)}."
            )

    def _layouts(self) -> list[Layout]:
        layouts = []
        for index in self._indexes:
            slots = [(entry.frame, entry.source if entry.is_copy else None) for entry in index.entries]
            first = len(slots) - len(index.current)  # the chunk's own entries are the last ones
            layouts.append(
                Layout(
                    kept=dict(zip(slots[:first], index.positions, strict=False)),
                    chunk=dict(zip(index.current, index.positions[first:], strict=True)),
                )
            )
        return layouts

    def _check_entries(self) -> None:
        for index, slots in zip(self._indexes, self.buffers.slots, strict=True):
            known = {slot[0] for slot in slots if slot} | set(index.current)
            check_entries(index, known, num_seen=len(self._seen[0]) if self._seen else 0)

    def _arrange(self) -> None:
        self.buffers.arrange(self._layouts())

    def _evidence(self, similarity: Tensor | None) -> tuple[Tensor | None, Tensor | None, list[float] | list[None]]:
        """Mean keys of the chunk if a policy asks for them, its similarity to the previous one, and that on the host.

        similarity: to be taken instead.
        """
        mean = None
        if similarity is None and self.policy.uses_similarity:
            mean = self.buffers.mean_keys()
            if self._previous is not None:
                similarity = F.cosine_similarity(mean, self._previous, dim=-1).mean(0)
        return mean, similarity, [None] * self.shape.batch_size if similarity is None else similarity.tolist()

    def _mean_of_last_chunk(self) -> Tensor | None:
        """Mean keys of the frames of the last chunk, as far as they are remembered."""
        if not self.policy.uses_similarity or self._previous is None:
            return None
        means = self._previous.clone()
        for sample, index in enumerate(self._indexes):
            last = range(index.num_frames - self.policy.chunk_frames, index.num_frames)
            found = self.buffers.mean_keys_of(sample, last)
            if found is not None:
                means[:, sample] = found
        return means
