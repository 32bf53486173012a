"""Videos written while they are made: chunk after chunk to a file or a player, in memory of one chunk.

Each chunk is encoded for itself into a segment: an H.264 byte stream (ITU-T H.264, Annex B) that begins with its
parameter sets and an IDR picture, whose pictures refer to no other segment and stand in the order they are shown. So
segments can be stored and appended to one another; the same ones always give the same file, to the byte.
"""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from contextlib import ExitStack, suppress
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from torch import Tensor

from vidaccel.errors import UserError
from vidaccel.files.atomic import atomic_write, temporary_sibling
from vidaccel.video.ffmpeg import H264_OPTIONS, file_url, raw_source, run_ffmpeg
from vidaccel.video.paths import PLAYER, video_path
from vidaccel.video.rate import check_rate

# The preset has to keep up with a rollout on one thread: with more, and without `cpu-independent`, the bytes would
# depend on the machine. Pictures in the order shown (no B pictures) need no timestamps. Delimiters (aud) part segments
# of a single picture, and the encoder's note about itself (units of type 6) is left out.
_SEGMENT_OPTIONS = (
    *(*H264_OPTIONS, "-preset", "veryfast", "-threads", "1", "-bf", "0", "-x264-params", "aud=1:cpu-independent=1"),
    *("-bsf:v", "filter_units=remove_types=6", "-flags:v", "+bitexact", "-f", "h264", "-"),
)
_DELIMITER = b"\x00\x00\x00\x01\x09"
_IDR_PICTURE = b"\x00\x00\x01\x65"


class PlayerClosedError(UserError):
    """Whoever read the video from standard output stopped reading: a usual end of watching."""


def encode_segment(frames: Tensor, *, fps: float) -> bytes:
    """The segment of frames (f, 3, H, W), uint8 or floating in [0, 1]: lossy H.264 in 4:2:0 as `write_video`'s.

    The bytes depend on the frames, the rate and the version of the encoder only. No state is kept, so that chunks can
    be encoded in a thread beside the rollout. Odd sides are extended by repeating the last row or column.

    Raises UserError for frames of another shape, a rate not above 0 and an encoder that fails.
    """
    source, pixels = raw_source(frames, fps=fps)
    try:
        return run_ffmpeg([*source, *_SEGMENT_OPTIONS], data=pixels)
    except OSError as error:
        raise UserError(f"The frames cannot be encoded: {error}.") from error


def open_stream(output: str | Path, *, fps: float) -> VideoStream | PlayerStream:
    """The stream to a file, or for the output "-" to whoever reads standard output, for instance `| ffplay -`.

    Raises UserError as the streams do, and where standard output is a terminal or closed.
    """
    if str(output) != PLAYER:
        return VideoStream(output, fps=fps)
    if sys.stdout is None:
        raise UserError('The output "-" is standard output, and it is closed; open it, or name a file.')
    if sys.stdout.isatty():
        raise UserError('The output "-" is video for another program; write `vidaccel ... | ffplay -`, or name a file.')
    sys.stdout.flush()
    return PlayerStream(sys.stdout.buffer, fps=fps)


class VideoStream:
    """A video file (.mp4, .mkv, .mov) from segments: `with VideoStream(path, fps=16) as stream: stream.append(...)`.

    They go to an unfinished file beside `path`. Where the block ends well they are put into `path`, not encoded
    again; where it does not, or the process is killed, what stood at `path` before still stands there.
    """

    def __init__(self, path: str | Path, *, fps: float) -> None:
        """Raises UserError for a suffix or a rate that no video file can have."""
        self.path, self.fps = video_path(path), fps
        check_rate(fps)
        self._joint = _SegmentCheck()
        self._open = ExitStack()

    def __enter__(self) -> Self:
        """Raises UserError where the folder cannot be made or written."""
        with ExitStack() as stack:
            self._segments = stack.enter_context(temporary_sibling(self.path, f"{self.path.suffix}.h264"))
            self._file = stack.enter_context(open(self._segments, "wb"))
            self._open = stack.pop_all()
        return self

    def append(self, segment: bytes) -> None:
        """Add the frames of a segment of `encode_segment`.

        Raises UserError for bytes that are no segment, and for one of another size or rate than those before.
        """
        self._joint.check(segment)
        try:
            self._file.write(segment)
            self._file.flush()
        except OSError as error:
            raise UserError(f"{self.path} cannot be written: {error.strerror}.") from error

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._open:
            if kind is None:
                self._file.close()
                self._finish()

    def _finish(self) -> None:
        """Put the segments into the file that was asked for."""
        if not self._joint.num_segments:
            raise UserError(f"{self.path} was not written: the video has no frames.")
        source = _from_segments(file_url(self._segments), self.fps)
        with atomic_write(self.path) as unfinished:
            run_ffmpeg([*source, "-movflags", "+faststart", file_url(unfinished)])


