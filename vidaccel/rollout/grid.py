"""Where chunks lie in time.

The first latent frame of a video is one pixel frame and every later one `temporal_stride`, as in Wan's VAE (arXiv
2503.20314); a hard cut begins a video, so that its first latent frame is one pixel frame again.
"""

import math
import re
from dataclasses import dataclass

from vidaccel.errors import UserError
from vidaccel.video.rate import check_rate

_TIME = re.compile(r"(?:(?:(\d+):)?(\d+):)?(\d+(?:\.\d+)?)")  # seconds, minutes:seconds, hours:minutes:seconds
_SAME_PIXEL_FRAME = 1e-6  # of a pixel frame: what rounding makes of a start that is k / fps
MOST_SECONDS = 1e9  # 30 years; numbers of frames are exact far beyond them


@dataclass(frozen=True, kw_only=True)
class ChunkGrid:
    """Where chunks lie in time.

    chunk_frames: latent frames of a chunk. fps: pixel frames a second. temporal_stride: pixel frames of a latent frame
    after the first, which is one pixel frame. given_frames: latent frames of an image or a clip that the video begins
    with; they are chunks of their own, of which the last may be shorter. cuts: chunks that a hard cut begins, in order.

    Raises UserError for numbers below these, for `fps` not above 0, and for cuts out of order or at chunk 0.
    """

    chunk_frames: int
    fps: float
    temporal_stride: int = 4
    given_frames: int = 0
    cuts: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name, least in (("chunk_frames", 1), ("temporal_stride", 1), ("given_frames", 0)):
            if getattr(self, name) < least:
                raise UserError(f"`{name}` must be at least {least}, got {getattr(self, name)}.")
        if list(self.cuts) != sorted(set(self.cuts)) or min(self.cuts, default=1) < 1:
            raise UserError(f"`cuts` must be chunks after the first in their order, got {self.cuts}.")
        check_rate(self.fps)

    def first_frame(self, chunk: int) -> int:
        """Index of the chunk's first latent frame; `chunk` may be one past the last."""
        made = max(0, chunk - self.num_given_chunks)
        return min((chunk - made) * self.chunk_frames, self.given_frames) + made * self.chunk_frames

    @property
    def num_given_chunks(self) -> int:
        """Chunks of the image or clip that the video begins with."""
        return math.ceil(self.given_frames / self.chunk_frames)

    def first_pixel_frame(self, chunk: int) -> int:
        """Index of the chunk's first pixel frame, which is the number of pixel frames of all chunks before it."""
        return self.pixels_before(self.first_frame(chunk))

    def pixels_before(self, frame: int) -> int:
        """Pixel frames of all latent frames before one; of the chunks before, where a chunk begins with it."""
        cuts = sum(self.first_frame(cut) < frame for cut in self.cuts)
        return pixel_frames(frame, self.temporal_stride) - cuts * self.lost_at_cut

    @property
    def lost_at_cut(self) -> int:
        """Pixel frames that a chunk is shorter whose first latent frame is one pixel frame."""
        return self.temporal_stride - 1

    def start_seconds(self, chunk: int) -> float:
        """Time of the chunk's first pixel frame."""
        return self.first_pixel_frame(chunk) / self.fps

    def chunk_from(self, seconds: float) -> int:
        """The first chunk whose first pixel frame is at or after `seconds`."""
        return self.chunk_from_pixel(self.pixel_from(seconds))

    def pixel_from(self, seconds: float) -> int:
        """The first pixel frame at or after `seconds`."""
        return math.ceil(seconds * self.fps - _SAME_PIXEL_FRAME)

    def chunk_from_pixel(self, pixel: int) -> int:
        """The first chunk whose first pixel frame is `pixel` or a later one."""
        if pixel <= 0:
            return 0
        frame = 1 + -(-(pixel - 1) // self.temporal_stride)  # of integers, as everywhere here: exact at any length
        chunk = -(-frame // self.chunk_frames)
        if frame > self.given_frames:
            chunk = self.num_given_chunks + -(-(frame - self.given_frames) // self.chunk_frames)
        while self.first_pixel_frame(chunk) < pixel:  # cuts make chunks shorter
            chunk += 1
        return chunk

    def num_chunks(self, seconds: float) -> int:
        """How many chunks a video of at least `seconds` takes; at least one."""
        return max(1, self.chunk_from(seconds))


def pixel_frames(num_latent_frames: int, temporal_stride: int) -> int:
    """Pixel frames of the first `num_latent_frames` latent frames: 1 of the first, `temporal_stride` of the others."""
    return 0 if num_latent_frames == 0 else 1 + (num_latent_frames - 1) * temporal_stride


def seconds_of(text: str) -> float:
    """Seconds of a time such as `12.5`, `1:05` or `1:00:30`. Raises UserError for anything else."""
    found = _TIME.fullmatch(text.strip())
    if found is None:
        raise UserError(f"{text!r} is no time; write seconds (12.5), minutes (1:05) or hours (1:00:30).")
    hours, minutes, seconds = (float(part or 0) for part in found.groups())
    if (found[2] and seconds >= 60) or (found[1] and minutes >= 60):
        raise UserError(f"{text!r} is no time: after a colon minutes and seconds are below 60.")
    return hours * 3600 + minutes * 60 + seconds


def span_seconds(text: str) -> tuple[float, float]:
    """From when until when a span such as `2-2.75` or `0:58 - 1:02` lasts. Raises UserError for anything else."""
    start, dash, end = text.partition("-")
    if not dash:
        raise UserError(f"{text!r} is no span of time; write from and to, such as 2-2.75 or 0:58-1:02.")
    return seconds_of(start), seconds_of(end)
