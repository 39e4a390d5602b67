# SPDX-License-Identifier: Apache-2.0
"""Prompts from rows, with a byte-level tokenizer (one token a byte), so that expected ids can be written down."""

from __future__ import annotations

import hashlib
import math
import os
from dataclasses import dataclass, replace

import pytest
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from data.rows.manifest import Manifest
from data.rows.prompts import PromptBuilder
from data.video.frames import FrameSettings
from megatron_rl.errors import BadSample, VideoDecodeError
from megatron_rl.protocols import MediaSpecs
from megatron_rl.types import MediaItem, Placeholder, Row, VideoInfo

SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|video_pad|>",
    "<|image_pad|>",
]
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for c in m.content %}{% if c.type == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif c.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ c.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
BEFORE, AFTER = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
VIDEO_PAD, IMAGE_PAD = "<|video_pad|>", "<|image_pad|>"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {char: number for number, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    made = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    made.chat_template = CHAT
    return made


class FakeSpec:
    """Patches of 4 pixels, 2 frames, merged 2x2; a frame keeps its size, rounded down to a multiple of 8."""

    patch_size, temporal_patch_size, merge_size = 4, 2, 2
    frame_family = "linspace"

    def __init__(self, pad: int, image_pad: int):
        self.placeholder_ids = {"video": pad, "image": image_pad}

    def size_hw(self, num_frames: int, height: int, width: int) -> tuple[int, int]:
        if width > 50 * height:
            raise ValueError("too wide")
        return height // 8 * 8, width // 8 * 8

    def tokens_per_unit(self, size_hw: tuple[int, int]) -> int:
        return size_hw[0] * size_hw[1] // 64

    def placeholder(self, item: MediaItem, sound: MediaItem | None = None) -> Placeholder:
        assert sound is None
        return Placeholder((self.placeholder_ids[item.kind],) * item.num_tokens, (((0, item.num_tokens),),))


@dataclass
class FakeDecoder:
    width: int = 25
    num_frames: int = 40

    def probe(self, path: str) -> VideoInfo:
        if "bad" in path:
            raise VideoDecodeError(path, "moov lost")
        return VideoInfo(path, "h264", self.width, 16, tuple(n / 10 for n in range(self.num_frames)))


@pytest.fixture
def paths(tmp_path) -> tuple[str, ...]:
    for name in "ab":
        (tmp_path / f"{name}.mp4").write_bytes(name.encode() * 10)
    return str(tmp_path / "a.mp4"), str(tmp_path / "b.mp4")


@pytest.fixture
def make(tokenizer):
    def build(decoder=None, **settings) -> PromptBuilder:
        pad, image_pad = (tokenizer.convert_tokens_to_ids(token) for token in (VIDEO_PAD, IMAGE_PAD))
        defaults = {"frames": FrameSettings(4), "max_prompt_tokens": 500}
        return PromptBuilder(
            settings.pop("tokenizer", tokenizer),
            MediaSpecs(FakeSpec(pad, image_pad)),
            decoder or FakeDecoder(),
            **{**defaults, **settings},
        )

    return build


def row(problem: str, *videos: str) -> Row:
    return Row("train.jsonl:7", problem, "A", videos)


def text(tokenizer, prompt) -> str:
    return tokenizer.decode(prompt.token_ids)


def pads(num: int) -> str:
    return "<|vision_start|>" + VIDEO_PAD * num + "<|vision_end|>"


def test_text_only(make, tokenizer):
    prompt = make().build(3, row("1+1? é"))
    assert text(tokenizer, prompt) == BEFORE + "1+1? é" + AFTER
    assert (prompt.prompt_id, prompt.media) == (3, ())


def test_text_only_works_with_a_template_that_knows_only_strings(make, tokenizer):
    strings_only = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|im_end|>")
    strings_only.chat_template = "{% for m in messages %}{{ m.content + '!' }}{% endfor %}"
    assert text(tokenizer, make(tokenizer=strings_only).build(0, row("hi"))) == "hi!"


def test_one_video(make, tokenizer, paths):
    prompt = make().build(0, row("What?", paths[0]))
    (video,) = prompt.media
    # 4 frames of 16x24: 2 temporal x 4 x 6 patches, 4 patches a token.
    assert (video.frame_indices, video.size_hw, video.grid_thw) == ((0, 13, 26, 39), (16, 24), (2, 4, 6))
    assert video.num_tokens == 12 and video.path == paths[0]
    assert video.timestamps == (0.0, 1.3, 2.6, 3.9)
    assert math.isclose(video.seconds_per_grid, 2.6)
    assert text(tokenizer, prompt) == BEFORE + pads(12) + "What?" + AFTER


def test_two_videos_go_first_or_where_the_markers_are(make, tokenizer, paths):
    builder = make()
    first = builder.build(0, row("Compare.", *paths))
    assert text(tokenizer, first) == BEFORE + pads(12) + pads(12) + "Compare." + AFTER
    placed = builder.build(0, row("Is <video> after <video>?", *paths))
    assert text(tokenizer, placed) == BEFORE + "Is " + pads(12) + " after " + pads(12) + "?" + AFTER
    assert [video.path for video in placed.media] == list(paths)


@pytest.fixture
def images(tmp_path) -> tuple[str, ...]:
    """24x16 and 8x32 pixels: 6 and 4 patches of 4 pixels a row and column, merged 2x2 to 6 and 4 tokens."""
    Image.new("RGB", (24, 16), "red").save(tmp_path / "a.png")
    Image.new("RGB", (8, 32), "blue").save(tmp_path / "b.jpg")
    return str(tmp_path / "a.png"), str(tmp_path / "b.jpg")


def image_pads(num: int) -> str:
    return "<|vision_start|>" + IMAGE_PAD * num + "<|vision_end|>"


def test_images_alone_and_between_videos(make, tokenizer, paths, images):
    builder = make()
    alone = builder.build(0, replace(row("Same?"), images=images))
    assert text(tokenizer, alone) == BEFORE + image_pads(6) + image_pads(4) + "Same?" + AFTER
    (first, second) = alone.media
    assert (first.kind, first.grid_thw, first.size_hw, first.num_tokens) == ("image", (1, 4, 6), (16, 24), 6)
    assert first.frame_indices == (0, 0) and second.grid_thw == (1, 8, 2) and first.key != second.key
    mixed = replace(row("In <image> is <video> and <image>?", paths[0]), images=images)
    prompt = builder.build(0, mixed)
    assert text(tokenizer, prompt) == BEFORE + f"In {image_pads(6)} is {pads(12)} and {image_pads(4)}?" + AFTER
    assert [video.path for video in prompt.media] == [images[0], paths[0], images[1]]
    loose = builder.build(0, replace(row("First <video> then?", paths[0]), images=images[:1]))
    assert text(tokenizer, loose) == BEFORE + image_pads(6) + "First " + pads(12) + " then?" + AFTER


def test_an_image_that_cannot_be_used_is_media_s_fault(make, tmp_path, images):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    for path, reason in ((broken, "not a readable image"), (tmp_path / "gone.png", "No such file")):
        with pytest.raises(BadSample, match=reason) as refused:
            make().build(0, replace(row("p"), images=(str(path),)))
        assert refused.value.kind == "media" and refused.value.source == "train.jsonl:7"
    with pytest.raises(BadSample, match="1 <image> markers in the text for 2 images"):
        make().build(0, replace(row("<image>"), images=images))


def test_videos_of_different_lengths_get_their_own_number_of_tokens(make, tokenizer, paths):
    @dataclass
    class ByName(FakeDecoder):
        def probe(self, path):
            info = super().probe(path)
            return info if path == paths[0] else replace(info, timestamps=info.timestamps[:2])

    prompt = make(ByName()).build(0, row("<video>|<video>", *paths))
    assert text(tokenizer, prompt) == BEFORE + pads(12) + "|" + pads(6) + AFTER


def test_frames_by_rate(make, paths):
    (video,) = make(frames=FrameSettings(0, 2.0, 4, 6)).build(0, row("p", paths[0])).media
    assert len(video.frame_indices) == 6


def test_a_range_of_seconds(make, paths):
    (video,) = make().build(0, replace(row("p", paths[0]), span=(1.0, 3.0))).media
    assert video.timestamps == (1.0, 1.6, 2.3, 2.9)
    with pytest.raises(BadSample, match="a.mp4: video_start=5.0: the last frame is shown at 3.900 s"):
        make().build(0, replace(row("p", paths[0]), span=(5.0, 6.0)))


def test_format_prompt(make, tokenizer, tmp_path, paths):
    path = tmp_path / "f.jinja"
    path.write_text("{{ content | trim }} Think first.\n")
    prompt = make(format_prompt=str(path)).build(0, row(" Why? ", paths[0]))
    assert text(tokenizer, prompt) == BEFORE + pads(12) + "Why? Think first." + AFTER


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (None, "no such file"),
        ("{{ content", "line 1: "),
        ("no variable", "must use `content`"),
        ("{{ content }} {{ contnet }}", "contnet"),
    ],
)
def test_a_wrong_format_prompt_is_found_at_the_start(make, tmp_path, template, reason):
    path = tmp_path / "f.jinja"
    if template is not None:
        path.write_text(template)
    with pytest.raises(ValueError, match=reason) as refused:
        make(format_prompt=str(path), frames=FrameSettings(3))
    assert "data.format_prompt=" in str(refused.value) and "data.num_frames=3" in str(refused.value)


