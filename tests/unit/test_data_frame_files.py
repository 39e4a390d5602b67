# SPDX-License-Identifier: Apache-2.0
"""A video as its frames: a list of pictures, or a folder of them, against the same pictures in an mp4."""

from __future__ import annotations

import json
import os
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from data.rows.dataset import DataSet, read_rows
from data.rows.loader import fingerprint
from data.video.frame_files import FrameFilesDecoder, frames_in, shown_path
from data.video.frames import FrameSettings, choose_frames, seconds_per_grid
from data.video.images import decode_image
from data.video.pixels import CpuVideoDecoder
from megatron_rl.errors import VideoDecodeError

NUM_FRAMES, FPS = 12, 4


@pytest.fixture
def pictures(tmp_path) -> list[np.ndarray]:
    """f1.png to f12.png in the folder `clip`, whose names sort wrongly as text."""
    (tmp_path / "clip").mkdir()
    made = [np.full((32, 48, 3), 20 * number, np.uint8) for number in range(NUM_FRAMES)]
    for number, picture in enumerate(made, start=1):
        Image.fromarray(picture).save(tmp_path / f"clip/f{number}.png")
    return made


def read(tmp_path: Path, **fields: object) -> DataSet:
    (tmp_path / "a.jsonl").write_text(json.dumps({"problem": "p", "answer": "a", **fields}))
    [found] = read_rows(str(tmp_path / "a.jsonl"), "", tmp_path / "run/media")
    return found


def path_of(tmp_path: Path, **fields: object) -> str:
    found = read(tmp_path, **fields)
    assert not found.bad, found.bad
    [path] = found.rows[0].videos
    return path


def decoder() -> FrameFilesDecoder:
    return FrameFilesDecoder(CpuVideoDecoder(1))


NAMES = [f"clip/f{number}.png" for number in range(1, NUM_FRAMES + 1)]


@pytest.mark.parametrize("settings", [FrameSettings(4), FrameSettings(0, 2.0), FrameSettings(0, 2.0, rule="processor")])
def test_the_same_frames_as_of_an_mp4(tmp_path, pictures, settings):
    film = tmp_path / "film.mp4"
    with av.open(str(film), "w") as container:
        stream = container.add_stream("mpeg4", rate=FPS)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        container.mux(stream.encode(None))
    of_film = decoder().probe(str(film))
    for path in (path_of(tmp_path, videos=[NAMES], fps=FPS), path_of(tmp_path, video="clip", fps=FPS)):
        info = decoder().probe(path)
        assert (info.width, info.height, info.timestamps) == (48, 32, of_film.timestamps)
        for family in ("stride", "linspace"):
            chosen = choose_frames(info, settings, 2, family)
            assert chosen == choose_frames(of_film, settings, 2, family)
            assert seconds_per_grid(info, chosen, 2) == seconds_per_grid(of_film, chosen, 2)


def test_pixels_are_those_of_the_pictures(tmp_path, pictures):
    path = path_of(tmp_path, videos=[NAMES])
    frames = decoder().decode(path, (11, 0, 3, 3), (16, 24))
    assert frames.shape == (4, 3, 16, 24) and [int(frame[0, 0, 0]) for frame in frames] == [220, 0, 60, 60]
    alone = decode_image(str(tmp_path / "clip/f4.png"), 1, (16, 24))[0]
    assert (frames[2] == alone).all()


def test_rates(tmp_path, pictures):
    """That of the medium, else the row's, else 2 a second."""
    for fields, seconds in (
        ({"videos": [NAMES]}, 0.5),
        ({"videos": [NAMES], "fps": 8}, 0.125),
        ({"videos": {"video": NAMES, "fps": 1}, "fps": 8}, 1.0),
    ):
        assert decoder().probe(path_of(tmp_path, **fields)).timestamps[1] == seconds
    assert "a rate is above 0" in read(tmp_path, videos=[NAMES], fps=0).bad[0].reason
    assert "only a list of frames may have" in read(tmp_path, videos={"path": "a.mp4", "fps": 2}).bad[0].reason
    assert read(tmp_path, videos="a.mp4", fps="30 fps").unused_columns == ("fps",)


def test_names_with_numbers_are_in_the_order_of_the_numbers(tmp_path, pictures):
    (tmp_path / "clip/readme.txt").touch()
    assert [Path(path).name for path in frames_in(str(tmp_path / "clip"))] == [Path(name).name for name in NAMES]
    assert shown_path(path_of(tmp_path, videos="clip")) == str(tmp_path / "clip")
    (tmp_path / "none").mkdir()
    assert "holds no pictures" in read(tmp_path, videos="none").bad[0].reason


def test_another_picture_is_another_video_and_the_same_data_set(tmp_path, pictures):
    """The path tells them apart where embeddings are kept; a run may still resume."""
    before = read(tmp_path, videos=[NAMES])
    os.utime(tmp_path / "clip/f3.png", ns=(1, 1))
    after = read(tmp_path, videos=[NAMES])
    assert before.rows[0].videos != after.rows[0].videos and fingerprint(before.rows) == fingerprint(after.rows)
    assert fingerprint(read(tmp_path, videos=[NAMES[:-1]]).rows) != fingerprint(before.rows)


def test_faults_of_pictures_are_those_of_media(tmp_path, pictures):
    path = path_of(tmp_path, videos=[[*NAMES[:3], "gone.png"]])
    with pytest.raises(VideoDecodeError, match="gone.png"):
        decoder().decode(path, (0, 3), (16, 24))
    with pytest.raises(VideoDecodeError, match="gone.png"):
        decoder().probe(path_of(tmp_path, videos=[["gone.png"]]))
    Image.new("RGB", (10, 10)).save(tmp_path / "small.png")
    with pytest.raises(VideoDecodeError, match=r"is \(10, 10\) pixels, the first frame \(48, 32\)"):
        decoder().decode(path_of(tmp_path, videos=[[NAMES[0], "small.png"]]), (0, 1), (16, 24))
    with pytest.raises(VideoDecodeError, match="No such file|cannot be read"):
        decoder().probe(str(tmp_path / "gone.mp4"))
