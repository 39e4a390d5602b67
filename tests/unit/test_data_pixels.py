# SPDX-License-Identifier: Apache-2.0
"""Colour against the formulas of the standards, rotation against the picture, resizing against transformers."""

from __future__ import annotations

import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from data.video.pixels import CpuVideoDecoder, read_frames
from megatron_rl.runtime.device import define_torchvision_operators
from tests.video_files import HEIGHT, KINDS, NUM_FRAMES, WIDTH, Kind, full_decode, turned, write_kind, write_video

SMOOTH = Kind("libx264", {"g": "15", "crf": "1"}, "yuv444p")
LUMA = {"bt601": (0.299, 0.114), "bt709": (0.2126, 0.0722), "bt2020": (0.2627, 0.0593)}
TAGS = {"bt601": 6, "bt709": 1, "bt2020": 9, "untagged": 2}


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("videos")
    return {
        name: write_kind(folder, name) for name in ("h264_open_gop.mp4", "vp9.webm", "vp9_odd.mp4", "hevc_10bit.mp4")
    }


# ------------------------------------------------------------------------------------------------------------- colour


def tagged(folder: Path, matrix: str, full_range: bool) -> str:
    """A film of flat grey-blue-red planes with these tags; what the planes hold is known."""
    path = folder / f"{matrix}_{full_range}.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"crf": "0", "g": "5"})
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuvj444p" if full_range else "yuv444p"
        stream.codec_context.colorspace = TAGS[matrix]
        stream.codec_context.color_range = 2 if full_range else 1
        for _ in range(5):
            frame = av.VideoFrame(32, 32, "yuvj444p" if full_range else "yuv444p")
            for plane, value in zip(frame.planes, YUV, strict=True):
                plane.update(np.full(plane.buffer_size, value, np.uint8).tobytes())
            frame.colorspace, frame.color_range = TAGS[matrix], 2 if full_range else 1
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return str(path)


YUV = (120, 90, 190)


@pytest.mark.parametrize("full_range", [False, True])
@pytest.mark.parametrize("matrix", TAGS)
def test_colours_are_those_of_the_stream_s_tags(tmp_path, matrix, full_range):
    """ITU-R BT.601, BT.709, BT.2020; without a tag BT.601. libswscale rounds by up to 2 of 255."""
    (rgb,) = read_frames(tagged(tmp_path, matrix, full_range), [3])
    red, blue = LUMA.get(matrix, LUMA["bt601"])
    y, cb, cr = (float(value) for value in YUV)
    if full_range:
        luma, cb, cr = y, cb - 128, cr - 128
    else:
        luma, cb, cr = (y - 16) * 255 / 219, (cb - 128) * 255 / 224, (cr - 128) * 255 / 224
    r, b = luma + 2 * (1 - red) * cr, luma + 2 * (1 - blue) * cb
    g = (luma - red * r - blue * b) / (1 - red - blue)
    assert np.abs(rgb.astype(float) - np.array([r, g, b])).max() <= 2


# ----------------------------------------------------------------------------------------------------------- rotation


@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
def test_turned_videos_are_shown_upright(tmp_path, degrees):
    """PyAV's set_display_rotation turns counterclockwise, as np.rot90 does."""
    path = turned(tmp_path, degrees)
    with av.open(path) as container:
        assert next(container.decode(video=0)).rotation % 360 == degrees
    expected = np.rot90(full_decode(str(tmp_path / "upright.mp4")), degrees // 90, axes=(1, 2))
    assert np.array_equal(read_frames(path, list(range(20)), 2), expected)
    shown = (HEIGHT, WIDTH) if degrees % 180 == 0 else (WIDTH, HEIGHT)
    assert CpuVideoDecoder(1).decode(str(path), [7], shown)[0].permute(1, 2, 0).equal(torch.tensor(expected[7].copy()))


# ------------------------------------------------------------------------------------------------------------- resize


@pytest.fixture(scope="module")
def processor():
    define_torchvision_operators()
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

    return Qwen2VLVideoProcessor()


@pytest.mark.parametrize("size_hw", [(28, 28), (56, 84), (112, 140), (64, 96)])
@pytest.mark.parametrize("name", ["h264_open_gop.mp4", "vp9_odd.mp4", "hevc_10bit.mp4"])
def test_resized_frames_are_bit_equal_to_those_of_the_processor(videos, processor, name, size_hw):
    from transformers.image_utils import PILImageResampling, SizeDict

    indices = [40, 3, 3, 89, 0]
    frames = CpuVideoDecoder(2).decode(videos[name], indices, size_hw)
    whole = torch.from_numpy(full_decode(videos[name])[indices]).permute(0, 3, 1, 2)
    base = super(type(processor), processor)
    expected = base.resize(whole, SizeDict(height=size_hw[0], width=size_hw[1]), PILImageResampling.BICUBIC)
    assert frames.dtype == torch.uint8 and frames.shape == (5, 3, *size_hw) and frames.is_contiguous()
    assert torch.equal(frames, expected)


def test_two_videos_in_turn_keep_their_own_size(videos):
    """One video's size never becomes another's."""
    decoder = CpuVideoDecoder(1)
    for _ in range(2):
        for name, size_hw in (("h264_open_gop.mp4", (28, 56)), ("vp9_odd.mp4", (84, 28))):
            frames = decoder.decode(videos[name], [1, 2], size_hw)
            assert frames.shape == (2, 3, *size_hw)
            assert decoder.probe(videos[name]).width == KINDS[name].size[0]


@pytest.mark.full
def test_8192_frames_take_little_more_memory_than_they_have_themselves(tmp_path):
    """At 112x112 they are 294 MiB; the whole process stays below 0.6 GiB."""
    how = Kind("libx264", {"preset": "ultrafast", "g": "30"}, size=(160, 120))
    path = write_video(tmp_path / "long.mp4", how, 8192)
    code = (
        "import sys; from data.video.pixels import CpuVideoDecoder;"
        "out = CpuVideoDecoder(2).decode(sys.argv[1], range(8192), (112, 112));"
        # Not ru_maxrss, which a process inherits from the one that started it.
        "[peak] = [line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')];"
        "print(out.numel() // 2**20, int(peak) // 1024)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", code, path], capture_output=True, text=True, timeout=300, env=environment, check=True
    )
    size, peak = map(int, done.stdout.split())
    assert size == 294 and peak < 614, done.stdout


def test_memory_does_not_grow_with_the_number_of_full_size_frames(videos):
    """What Python and NumPy allocate while 90 frames are decoded, the output apart: less than two full-size frames."""
    decoder = CpuVideoDecoder(1)
    path, frames = videos["h264_open_gop.mp4"], list(range(NUM_FRAMES))
    decoder.decode(path, frames, (28, 28))
    tracemalloc.start()
    decoder.decode(path, frames, (28, 28))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * HEIGHT * WIDTH * 3 + 60_000
