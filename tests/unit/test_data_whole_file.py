# SPDX-License-Identifier: Apache-2.0
"""Cut files with sound, in every container that tells: never the frames that are left, without a word."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from data.audio import decode_audio
from data.video.index_store import index_video
from data.video.whole_file import missing_bytes
from megatron_rl.errors import VideoDecodeError
from tests.video_files import Kind, full_decode, with_sound, write_video

H264, VP8 = Kind("libx264", {"g": "15", "bf": "0"}), Kind("libvpx", {"g": "15"})
FRAGMENTED = {"movflags": "frag_keyframe+empty_moov+default_base_moof"}
FRONT = {"movflags": "faststart"}
FILMS = {
    "mkv": (H264, "aac", {}), "webm": (VP8, "libopus", {}), "mp4": (H264, "aac", FRONT), "mov": (H264, "aac", FRONT),
    "frag.mp4": (H264, "aac", FRAGMENTED), "3gp": (H264, "aac", FRONT), "flv": (H264, "aac", {}),
    "ts": (H264, "aac", {}), "ogv": (VP8, "flac", {}), "avi": (Kind("mpeg4", {"g": "15"}), "mp2", {}),
    "wmv": (Kind("wmv2", {"g": "15"}), "wmav2", {}),
}  # fmt: skip


@pytest.fixture(scope="module")
def films(tmp_path_factory) -> dict[str, str]:
    folder, made = tmp_path_factory.mktemp("films"), {}
    for ending, (kind, codec, options) in FILMS.items():
        container = {"libvpx": "webm", "libx264": "mp4"}.get(kind.codec, "avi")
        picture = write_video(folder / f"picture_{kind.codec}.{container}", kind, 100)
        made[ending] = with_sound(picture, folder / f"film.{ending}", codec, options)
    return made


def first_part(source: str, target: Path, length: int) -> str:
    target.write_bytes(Path(source).read_bytes()[:length])
    return str(target)


@pytest.mark.parametrize("ending", FILMS)
def test_a_cut_film_with_sound_is_truncated(films, tmp_path, ending):
    """At ten random places, the last bytes among them; whole, it has all its frames."""
    path, size = films[ending], Path(films[ending]).stat().st_size
    assert index_video(path).num_frames == 100 == len(full_decode(path))
    assert missing_bytes(path) == 0
    least = size // 3 if ending != "flv" else size // 4
    for place in np.random.default_rng(0).integers(least, size * 98 // 100, 10).tolist():
        place += 1 if place % 188 == 0 else 0  # a transport stream that ends with a packet cannot be told
        cut = first_part(path, tmp_path / f"cut_{place}.{ending}", place)
        with pytest.raises(VideoDecodeError, match="truncated: the data ends after"):
            index_video(cut)


@pytest.mark.parametrize("ending", ["mkv", "webm"])
def test_matroska_without_the_tags_that_other_muxers_write_at_the_end(films, tmp_path, ending):
    content = Path(films[ending]).read_bytes()
    assert b"DURATION" in content
    path = tmp_path / f"a.{ending}"
    path.write_bytes(content.replace(b"DURATION", b"ATTRIBUT"))
    assert index_video(str(path)).num_frames == 100
    with pytest.raises(VideoDecodeError, match="truncated: the data ends after 2"):
        index_video(first_part(str(path), tmp_path / f"cut.{ending}", len(content) // 2))


def test_a_fragment_that_is_cut_where_it_holds_sound(films, tmp_path):
    content = Path(films["frag.mp4"]).read_bytes()
    second = content.index(b"mdat", content.index(b"mdat") + 4)
    end = second - 4 + int.from_bytes(content[second - 4 : second], "big")
    for place in (end - 1, (second + end) // 2, second + 5):
        with pytest.raises(VideoDecodeError, match="bytes that its container states are missing"):
            index_video(first_part(films["frag.mp4"], tmp_path / f"{place}.mp4", place))
        assert missing_bytes(str(tmp_path / f"{place}.mp4")) == end - place
    assert index_video(first_part(films["frag.mp4"], tmp_path / "between.mp4", end)).num_frames < 100  # cannot be told


def test_a_live_recording_states_no_size(tmp_path):
    """Matroska written to a pipe: its size is unknown, which is no damage."""
    source = write_video(tmp_path / "a.webm", VP8, 30)
    content = bytearray(Path(source).read_bytes())
    at = content.index(bytes.fromhex("18538067")) + 4
    content[at : at + 8] = bytes.fromhex("01ffffffffffffff")
    Path(source).write_bytes(content)
    assert missing_bytes(source) == 0
    assert index_video(source).num_frames == 30


@pytest.mark.parametrize("ending", ["mkv", "ogv", "frag.mp4", "avi"])
def test_cut_sound_is_refused_where_the_container_tells(films, tmp_path, ending):
    size = Path(films[ending]).stat().st_size
    cut = first_part(films[ending], tmp_path / f"cut.{ending}", size * 2 // 3 + 1)
    with pytest.raises(VideoDecodeError, match=r"truncated|its sound is cut"):
        decode_audio(cut)