class PlayerStream:
    """The video as an MPEG transport stream while it is made, for a player that reads the other end of `target`."""

    def __init__(self, target: BinaryIO, *, fps: float) -> None:
        """target: an open file with a descriptor. Raises UserError for a rate that no video can have."""
        check_rate(fps)
        self.target, self.fps = target, fps
        self._joint = _SegmentCheck()

    def __enter__(self) -> Self:
        from imageio_ffmpeg import get_ffmpeg_exe

        # What is sent is known, so that nothing need be looked at for long before it is passed on.
        source = ["-probesize", "32", "-analyzeduration", "0", *_from_segments("-", self.fps)]
        sink = ["-flush_packets", "1", "-muxdelay", "0", "-muxpreload", "0", "-f", "mpegts", "-"]
        self._process = subprocess.Popen(
            [get_ffmpeg_exe(), "-hide_banner", "-loglevel", "quiet", *source, *sink],
            stdin=subprocess.PIPE,
            stdout=self.target,
            start_new_session=True,  # Ctrl-C is for this process, see `run_ffmpeg`
        )
        return self

    def append(self, segment: bytes) -> None:
        """Pass the frames of a segment of `encode_segment` on; waits while the player is behind.

        Raises UserError for bytes that are no segment, for one of another size or rate than those before and where a
        file or a device takes no more, and PlayerClosedError when nobody reads any more.
        """
        self._joint.check(segment)
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(segment)
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise self._ended(f"after {self._joint.num_segments} chunks") from error

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is not None:
            self._process.terminate()
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # the exit code says it too
            self._process.stdin.close()
        if self._process.wait() and kind is None:
            raise self._ended(f"before the last of {self._joint.num_segments} chunks")

    def _ended(self, when: str) -> UserError:
        """Why no more is taken: who reads from a pipe may stop at any time, and a file only on a full disk."""
        kind = os.fstat(self.target.fileno()).st_mode
        if stat.S_ISFIFO(kind) or stat.S_ISSOCK(kind):
            return PlayerClosedError(f"The player was closed {when}.")
        return UserError(f"Standard output could not be written any more {when}; make room and run it again.")


class _SegmentCheck:
    """Whether segments fit to one another: they begin with the same delimiter and parameter sets."""

    def __init__(self) -> None:
        self.num_segments = 0
        self._beginning = b""

    def check(self, segment: bytes) -> None:
        """Count a segment, or raise UserError."""
        end = segment.find(_IDR_PICTURE)
        if not segment.startswith(_DELIMITER) or end < 0:
            raise UserError("The bytes are no video segment of `encode_segment`.")
        if self.num_segments and segment[:end] != self._beginning:
            raise UserError(
                f"Segment {self.num_segments} does not fit those before: its frames are of another size or rate, or it "
                "comes from another version of the encoder."
            )
        self._beginning = segment[:end]
        self.num_segments += 1


def _from_segments(source: str, fps: float) -> list[str]:
    """Pictures as they are, the n-th at n periods; nothing that depends on the time or a random number."""
    rate = Fraction(f"{fps:.6f}")
    period = f"{rate.denominator}/{rate.numerator}"
    clock = f"setts=ts=round(N*{period}/TB):duration=round({period}/TB):time_base={period}"
    reading = ["-framerate", str(rate), "-f", "h264", "-i", source]
    return [*reading, "-c", "copy", "-bsf:v", clock, "-fflags", "+bitexact", "-map_metadata", "-1"]
