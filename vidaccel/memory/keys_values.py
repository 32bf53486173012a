"""The memory of one rollout: a policy's decisions for every sample, and the keys and values that follow them.

Paper: Context Forcing, arXiv 2602.06028, section 3.3.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vidaccel.errors import UserError
from vidaccel.memory.answers import check_entries, check_policy
from vidaccel.memory.buffers import FrameBuffers, Layout, MemoryShape
from vidaccel.memory.camera import Camera
from vidaccel.memory.config import MemoryConfig
from vidaccel.memory.index import MemoryIndex
from vidaccel.memory.official import check_keys_can_follow
from vidaccel.memory.policy import MemoryPolicy
from vidaccel.memory.rotary import RotaryTable


class KeyValueMemory:
    """Keys and values of the remembered frames of a rollout, of any `MemoryPolicy`.

    Every sample of a batch has its own index, so that it remembers what it would alone.
    For every chunk: `begin_chunk`, any number of passes of the transformer at falling noise (`observe` after each),
    one pass with the finished latents at timestep 0, `commit`. Of students that are told of a camera, every frame is
    remembered with the place of its own.

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

        Raises ValueError for more frames than `table` has positions, for policies whose copies keys cannot follow, and
        for what is no policy.
        """
        check_policy(policy)
        if isinstance(policy, MemoryConfig):
            check_keys_can_follow(policy)
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

    def compile(self) -> None:
        """Compile the rotation of remembered keys."""
        self.buffers.compile()

    def reset(self) -> None:
        """Forget everything: the next chunk is the first of a video."""
        self._indexes = [MemoryIndex(self.policy) for _ in range(self.shape.batch_size)]
        self.buffers.clear()
        self._previous: Tensor | None = None
        self._similarity: Tensor | None = None
        self._is_changed_by_pass = False

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

    # What the rollout calls

    @property
    def indexes(self) -> Sequence[MemoryIndex]:
        """The index of every sample."""
        return self._indexes

    def begin_chunk(self, num_frames: int | None = None, *, camera: Camera | None = None) -> None:
        """Make room for a chunk of `num_frames` (`chunk_frames` by default): evict, promote, rotate.

        camera: of the chunk's frames, on the host; they are remembered with it. None: it holds at 0.
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
        self._check_entries()
        self.buffers.set_camera([index.current for index in self._indexes], camera)
        self._arrange()

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
        chunks = [index.current for index in self._indexes]
        for index, value in zip(self._indexes, values, strict=True):
            index.commit(value)
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
        return tensors, {"indexes": [index.state() for index in self.indexes], **values}

    def load_state(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Take over what `save_state` gave. Raises UserError if it is of another memory."""
        indexes = [MemoryIndex.from_state(self.policy, state) for state in values["indexes"]]
        self.buffers.load_state(tensors, values)
        self._indexes, self._is_changed_by_pass, self._similarity = indexes, False, None
        self._previous = tensors["previous"].to(self.device) if "previous" in tensors else None

    def rebuild(self) -> Iterator[tuple[tuple[int, ...], ...]]:
        """Let the remembered frames be written anew, under another prompt for one.

        Yields groups of at most `chunk_frames` frames in the order of their positions, for every sample its frames;
        the caller runs a pass at timestep 0 with their latents before it takes the next group; positions and camera
        are those of the group. A sample with fewer frames than the others gets its last frame repeated, which is then
        not kept.
        """
        kept = [layout.kept for layout in self._layouts()]
        for groups in self.buffers.write_anew(kept, self.policy.chunk_frames):
            yield tuple(tuple(frame for frame, _ in group) for group in groups)
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
            check_entries(index, {slot[0] for slot in slots if slot} | set(index.current))

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
