"""Videos written chunk by chunk: every frame at its time, the same bytes from the same chunks, nothing half-written."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import imageio_ffmpeg
import pytest
import torch
from torch import Tensor

from vidaccel.errors import UserError
from vidaccel.video import streams as video_stream
from vidaccel.video.ffmpeg import run_ffmpeg
from vidaccel.video.files import read_video, write_video
from vidaccel.video.metrics import psnr
from vidaccel.video.streams import PlayerClosedError, PlayerStream, VideoStream, encode_segment, open_stream


def moving_waves(num_frames: int = 33, height: int = 48, width: int = 64) -> Tensor:
    """Smooth grey waves that move, (F, 3, H, W) uint8, no frame like another."""
    y, x = torch.meshgrid(torch.linspace(0, 6, height), torch.linspace(0, 7, width), indexing="ij")
    phases = 0.19 * torch.arange(num_frames).view(-1, 1, 1, 1)
    return (127 + 100 * torch.sin(x + 0.4 * y + phases)).to(torch.uint8).expand(-1, 3, -1, -1)


def segments_of(frames: Tensor, *sizes: int, fps: float = 16) -> list[bytes]:
    return [encode_segment(chunk, fps=fps) for chunk in frames.split(sizes)]


def written(path: Path, segments: list[bytes], *, fps: float = 16) -> Path:
    with VideoStream(path, fps=fps) as stream:
        for segment in segments:
            stream.append(segment)
    return path


def fail_after_a_chunk(stream: VideoStream | PlayerStream, failure: type[BaseException]) -> None:
    with stream:
        stream.append(encode_segment(moving_waves(2), fps=16))
        raise failure


def packet_times(path: Path) -> list[float]:
    """Seconds at which the pictures of a file are shown."""
    program = [
        imageio_ffmpeg.get_ffmpeg_exe(),
        "-loglevel",
        "error",
        "-i",
        str(path),
        "-c",
        "copy",
        "-f",
        "framecrc",
        "-",
    ]
    lines = subprocess.run(program, capture_output=True, text=True, check=True).stdout.splitlines()
    clock = next(line for line in lines if line.startswith("#tb")).split(": ")[1]
    numerator, denominator = map(int, clock.split("/"))
    return [int(line.split(",")[2]) * numerator / denominator for line in lines if not line.startswith("#")]


@pytest.mark.parametrize("fps", [16, 12.5, 29.97])
@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".mov"])
def test_every_frame_of_every_chunk_reads_back_at_its_time(tmp_path: Path, suffix: str, fps: float) -> None:
    frames = moving_waves()
    path = written(tmp_path / "new" / f"clip{suffix}", segments_of(frames, 9, 12, 12, fps=fps), fps=fps)
    read, rate = read_video(path)
    assert rate == fps
    assert read.shape == frames.shape
    assert psnr(frames.float() / 255, read) > 40
    clock = 0.6e-3 if suffix == ".mkv" else 1e-9  # Matroska counts milliseconds
    assert packet_times(path) == pytest.approx([index / fps for index in range(33)], abs=clock)
    assert list(path.parent.iterdir()) == [path]


def test_chunks_of_a_single_frame_stay_single_frames(tmp_path: Path) -> None:
    frames = moving_waves(6)
    read, _ = read_video(written(tmp_path / "clip.mp4", segments_of(frames, 1, 1, 2, 1, 1)))
    assert psnr(frames.float() / 255, read) > 40


def test_a_chunk_is_the_same_bytes_whatever_came_before_and_decodes_alone(tmp_path: Path) -> None:
    frames = moving_waves()
    segments = segments_of(frames, 9, 12, 12)
    assert encode_segment(frames[9:21].float() / 255, fps=16) == segments[1]
    read, _ = read_video(written(tmp_path / "middle.mp4", segments[1:2]))
    assert torch.equal(read, read_video(written(tmp_path / "all.mp4", segments))[0][9:21])


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".mov"])
def test_stored_segments_give_the_file_of_one_run_to_the_byte(tmp_path: Path, suffix: str) -> None:
    frames = moving_waves()
    whole = written(tmp_path / f"whole{suffix}", segments_of(frames, 9, 12, 12))
    stored = tmp_path / "segments"
    stored.mkdir()
    for index, segment in enumerate(segments_of(frames[:21], 9, 12)):
        (stored / f"{index}.h264").write_bytes(segment)
    segments = [file.read_bytes() for file in sorted(stored.iterdir())]
    resumed = written(tmp_path / f"resumed{suffix}", [*segments, encode_segment(frames[21:], fps=16)])
    assert resumed.read_bytes() == whole.read_bytes()


def test_odd_sides_are_extended_as_in_other_videos(tmp_path: Path) -> None:
    frames = moving_waves(3, 33, 47)
    read, _ = read_video(written(tmp_path / "clip.mp4", segments_of(frames, 3)))
    assert read.shape == read_video(write_video(tmp_path / "whole.mp4", frames, fps=16))[0].shape == (3, 3, 34, 48)


def test_the_file_grows_beside_its_place_and_appears_there_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    segment = encode_segment(moving_waves(12, 128, 128), fps=16)
    with VideoStream(path, fps=16) as stream:
        sizes = []
        for _ in range(3):
            for _ in range(20):
                stream.append(segment)
            (unfinished,) = tmp_path.iterdir()
            sizes.append(unfinished.stat().st_size)
        assert 0 < sizes[0] < sizes[1] < sizes[2]
        assert not path.exists()
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("failure", [KeyboardInterrupt, ValueError])
def test_a_rollout_that_fails_leaves_what_stood_there_and_nothing_else(
    tmp_path: Path, failure: type[BaseException]
) -> None:
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"an older video")
    with pytest.raises(failure):
        fail_after_a_chunk(VideoStream(path, fps=16), failure)
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == b"an older video"


def test_an_encoder_that_fails_at_the_end_leaves_what_stood_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"an older video")
    segment = encode_segment(moving_waves(2), fps=16)

    def failing(*_: object, **__: object) -> bytes:
        raise OSError("the encoder stopped (no space)")

    monkeypatch.setattr(video_stream, "run_ffmpeg", failing)
    with pytest.raises(UserError, match="cannot be written: the encoder stopped"):
        written(path, [segment])
    with pytest.raises(UserError, match="cannot be encoded: the encoder stopped"):
        encode_segment(moving_waves(2), fps=16)
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == b"an older video"


@pytest.mark.skipif(sys.platform == "win32", reason="Windows limits no file sizes")
def test_a_video_the_disk_has_no_room_for_is_an_error_and_no_file(tmp_path: Path) -> None:
    import resource

    segment = encode_segment((torch.rand(9, 3, 64, 64) * 255).to(torch.uint8), fps=16)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(UserError, match=r"clip.mp4 cannot be written: File too large"):
            written(tmp_path / "clip.mp4", [segment] * 9)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_removed_and_that_of_a_living_one_is_not(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    living = tmp_path / f".clip.{os.getppid()}.part.mp4.h264"
    for path in (living, tmp_path / f".clip.{ended.pid}.part.mp4.h264", tmp_path / f".clip.{ended.pid}.part.mp4"):
        path.touch()
    path = written(tmp_path / "clip.mp4", segments_of(moving_waves(2), 2))
    assert set(tmp_path.iterdir()) == {path, living}


def test_what_does_not_fit_is_refused_in_one_line_and_the_video_goes_on(tmp_path: Path) -> None:
    segments = segments_of(moving_waves(4), 2, 2)
    (tmp_path / "file").touch()
    with VideoStream(tmp_path / "clip.mp4", fps=16) as stream:
        stream.append(segments[0])
        wrong = {
            "Segment 1 does not fit": lambda: stream.append(encode_segment(moving_waves(2, 64, 64), fps=16)),
            "size or rate": lambda: stream.append(encode_segment(moving_waves(2), fps=24)),
            "no video segment": lambda: stream.append(segments[1][1:]),
            "encode_segment": lambda: stream.append(b""),
            ".mp4": lambda: VideoStream(tmp_path / "clip.avi", fps=16),
            "`fps`": lambda: VideoStream(tmp_path / "clip.mp4", fps=0),
            "cannot be written": lambda: written(tmp_path / "file" / "clip.mp4", segments),
            "no frames": lambda: written(tmp_path / "empty.mp4", []),
            "shape": lambda: encode_segment(moving_waves(2)[0], fps=16),
        }
        for message, request in wrong.items():
            with pytest.raises(UserError, match=message) as caught:
                request()
            assert "\n" not in str(caught.value)
        stream.append(segments[1])
    assert sorted(file.name for file in tmp_path.iterdir()) == ["clip.mp4", "file"]
    assert read_video(tmp_path / "clip.mp4")[0].shape[0] == 4


def test_a_player_gets_each_chunk_when_it_is_made(tmp_path: Path) -> None:
    frames = moving_waves()
    read_end, write_end = os.pipe()
    with open(read_end, "rb", buffering=0) as player, open(write_end, "wb") as target:
        with PlayerStream(target, fps=16) as stream:
            stream.append(encode_segment(frames[:9], fps=16))
            received = player.read(1 << 20)  # comes before the second chunk is made
            for segment in segments_of(frames[9:], 12, 12):
                stream.append(segment)
        target.close()
        received += player.readall()
    (tmp_path / "seen.ts").write_bytes(received)
    read, rate = read_video(tmp_path / "seen.ts")
    assert rate == 16
    assert psnr(frames.float() / 255, read) > 40
    times = packet_times(tmp_path / "seen.ts")
    assert [time - times[0] for time in times] == pytest.approx([index / 16 for index in range(33)], abs=1e-4)


def test_a_closed_player_ends_the_stream_with_one_line() -> None:
    segment = encode_segment(moving_waves(12, 128, 128), fps=16)
    read_end, write_end = os.pipe()

    def play_until_closed() -> None:
        with open(write_end, "wb") as target, PlayerStream(target, fps=16) as stream:
            stream.append(segment)
            os.close(read_end)
            for _ in range(200):
                stream.append(segment)

    with pytest.raises(PlayerClosedError, match="player was closed after") as caught:
        play_until_closed()
    assert "\n" not in str(caught.value)


def test_a_player_closed_before_the_last_chunk_is_told_too() -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    with open(write_end, "wb") as target:
        stream = PlayerStream(target, fps=16)
        with pytest.raises(PlayerClosedError, match="player was closed"), stream:
            stream.append(encode_segment(moving_waves(2), fps=16))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_is_not_taken_for_a_closed_player() -> None:
    with open("/dev/full", "wb") as target:
        stream = PlayerStream(target, fps=16)
        with (
            pytest.raises(UserError, match="could not be written any more before the last of 1 chunks; make room") as (
                caught
            ),
            stream,
        ):
            stream.append(encode_segment(moving_waves(2), fps=16))
    assert not isinstance(caught.value, PlayerClosedError)


def test_what_was_appended_is_in_the_unfinished_file_at_once(tmp_path: Path) -> None:
    segment = encode_segment(moving_waves(2), fps=16)
    with VideoStream(tmp_path / "clip.mp4", fps=16) as stream:
        for count in (1, 2):
            stream.append(segment)
            (unfinished,) = tmp_path.iterdir()
            assert unfinished.stat().st_size == count * len(segment)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no process groups of this kind")
def test_an_interrupt_of_the_terminal_does_not_reach_the_encoder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "ffmpeg"
    program.write_text(f"#!{sys.executable}\nimport os\nprint(os.getpgid(0))\n")
    program.chmod(0o755)
    monkeypatch.setattr("imageio_ffmpeg.get_ffmpeg_exe", lambda: str(program))
    assert int(run_ffmpeg([])) != os.getpgid(0)
    read_end, write_end = os.pipe()
    with open(read_end, "rb") as group, open(write_end, "wb") as target, PlayerStream(target, fps=16):
        assert int(group.readline()) != os.getpgid(0)


def test_a_failing_rollout_ends_the_player_and_keeps_its_own_error() -> None:
    read_end, write_end = os.pipe()
    with open(read_end, "rb"), open(write_end, "wb") as target:
        stream = PlayerStream(target, fps=16)
        with pytest.raises(KeyboardInterrupt):
            fail_after_a_chunk(stream, KeyboardInterrupt)
    assert stream._process.returncode is not None


def test_the_output_decides_between_a_file_and_a_player(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(open_stream(tmp_path / "clip.mp4", fps=16), VideoStream)
    assert isinstance(open_stream("-", fps=16), PlayerStream)
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stdout", terminal)
    with pytest.raises(UserError, match="ffplay"):
        open_stream("-", fps=16)
    monkeypatch.setattr(sys, "stdout", None)  # as Python has it where the shell closed it
    with pytest.raises(UserError, match="it is closed; open it"):
        open_stream("-", fps=16)
