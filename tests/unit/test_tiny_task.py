# SPDX-License-Identifier: Apache-2.0
"""The quick start's data and checkpoint: real video files, answerable from the pixels and from nothing else."""

from __future__ import annotations

import collections
import hashlib
import json
from pathlib import Path

import av
import numpy as np
import pytest
from av.video.frame import PictureType

from scripts.make_videos import COLOURS, NOISE, NUM_FRAMES, make_dataset


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("videos")
    make_dataset(out, num_train=32, num_eval=16, seed=7)
    return out


def _rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _moving_colour(path: Path) -> str:
    """The letter whose colour is nearest to the pixels that the dim background cannot have."""
    with av.open(str(path)) as container:
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]).astype(float)
    bright = frames[frames.max(-1) > NOISE + 80].mean(0)
    return min(COLOURS, key=lambda letter: float(np.abs(bright - COLOURS[letter]).sum()))


@pytest.mark.parametrize("split", ["train", "eval"])
def test_answers_are_what_the_pixels_show_and_balanced(dataset: Path, split: str) -> None:
    rows = _rows(dataset / f"{split}.jsonl")
    assert [_moving_colour(dataset / row["videos"][0]) for row in rows] == [row["answer"] for row in rows]
    counts = collections.Counter(row["answer"] for row in rows)
    assert set(counts) == set(COLOURS) and len(set(counts.values())) == 1
    assert len({row["problem"] for row in rows}) == 1, "the question must not give the answer away"


def test_half_is_h264_with_b_frames_and_half_vp9(dataset: Path) -> None:
    codecs: collections.Counter[str] = collections.Counter()
    for row in _rows(dataset / "train.jsonl"):
        with av.open(str(dataset / row["videos"][0])) as container:
            codec = container.streams.video[0].codec_context.name
            kinds = [PictureType(frame.pict_type).name for frame in container.decode(video=0)]
            assert container.format.name.startswith("mov,mp4")
        assert len(kinds) == NUM_FRAMES
        assert ("B" in kinds) == (codec == "h264")
        codecs[f"{codec} {row['answer']}"] += 1
    assert codecs == {f"{codec} {letter}": 4 for codec in ("h264", "vp9") for letter in COLOURS}


def test_warmup_has_the_training_videos_with_uninformative_answers(dataset: Path) -> None:
    train, warmup = _rows(dataset / "train.jsonl"), _rows(dataset / "warmup.jsonl")
    assert [row["videos"] for row in warmup] == [row["videos"] for row in train]
    agreement = np.mean([a["answer"] == b["answer"] for a, b in zip(train, warmup, strict=True)])
    assert agreement < 0.6 and {row["answer"] for row in warmup} == set(COLOURS)


def test_splits_share_no_video_and_the_seed_decides_everything(dataset: Path, tmp_path: Path) -> None:
    make_dataset(tmp_path / "again", num_train=32, num_eval=16, seed=7)
    make_dataset(tmp_path / "other", num_train=32, num_eval=16, seed=8)

    def digests(folder: Path) -> dict[str, str]:
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

    first, again, other = digests(dataset), digests(tmp_path / "again"), digests(tmp_path / "other")
    assert first == again
    assert not set(first.values()) & set(other.values())
    assert len(set(first.values())) == len(first)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from scripts.make_tiny_checkpoint import write_checkpoint

    out = tmp_path_factory.mktemp("checkpoint") / "tiny"
    write_checkpoint(out, seed=3)
    return out


def test_tokenizer_is_byte_level_and_knows_the_specials(checkpoint: Path) -> None:
    from transformers import AutoConfig, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    text = "Grün 色 <a>\n"
    assert len(tokenizer.encode(text)) == len(text.encode())
    assert tokenizer.decode(tokenizer.encode(text)) == text
    config = AutoConfig.from_pretrained(checkpoint)
    assert tokenizer.convert_ids_to_tokens(config.video_token_id) == "<|video_pad|>"
    assert tokenizer.convert_ids_to_tokens(config.vision_start_token_id) == "<|vision_start|>"
    assert len(tokenizer) <= config.text_config.vocab_size


def test_chat_template_places_one_video_placeholder(checkpoint: Path) -> None:
    from transformers import AutoTokenizer

    messages = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "Which?"}]}]
    rendered = AutoTokenizer.from_pretrained(checkpoint).apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    assert rendered == (
        "<|im_start|>user\n<|vision_start|><|video_pad|><|vision_end|>Which?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_transformers_answers_about_a_video(checkpoint: Path) -> None:
    import torch
    from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration

    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(checkpoint)
    processor = AutoProcessor.from_pretrained(checkpoint)
    video = torch.randint(0, 255, (4, 3, 56, 56), dtype=torch.uint8)
    inputs = processor(
        text=["<|vision_start|><|video_pad|><|vision_end|>Which?"],
        videos=[video],
        videos_kwargs={"do_sample_frames": False},
        return_tensors="pt",
    )
    assert inputs["video_grid_thw"].tolist() == [[2, 4, 4]]
    assert int((inputs["input_ids"] == model.config.video_token_id).sum()) == 2 * 2 * 2
    with torch.no_grad():
        logits = model(**inputs).logits
    assert logits.shape[-1] == model.config.text_config.vocab_size and bool(torch.isfinite(logits).all())


def test_checkpoint_is_replaced_whole_and_follows_its_seed(checkpoint: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    from scripts.make_tiny_checkpoint import write_checkpoint

    out = tmp_path / "tiny"
    out.mkdir()
    (out / "left_over.txt").write_text("old")
    write_checkpoint(out, seed=3)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"] and not (out / "left_over.txt").exists()
    first, again = load_file(checkpoint / "model.safetensors"), load_file(out / "model.safetensors")
    assert first.keys() == again.keys() and all(first[name].equal(again[name]) for name in first)
    write_checkpoint(out, seed=4)
    assert not load_file(out / "model.safetensors")["lm_head.weight"].equal(first["lm_head.weight"])
