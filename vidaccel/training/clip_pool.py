"""A pool of rendered clips from which training batches are cut: a clip serves several crops before it is replaced.

Shapes: the pool is (N, F, H, W, 4) uint8 on the device, red, green, blue and the coverage by the subject.
"""

import torch
from torch import Tensor

from vidaccel.world import FRAME_SIZE, Scene, random_scene, render, subject_mask

_RENDER_BATCH = 32


class ClipPool:
    """Clips of the "train" split with consecutive seeds from `first_seed` on."""

    def __init__(self, num_clips: int, *, num_frames: int, first_seed: int, device: torch.device) -> None:
        self.clips = torch.empty(num_clips, num_frames, FRAME_SIZE, FRAME_SIZE, 4, dtype=torch.uint8, device=device)
        self.middles = torch.empty(num_clips, num_frames, 2, device=device)
        self.next_seed = first_seed
        self._next_slot = 0
        self.refresh(num_clips)

    def refresh(self, count: int) -> None:
        """Replace the `count` oldest clips by new ones."""
        num_clips, num_frames = self.clips.shape[:2]
        while count > 0:
            batch = min(count, _RENDER_BATCH, num_clips - self._next_slot)
            scenes = [random_scene(self.next_seed + index, num_frames=num_frames) for index in range(batch)]
            slots = slice(self._next_slot, self._next_slot + batch)
            video = render(scenes, device=self.clips.device)
            mask = subject_mask(scenes, device=self.clips.device)
            pixels = torch.cat([video, mask[:, :, None]], dim=2).permute(0, 1, 3, 4, 2)
            self.clips[slots] = (pixels * 255).round().to(torch.uint8)
            self.middles[slots] = torch.tensor(
                [[_middle(scene, frame) for frame in range(num_frames)] for scene in scenes], device=self.clips.device
            )
            self.next_seed += batch
            self._next_slot = (self._next_slot + batch) % num_clips
            count -= batch

    def crops(
        self, batch_size: int, *, num_frames: int, size: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Random crops of `size` pixels, every second one near the subject.

        Returns the video (B, 3, num_frames, size, size) in [-1, 1] and the subject's coverage (B, 1, ...) in [0, 1].
        """
        device = self.clips.device
        num_clips, total_frames = self.clips.shape[:2]
        clip = torch.randint(num_clips, (batch_size,), device=device, generator=generator)
        start = torch.randint(total_frames - num_frames + 1, (batch_size,), device=device, generator=generator)
        frames = start[:, None] + torch.arange(num_frames, device=device)
        corner = torch.rand(batch_size, 2, device=device, generator=generator)
        near = self.middles[clip, start + num_frames // 2] - size / 2 + (corner - 0.5) * size
        anywhere = corner * (FRAME_SIZE - size + 1)
        is_near = (torch.arange(batch_size, device=device) % 2 == 0)[:, None]
        corner = torch.where(is_near, near, anywhere).clamp(0, FRAME_SIZE - size).long()
        columns = corner[:, :1] + torch.arange(size, device=device)
        rows = corner[:, 1:] + torch.arange(size, device=device)
        pixels = self.clips[
            clip[:, None, None, None], frames[:, :, None, None], rows[:, None, :, None], columns[:, None, None, :]
        ]
        pixels = pixels.permute(0, 4, 1, 2, 3).float() / 255
        return pixels[:, :3] * 2 - 1, pixels[:, 3:]


def _middle(scene: Scene, frame: int) -> tuple[float, float]:
    x, y = scene.subject_xy(frame)
    return x - scene.camera_x(frame), y
