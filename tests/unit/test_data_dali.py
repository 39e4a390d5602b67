# SPDX-License-Identifier: Apache-2.0
"""The DALI pipeline on the codecs that it decodes without a GPU, against libavcodec and torch."""

from __future__ import annotations

import io
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from data.video.clip import clip_parts, cut_clip
from data.video.dali import DaliVideoDecoder, recolour
from data.video.gop_plan import plan_runs
from data.video.index_store import index_video
from data.video.pixels import CpuVideoDecoder, read_frames
from megatron_rl.errors import VideoDecodeError
from tests.unit.test_data_pixels import tagged
from tests.video_files import NUM_FRAMES, full_decode, write_kind

NATIVE = ["vp9.webm", "vp8.webm", "vp9_hidden.webm", "mjpeg.mkv", "vp9_odd.mp4"]
OTHERS = [
    "h264_bframes.mp4",
    "h264_open_gop.mp4",
    "h264_open_gop.ts",
    "hevc_open_gop.mkv",
    "av1.mp4",
    "h264_vfr.mkv",
    "h264_bframes.avi",
    "mpeg2.mpg",
]
LIKE_DALI = {"src_colorspace": 5, "dst_colorspace": 5, "interpolation": 2 | 0x2000 | 0x40000}


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("videos")
    return {name: write_kind(folder, name) for name in NATIVE + OTHERS}


@pytest.fixture(scope="module")
def decoder() -> DaliVideoDecoder:
    return DaliVideoDecoder("cpu", 1)


@pytest.mark.parametrize("name", NATIVE + OTHERS)
def test_a_clip_holds_the_wanted_frames_where_it_says_and_no_packet_too_much(videos, name):
    index, truth = index_video(videos[name]), full_decode(videos[name])
    rng = np.random.default_rng(1)
    for count in (1, 4, 15, 60):
        wanted = index.sorted_unique(rng.permutation(NUM_FRAMES)[:count].tolist())
        found: list[int] = []
        for runs in clip_parts(index, plan_runs(index, wanted), room=10):
            clip = cut_clip(index, runs)
            with av.open(io.BytesIO(clip.data.tobytes())) as container:
                frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
            assert len(frames) == clip.num_frames <= sum(run.num_decoded for run in runs)
            assert all(np.array_equal(frames[p], truth[f]) for f, p in zip(clip.frames, clip.positions, strict=True))
            found += clip.frames
        assert sorted(found) == wanted


@pytest.mark.parametrize("size_hw", [(28, 28), (56, 84), (112, 140)])
@pytest.mark.parametrize("name", NATIVE)
def test_frames_are_those_of_libavcodec_resized_by_torch(videos, decoder, name, size_hw):
    """Tolerance: mean 0.3 of 255, of which rounding to uint8 makes 0.25; max 6, at pixels on sharp edges."""
    indices = [40, 3, 3, 89, 0]
    frames = decoder.decode(videos[name], indices, size_hw)
    assert frames.dtype == torch.uint8 and frames.shape == (5, 3, *size_hw)
    pixels = torch.from_numpy(full_decode(videos[name], **LIKE_DALI)[indices]).permute(0, 3, 1, 2).float()
    expected = torch.nn.functional.interpolate(pixels, size_hw, mode="bicubic", antialias=True).clamp(0, 255)
    error = (frames.float() - expected).abs()
    assert error.mean() <= 0.3 and error.max() <= 6


@pytest.mark.parametrize("name", ["vp9.webm", "vp8.webm"])
def test_how_far_it_is_from_the_processor_s_pixels(videos, decoder, name):
    """CpuVideoDecoder gives the processor's. DALI smooths colour between pixels where libswscale repeats it, and rounds
    the resize once: mean 2 of 255 on this picture, whose colours change from pixel to pixel."""
    indices = list(range(0, 90, 9))
    exact = CpuVideoDecoder(1).decode(videos[name], indices, (56, 84)).float()
    assert (decoder.decode(videos[name], indices, (56, 84)).float() - exact).abs().mean() <= 2


def test_a_video_in_several_calls_equals_one_in_one(videos, decoder, monkeypatch):
    indices = [70, *range(0, 90, 4), 70]
    whole = decoder.decode(videos["vp9.webm"], indices, (56, 56))
    monkeypatch.setattr("data.video.dali._CALL_BYTES", 5 * 64 * 96 * 3)
    assert torch.equal(decoder.decode(videos["vp9.webm"], indices, (56, 56)), whole)


def test_results_survive_later_calls(videos, decoder):
    first = decoder.decode(videos["vp8.webm"], [0, 1], (28, 28))
    copy = first.clone()
    for start in range(2, 12, 2):
        decoder.decode(videos["vp8.webm"], [start, start + 1], (28, 28))
    assert torch.equal(first, copy)


@pytest.mark.parametrize("matrix", ["bt709", "bt2020"])
def test_colours_made_with_bt601_are_made_good(tmp_path, matrix):
    """DALI knows BT.601 only. A 709 picture shown as 601 is far off; after the correction it is within rounding."""
    right = torch.from_numpy(read_frames(tagged(tmp_path, matrix, False), [0])).permute(0, 3, 1, 2)
    as_601 = torch.from_numpy(read_frames(tagged(tmp_path, "bt601", False), [0])).permute(0, 3, 1, 2)
    assert (right.int() - as_601.int()).abs().max() >= 5
    assert (recolour(as_601, matrix).int() - right.int()).abs().max() <= 2
    assert recolour(as_601, "bt601") is as_601


def test_damage_is_an_error_and_the_decoder_goes_on(tmp_path, videos, decoder):
    data = bytearray(Path(videos["vp9.webm"]).read_bytes())
    with av.open(videos["vp9.webm"]) as container:
        packet = [p for p in container.demux(video=0) if p.size][17]
    start = data.find(bytes(packet))
    data[start : start + 3] = b"\xff\xff\xff"
    path = tmp_path / "damaged.webm"
    path.write_bytes(data)
    with pytest.raises(VideoDecodeError, match="DALI cannot decode this vp9 video"):
        decoder.decode(str(path), list(range(20)), (28, 28))
    assert decoder.decode(videos["vp9.webm"], [0, 1, 2], (28, 28)).shape == (3, 3, 28, 28)


def test_dali_still_has_no_h264_on_the_cpu(videos, decoder):
    """If this fails, DALI's CPU build decodes H.264 again and can be measured against libavcodec."""
    with pytest.raises(VideoDecodeError, match="DALI cannot decode this h264 video"):
        decoder.decode(videos["h264_bframes.mp4"], [0], (28, 28))


@pytest.mark.parametrize("indices", [[NUM_FRAMES], [-1], [0, 500]])
def test_an_index_the_video_does_not_have_is_an_error(videos, decoder, indices):
    with pytest.raises(VideoDecodeError, match=f"asked for, it has {NUM_FRAMES}"):
        decoder.decode(videos["vp9.webm"], indices, (28, 28))