def test_a_tokenizer_without_chat_template_is_refused(make, tokenizer):
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(ValueError, match="no chat template"):
        make(tokenizer=bare)


def test_a_chat_template_that_ignores_videos_is_refused(make, tokenizer, paths):
    deaf = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    deaf.chat_template = "{% for m in messages %}{{ m.content[-1].text }}{% endfor %}"
    with pytest.raises(ValueError, match="wrote 0 video placeholders .* for 1 videos"):
        make(tokenizer=deaf).build(0, row("p", paths[0]))


@pytest.mark.parametrize("token", [VIDEO_PAD, "<|im_end|>"])
def test_control_tokens_in_the_text_are_refused(make, paths, token):
    with pytest.raises(BadSample, match="control token") as refused:
        make().build(0, row(f"a {token} b", paths[0]))
    assert refused.value.source == "train.jsonl:7" and token in refused.value.reason


@pytest.mark.parametrize("problem", ["<video> and <video>", "<video>" * 3])
def test_markers_must_match_the_videos(make, paths, problem):
    with pytest.raises(BadSample, match="markers in the text for 1 videos"):
        make().build(0, row(problem, paths[0]))


def test_a_long_prompt_is_refused_not_cut(make, tokenizer, paths):
    length = len(make().build(0, row("What?", paths[0])).token_ids)
    assert len(make(max_prompt_tokens=length).build(0, row("What?", paths[0])).token_ids) == length
    with pytest.raises(BadSample, match=rf"{length} tokens .12 of them video or image. is over data.max_prompt_tokens"):
        make(max_prompt_tokens=length - 1).build(0, row("What?", paths[0]))


