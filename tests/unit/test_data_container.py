# SPDX-License-Identifier: Apache-2.0
"""Which stream is the film, and what is no media file: pipes, devices, lists of other files, cover pictures."""

from __future__ import annotations

import os
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from data.audio import decode_audio
from data.video.images import decode_image, probe_image
from data.video.index_store import index_video
from data.video.pixels import CpuVideoDecoder, read_frames
from megatron_rl.errors import VideoDecodeError
from tests.video_files import Kind, full_decode, picture, with_cover, with_sound, write_video


@pytest.fixture(scope="module")
def film(tmp_path_factory) -> str:
    return write_video(tmp_path_factory.mktemp("film") / "a.mp4", Kind("libx264", {"g": "15", "bf": "2"}), 40)


# ----------------------------------------------------------------------------------------------------- cover pictures


def children(box: bytes) -> list[bytes]:
    """The boxes in the content of a box."""
    found = []
    while box:
        size = int.from_bytes(box[:4], "big")
        found.append(box[:size])
        box = box[size:]
    return found


def cover_first(path: str) -> str:
    """As some shops write it: in `moov`, `udta` with the cover before the tracks. No offset changes."""
    content = Path(path).read_bytes()
    boxes = children(content)
    moov = next(box for box in boxes if box[4:8] == b"moov")
    parts = children(moov[8:])
    parts.sort(key=lambda part: [b"mvhd", b"udta"].index(part[4:8]) if part[4:8] in (b"mvhd", b"udta") else 2)
    Path(path).write_bytes(content.replace(moov, moov[:8] + b"".join(parts)))
    return path


@pytest.mark.parametrize("container", ["mp4", "mkv", "cover_first.mp4"])
def test_the_film_is_found_wherever_a_cover_picture_stands(film, tmp_path, container):
    path = with_cover(film, tmp_path / f"a.{container}")
    if container == "cover_first.mp4":
        cover_first(path)
    with av.open(path) as opened:
        sizes = [stream.width for stream in opened.streams.video]
    assert len(sizes) == 2 and (container == "mp4") == (sizes[0] == 96)
    assert np.array_equal(read_frames(path, list(range(40))), full_decode(film))


def test_sound_with_a_cover_picture_is_no_video(tmp_path, film):
    with_music = with_sound(film, tmp_path / "film.mp4", "aac")
    path = tmp_path / "song.mp4"
    with av.open(with_music) as given, av.open(str(path), "w") as container:
        music = container.add_stream_from_template(given.streams.audio[0])
        still = container.add_stream("mjpeg", rate=25)
        still.width, still.height, still.pix_fmt = 32, 32, "yuvj420p"
        still.disposition = av.stream.Disposition.attached_pic
        frame = av.VideoFrame.from_ndarray(picture(0, (32, 32)), format="rgb24").reformat(format="yuvj420p")
        container.mux([*still.encode(frame), *still.encode(None)])
        for packet in given.demux(given.streams.audio[0]):
            if packet.size:
                packet.stream = music
                container.mux(packet)
    with pytest.raises(VideoDecodeError, match="no video stream .only a cover picture, audio"):
        index_video(str(path))
    assert len(decode_audio(str(path))) > 16_000 * 3


# ------------------------------------------------------------------------------------------------- what is no film


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "empty", "missing"])
def test_only_ordinary_files_are_opened(tmp_path, kind):
    """A pipe that nobody writes to would be waited for, for ever."""
    path = str(tmp_path / "x.png")
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path = "/dev/zero"
    elif kind == "folder":
        os.mkdir(path)
    elif kind == "empty":
        Path(path).touch()
    why = {"pipe": "not a file", "device": "not a file", "folder": "Is a directory", "empty": "0 bytes"}
    decoder = CpuVideoDecoder(1)
    readers = (probe_image, lambda p: decode_image(p, 1, (28, 28)), index_video, decode_audio, decoder.probe)
    for read in readers:
        with pytest.raises(VideoDecodeError, match=why.get(kind, "No such file")):
            read(path)


LISTS = {
    "concat.mp4": "ffconcat version 1.0\nfile {name}\nfile {name}\n",
    "concat_of_a_pipe.mp4": "ffconcat version 1.0\nfile pipe\n",
    "hls.mp4": "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n{name}\n#EXT-X-ENDLIST\n",
    "hls.m3u8": "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n{name}\n#EXT-X-ENDLIST\n",
    "dash.mpd": '<?xml version="1.0"?>\n<MPD xmlns="urn:mpeg:dash:schema:mpd:2011"></MPD>',
    "session.sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 1234 RTP/AVP 96\n",
    "subtitles.idx": "# VobSub index file, v7 (do not modify this line!)\n",
}


