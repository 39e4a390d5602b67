# SPDX-License-Identifier: Apache-2.0
"""Still pictures against Pillow and transformers' image processor."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from data.video.images import decode_image, probe_image
from data.video.prefetch import FramePrefetcher, FrameRequest
from megatron_rl.errors import VideoDecodeError
from megatron_rl.runtime.device import define_torchvision_operators
from model_providers.qwen2_5_vl.vision import QwenMediaSpec


@pytest.fixture
def noise() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (75, 110, 3), dtype=np.uint8))


def saved(image: Image.Image, path, **how) -> str:
    image.save(path, **how)
    return str(path)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.bmp", "a.gif"])
def test_formats(tmp_path, noise, name):
    path = saved(noise, tmp_path / name)
    info = probe_image(path)
    assert (info.width, info.height, info.num_frames) == (110, 75, 1) and info.codec.startswith("image/")
    frames = decode_image(path, 2, (75, 110))
    expected = torch.from_numpy(np.asarray(Image.open(path).convert("RGB")).copy()).permute(2, 0, 1)
    assert frames.shape == (2, 3, 75, 110) and torch.equal(frames[0], expected) and torch.equal(frames[1], expected)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1"])
def test_other_colour_modes_become_rgb(tmp_path, noise, mode):
    path = saved(noise.convert(mode), tmp_path / ("a.tiff" if mode == "CMYK" else "a.png"))
    assert decode_image(path, 1, (28, 28)).shape == (1, 3, 28, 28)


def test_sixteen_bits_are_scaled_and_numbers_without_a_range_refused(tmp_path):
    levels = np.arange(0, 1 << 16, 16, dtype=np.uint16).reshape(64, 64)
    deep = decode_image(saved(Image.fromarray(levels), tmp_path / "a.png"), 1, (64, 64))
    assert torch.equal(deep[0], torch.from_numpy((levels // 256).astype(np.uint8)).expand(3, 64, 64))
    for mode in ("I", "F"):
        with pytest.raises(VideoDecodeError, match=f"mode {mode}"):
            decode_image(saved(Image.new(mode, (64, 64)), tmp_path / "a.tiff"), 1, (64, 64))


def transparent(mode: str) -> Image.Image:
    """A black square on transparent black, or half transparent where the mode has room for that."""
    alpha = np.zeros((40, 60), np.uint8)
    alpha[10:30, 20:40] = 255
    if mode == "P":
        image = Image.fromarray(alpha // 255, "L").convert("P")
        image.putpalette([0, 0, 0, 0, 0, 0])
        image.info["transparency"] = 0
        return image
    if mode in ("L", "RGB"):  # one colour stands for nothing
        image = Image.new(mode, (60, 40), 0)
        image.paste(Image.new(mode, (20, 20), 7 if mode == "L" else (7, 7, 7)), (20, 10))
        image.info["transparency"] = 0 if mode == "L" else (0, 0, 0)
        return image
    alpha[35:] = 128
    image = Image.new("RGBA", (60, 40), (0, 0, 0, 0))
    image.putalpha(Image.fromarray(alpha))
    return image.convert(mode)


@pytest.mark.parametrize("name", ["a.png", "a.webp", "a.gif"])
@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "RGB"])
def test_white_stands_behind_what_is_transparent_as_when_served(tmp_path, mode, name):
    if (mode in ("L", "RGB") and name != "a.png") or (name == "a.gif" and mode != "P"):
        name = "b.png"
    define_torchvision_operators()
    from vllm.multimodal.image import convert_image_mode

    image = transparent(mode)
    how = {"lossless": True} if name == "a.webp" else {}
    path = saved(image, tmp_path / name, **how)
    frame = decode_image(path, 1, (40, 60))[0].permute(1, 2, 0).numpy()
    with Image.open(path) as stored:
        assert np.array_equal(frame, np.asarray(convert_image_mode(stored, "RGB")))
    assert (frame[0, 0] == (0 if mode == "RGB" else 255)).all() and (frame[15, 25] <= 7).all()
    if mode in ("RGBA", "LA"):
        assert (frame[38, 5] == 127).all()


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA"])
def test_a_huge_picture_is_resized_in_strips_bit_for_bit(tmp_path, monkeypatch, mode):
    """Against one call of the resize on the whole."""
    rng = np.random.default_rng(1)
    image = Image.fromarray(rng.integers(0, 256, (237, 310, 4), dtype=np.uint8), "RGBA").convert(mode)
    path = saved(image, tmp_path / "a.png")
    for size_hw in ((56, 84), (237, 84), (112, 310), (252, 336)):
        whole = decode_image(path, 1, size_hw)
        monkeypatch.setattr("data.video.images._STRIP_PIXELS", 310 * 50)
        assert torch.equal(decode_image(path, 1, size_hw), whole)
        monkeypatch.undo()


def test_a_huge_grey_picture_takes_little_memory(tmp_path):
    """13,300 x 13,300 in a file of 200 KB: the picture itself, and not ten times that."""
    path = saved(Image.new("L", (13_300, 13_300), 9), tmp_path / "a.png", compress_level=9)
    assert os.path.getsize(path) < 250_000
    code = (
        "import resource, sys; import torch; from data.video.images import decode_image; torch.set_num_threads(1);"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; before = peak();"
        f"frame = decode_image({path!r}, 1, (448, 448)); assert (frame == 9).all(); print((peak() - before) // 1024)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=100)
    assert int(run.stdout) < 500  # MiB


def test_no_other_program_is_started_for_a_picture(tmp_path, noise):
    path = saved(noise, tmp_path / "a.eps")
    with pytest.raises(VideoDecodeError, match="not a readable image: cannot identify"):
        probe_image(path)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_the_picture_upright(tmp_path, noise, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(noise, tmp_path / "a.png", exif=exif)
    info = probe_image(path)
    shown = {
        1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1],
        5: lambda a: a.swapaxes(0, 1), 6: lambda a: np.rot90(a, -1), 7: lambda a: a.swapaxes(0, 1)[::-1, ::-1],
        8: lambda a: np.rot90(a),
    }[orientation](np.asarray(noise))  # fmt: skip
    assert (info.height, info.width) == shown.shape[:2]
    assert np.array_equal(decode_image(path, 1, shown.shape[:2])[0].permute(1, 2, 0).numpy(), shown)


def test_patches_and_grid_are_those_of_transformers_image_processor(tmp_path, noise):
    define_torchvision_operators()
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor

    low, high = 56 * 56, 112 * 112
    processor = Qwen2VLImageProcessor(size={"shortest_edge": low, "longest_edge": high})
    theirs = processor(images=[noise], return_tensors="pt")
    spec = QwenMediaSpec(
        14, 2, 2, low, high, 0, {}, tuple(processor.image_mean), tuple(processor.image_std)
    )  # fmt: skip
    path = saved(noise, tmp_path / "a.png")
    info = probe_image(path)
    patches, grid = spec.patchify(decode_image(path, 2, spec.size_hw(2, info.height, info.width)))
    assert theirs["image_grid_thw"].tolist() == [list(grid)]
    torch.testing.assert_close(patches, theirs["pixel_values"], rtol=0, atol=1e-5)


def test_bad_images_name_their_reason(tmp_path, noise):
    whole = saved(noise, tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(data[: len(data) // 2])
    (tmp_path / "text.png").write_bytes(b"hello")
    (tmp_path / "empty.png").touch()
    assert probe_image(whole).width == 110
    for name in ("cut.png", "text.png", "empty.png", "gone.png"):
        why = {"empty.png": "empty", "gone.png": "No such file"}.get(name, "not a readable image: ")
        with pytest.raises(VideoDecodeError, match=why) as refused:
            decode_image(str(tmp_path / name), 2, (28, 28))
        assert refused.value.source == str(tmp_path / name)


def test_mutated_images_give_a_picture_or_a_reason(tmp_path, noise):
    rng = np.random.default_rng(1)
    for name in ("a.png", "a.jpg", "a.webp", "a.gif"):
        saved(noise, tmp_path / name)
        data = np.frombuffer((tmp_path / name).read_bytes(), np.uint8)
        for number in range(60):
            changed = data.copy()
            changed[rng.integers(0, len(data), 20)] = rng.integers(0, 255, 20)
            path = tmp_path / f"{number}{name}"
            path.write_bytes(changed.tobytes())
            try:
                assert decode_image(str(path), 1, (28, 28)).shape == (1, 3, 28, 28)
            except VideoDecodeError as error:
                assert error.source == str(path)


def test_images_are_made_ready_like_videos(tmp_path, noise):
    request = FrameRequest(saved(noise, tmp_path / "a.png"), (0, 0), (28, 56), kind="image")
    prefetcher = FramePrefetcher(decoder=None, budget_bytes=1 << 20)
    prefetcher.ask([request])
    assert torch.equal(prefetcher.take(request), decode_image(request.path, 2, (28, 56)))