def test_a_video_that_cannot_be_used_names_the_row_and_the_file(make, tmp_path, paths):
    for path, reason in ((str(tmp_path / "bad.mp4"), "moov lost"), (str(tmp_path / "gone.mp4"), "No such file")):
        with pytest.raises(BadSample, match=reason) as refused:
            make().build(0, row("p", path))
        assert refused.value.source == "train.jsonl:7" and path in refused.value.reason
    with pytest.raises(BadSample, match="2000x16: too wide"):
        make(FakeDecoder(width=2000)).build(0, row("p", paths[0]))


def test_a_file_that_is_not_as_the_manifest_says_is_refused(make, tmp_path, paths):
    sums = tmp_path / "sums.txt"
    sums.write_text(f"{hashlib.sha256(b'a' * 10).hexdigest()}  a.mp4\n")
    builder = make(manifest=Manifest(str(sums)))
    assert builder.build(0, row("p", paths[0])).media
    with pytest.raises(BadSample, match="b.mp4: not listed in data.manifest=") as refused:
        builder.build(0, row("p", *paths))
    assert refused.value.source == "train.jsonl:7"


def test_the_key_is_that_of_the_file_and_everything_done_with_it(make, paths):
    key = make().build(0, row("p", paths[0])).media[0].key
    assert make().build(5, row("another question", paths[0])).media[0].key == key
    others = {
        make().build(0, row("p", paths[1])).media[0].key,
        make(frames=FrameSettings(6)).build(0, row("p", paths[0])).media[0].key,
        make(FakeDecoder(width=33)).build(0, row("p", paths[0])).media[0].key,
    }
    os.utime(paths[0], ns=(1, 1))
    others.add(make().build(0, row("p", paths[0])).media[0].key)
    assert len(others) == 4 and key not in others