@pytest.mark.parametrize("name", LISTS)
def test_a_list_of_other_files_is_no_video_and_none_of_them_is_opened(film, tmp_path, name):
    (tmp_path / "a.mp4").write_bytes(Path(film).read_bytes())
    os.mkfifo(tmp_path / "pipe")
    path = tmp_path / name
    path.write_text(LISTS[name].format(name="a.mp4"))
    for read in (index_video, decode_audio):
        with pytest.raises(VideoDecodeError, match="a list of other files, not a video"):
            read(str(path))


def test_libavformat_itself_would_play_the_list(film, tmp_path):
    """The list of allowed formats is needed no longer once this fails."""
    (tmp_path / "a.mp4").write_bytes(Path(film).read_bytes())
    path = tmp_path / "list.mp4"
    path.write_text(LISTS["concat.mp4"].format(name="a.mp4"))
    assert len(full_decode(str(path))) == 80


def test_a_picture_whose_name_stands_for_others(tmp_path):
    for name in ("a%d.jpg", "a1.jpg", "a2.jpg", "b.jpg"):
        Image.new("RGB", (64, 64)).save(tmp_path / name)
    with pytest.raises(VideoDecodeError, match="whose name .with a %. stands for others"):
        index_video(str(tmp_path / "a%d.jpg"))
    assert index_video(str(tmp_path / "b.jpg")).num_frames == 1


def test_an_animated_webp_says_what_to_do(tmp_path):
    path = tmp_path / "a.webp"
    others = [Image.fromarray(picture(number)) for number in (4, 8)]
    Image.fromarray(picture(0)).save(path, save_all=True, append_images=others)
    with pytest.raises(VideoDecodeError, match="a WebP animation, which FFmpeg cannot play; convert it to mp4"):
        index_video(str(path))


# ------------------------------------------------------------------------------------------------------ odd containers


def test_a_container_without_keyframe_flags_starts_at_its_first_picture(tmp_path):
    source, path = write_video(tmp_path / "a.mp4", Kind("libx264", {"g": "100", "bf": "0"}), 30), tmp_path / "a.nut"
    with av.open(source) as given, av.open(str(path), "w") as container:
        stream = container.add_stream_from_template(given.streams.video[0])
        for packet in given.demux(video=0):
            if packet.size:
                packet.stream, packet.is_keyframe = stream, False
                container.mux(packet)
    with av.open(str(path)) as container:
        flags = {packet.is_keyframe for packet in container.demux(video=0) if packet.size}
    assert flags == {False}
    assert np.array_equal(read_frames(str(path), [29, 0, 7]), full_decode(source)[[29, 0, 7]])


def test_pictures_that_change_size_are_scaled_to_the_first(tmp_path):
    """Recordings of calls. As FFmpeg does: by libswscale, to the size of the first picture."""
    parts = [write_video(tmp_path / f"{n}.webm", Kind("libvpx", {"g": "10"}, size=size), 20)
             for n, size in enumerate([(96, 64), (64, 48), (128, 96)])]  # fmt: skip
    path = tmp_path / "call.webm"
    with av.open(parts[0]) as template, av.open(str(path), "w") as container:
        stream = container.add_stream_from_template(template.streams.video[0])
        for number, part in enumerate(parts):
            with av.open(part) as given:
                for packet in given.demux(video=0):
                    if packet.size:
                        packet.pts = packet.dts = packet.pts + number * 800
                        packet.stream = stream
                        container.mux(packet)
    truth = full_decode(str(path), width=96, height=64)
    info = index_video(str(path)).info()
    assert (info.width, info.height, info.num_frames) == (96, 64, 60) and len(truth) == 60
    assert np.array_equal(read_frames(str(path), list(range(0, 60, 3)), 2), truth[::3])


def test_a_header_that_counts_ticks_states_no_rate(tmp_path):
    """A raw DV file: its header says 60,000 frames a second."""
    path = tmp_path / "a.dv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("dvvideo", rate=25)
        stream.width, stream.height, stream.pix_fmt = 720, 576, "yuv420p"
        for number in range(12):
            frame = av.VideoFrame.from_ndarray(picture(number, (720, 576)), format="rgb24").reformat(format="yuv420p")
            frame.pts, frame.time_base = number, Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with av.open(str(path)) as container:
        assert container.streams.video[0].average_rate == 60_000
    assert index_video(str(path)).info().rate == pytest.approx(25)