# -------------------------------------------------------------------------------------------------- turns and marks


def test_turns_before_the_problem(make, tokenizer, paths):
    history = (("user", "First <video>?"), ("assistant", "A <video> tag."))
    prompt = make().build(0, replace(row("And then?", paths[0]), history=history, system="Be short."))
    assert text(tokenizer, prompt) == (
        "<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\nFirst " + pads(12) + "?<|im_end|>\n"
        "<|im_start|>assistant\nA <video> tag.<|im_end|>\n" + BEFORE + "And then?" + AFTER
    )
    ahead = make().build(0, replace(row("And then?", paths[0]), history=(("user", "One?"), ("assistant", "Yes."))))
    assert text(tokenizer, ahead).startswith(BEFORE + pads(12) + "One?")


@pytest.mark.parametrize("part", ["system", "history"])
def test_control_tokens_before_the_problem_are_refused(make, part):
    value = {"system": f"a {VIDEO_PAD}", "history": (("user", "q"), ("assistant", f"a {VIDEO_PAD}"))}[part]
    with pytest.raises(BadSample, match="control token"):
        make().build(0, replace(row("p"), **{part: value}))


def test_marks_are_words_where_there_are_no_media(make, tokenizer):
    words = r"What does the <image> tag do in SVG? \<video>"
    assert text(tokenizer, make().build(0, row(words))) == BEFORE + words + AFTER


def test_an_escaped_mark_is_a_word(make, tokenizer, paths, images):
    prompt = make().build(0, row(r"Is \<video> in <video>? \<image>", paths[0]))
    assert text(tokenizer, prompt) == BEFORE + "Is <video> in " + pads(12) + "? <image>" + AFTER
    with pytest.raises(BadSample, match=r"1 <image> markers in the text for 0 images; write \\<image> for the word"):
        make().build(0, row("<image> and <video>", paths[0]))


def test_every_video_has_its_own_range_of_seconds(make, paths):
    spans = ((1.0, 2.0), (0.0, math.inf))
    first, second = make().build(0, replace(row("p", *paths), video_spans=spans)).media
    assert first.timestamps == (1.0, 1.3, 1.6, 1.9) and second.timestamps == (0.0, 1.3, 2.6, 3.9)


def test_a_chat_template_that_refuses_turns_sets_the_row_aside(make, tokenizer, monkeypatch):
    picky = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}" + CHAT
    monkeypatch.setattr(tokenizer, "chat_template", picky)
    builder = make(tokenizer=tokenizer)
    assert builder.build(0, row("p")).token_ids
    with pytest.raises(BadSample, match=r"the chat template of model\.hf refuses the row: no system turn"):
        builder.build(0, replace(row("p"), system="s"))
