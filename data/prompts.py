# SPDX-License-Identifier: Apache-2.0
"""Row -> Prompt: the question in the chat template, every video token in its place, the frames of every video chosen.

Nothing is decoded here; a demux pass tells enough. What cannot become a prompt raises BadSample with the reason.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import jinja2
import jinja2.meta

from data.frames import FrameSettings, choose_frames, seconds_per_grid
from data.manifest import Manifest
from megatron_rl.errors import BadSample, VideoDecodeError, raise_all
from megatron_rl.protocols import VideoDecoder, VideoSpec
from megatron_rl.types import Prompt, Row, VideoArtifact, VideoInfo

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

VIDEO_MARKER = "<video>"


class PromptBuilder:
    """Builds prompts for one tokenizer, one model family and one set of data settings."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        spec: VideoSpec | None,
        decoder: VideoDecoder,
        *,
        video_placeholder_id: int | None,
        format_prompt: str = "",
        frames: FrameSettings,
        max_prompt_tokens: int,
        manifest: Manifest | None = None,
    ):
        problems = frames.problems(spec.temporal_patch_size) if spec else []
        if not tokenizer.chat_template:
            problems.append("model.hf: the tokenizer has no chat template; use an instruction-tuned checkpoint")
        if format_prompt:
            problems += template_problems(format_prompt)
        raise_all(problems, "prompts")
        self.video_placeholder_id = video_placeholder_id
        self._tokenizer = tokenizer
        self._spec = spec
        self._decoder = decoder
        self._template = _template(format_prompt)
        self._frames = frames
        self._max_prompt_tokens = max_prompt_tokens
        self._manifest = manifest
        self._special = sorted(str(token) for token in tokenizer.added_tokens_decoder.values() if token.special)

    def build(self, prompt_id: int, row: Row) -> Prompt:
        """The prompt of one row. Raises BadSample; the reason names the video if it is one's fault."""
        if row.videos and self._spec is None:
            raise BadSample(row.source, f"{row.videos[0]}: this model takes no video; use a model that does")
        ids = self._tokenize(row)
        videos = tuple(self._artifact(row, path) for path in row.videos)
        ids = self._expand(ids, videos)
        if len(ids) > self._max_prompt_tokens:
            num_video = sum(video.num_tokens for video in videos)
            raise BadSample(
                row.source,
                f"prompt of {len(ids)} tokens ({num_video} of them video) is over "
                f"data.max_prompt_tokens={self._max_prompt_tokens}",
                "overlong",
            )
        return Prompt(prompt_id, row, ids, videos)

    def _tokenize(self, row: Row) -> list[int]:
        """Token ids with one placeholder a video."""
        text = self._template.render(content=row.problem) if self._template else row.problem
        for token in self._special:
            if token in text:
                raise BadSample(row.source, f"the text contains {token}, a control token of the model")
        messages = [{"role": "user", "content": _content(row, text)}]
        ids = self._tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=False
        )
        found = ids.count(self.video_placeholder_id)
        if found != len(row.videos):
            raise ValueError(
                f"model.hf: the chat template wrote {found} video placeholders (token {self.video_placeholder_id}) "
                f"for {len(row.videos)} videos; use the template that belongs to the model"
            )
        return ids

    def _expand(self, ids: Sequence[int], videos: Sequence[VideoArtifact]) -> tuple[int, ...]:
        """Each placeholder becomes all tokens of its video."""
        expanded: list[int] = []
        remaining = iter(videos)
        for token in ids:
            if token == self.video_placeholder_id:
                expanded += self._spec.placeholder(next(remaining).num_tokens)
            else:
                expanded.append(token)
        return tuple(expanded)

    def _artifact(self, row: Row, path: str) -> VideoArtifact:
        try:
            if self._manifest:
                self._manifest.check(path)
            info = self._decoder.probe(path)
            stat = os.stat(path)
        except VideoDecodeError as error:
            raise BadSample(row.source, f"{path}: {error.reason}", "media") from error
        except OSError as error:
            raise BadSample(row.source, f"{path}: {error.strerror}", "media") from error
        spec = self._spec
        try:
            indices = choose_frames(info, self._frames, spec.temporal_patch_size, spec.frame_family, row.span)
        except ValueError as error:  # a range in which the video shows nothing
            raise BadSample(row.source, f"{path}: {error}") from error
        try:
            size_hw = spec.size_hw(len(indices), info.height, info.width)
        except ValueError as error:  # such as a picture 300 times wider than high
            raise BadSample(row.source, f"{path}: {info.width}x{info.height}: {error}") from error
        return self._describe(info, indices, size_hw, (stat.st_size, stat.st_mtime_ns))

    def _describe(
        self, info: VideoInfo, indices: tuple[int, ...], size_hw: tuple[int, int], file_identity: tuple[int, int]
    ) -> VideoArtifact:
        spec = self._spec
        grid = (len(indices) // spec.temporal_patch_size, size_hw[0] // spec.patch_size, size_hw[1] // spec.patch_size)
        assert size_hw == (grid[1] * spec.patch_size, grid[2] * spec.patch_size)
        assert grid[1] % spec.merge_size == 0 and grid[2] % spec.merge_size == 0
        path = os.path.abspath(info.path)
        seconds = seconds_per_grid(info, indices, spec.temporal_patch_size)
        identity = [path, *file_identity, indices, size_hw, grid, seconds]
        return VideoArtifact(
            key=hashlib.sha256(json.dumps(identity).encode()).hexdigest(),
            path=path,
            frame_indices=indices,
            timestamps=tuple(info.timestamps[index] for index in indices),
            size_hw=size_hw,
            grid_thw=grid,
            seconds_per_grid=seconds,
            num_tokens=grid[0] * grid[1] * grid[2] // spec.merge_size**2,
        )


def _content(row: Row, text: str) -> str | list[dict[str, str]]:
    """The user's turn. `<video>` in the text says where the videos go; without it they go first.

    Without a video it is a plain string: templates of text-only models know nothing else.
    """
    num_markers = text.count(VIDEO_MARKER)
    if num_markers and num_markers != len(row.videos):
        raise BadSample(row.source, f"{num_markers} {VIDEO_MARKER} markers in the text for {len(row.videos)} videos")
    if not row.videos:
        return text
    if not num_markers:
        return [{"type": "video"}] * len(row.videos) + [{"type": "text", "text": text}]
    content = []
    for number, piece in enumerate(text.split(VIDEO_MARKER)):
        if number:
            content.append({"type": "video"})
        if piece:
            content.append({"type": "text", "text": piece})
    return content


def _template(path: str) -> jinja2.Template | None:
    if not path:
        return None
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined)
    return environment.from_string(Path(path).read_text(encoding="utf-8").strip())


def template_problems(path: str) -> list[str]:
    """What is wrong with the user's prompt format."""
    file = Path(path)
    if not file.is_file():
        return [f"data.format_prompt={path}: no such file; give a Jinja file that uses {{{{ content }}}}"]
    try:
        variables = jinja2.meta.find_undeclared_variables(jinja2.Environment().parse(file.read_text(encoding="utf-8")))
    except jinja2.TemplateSyntaxError as error:
        return [f"data.format_prompt={path}: line {error.lineno}: {error.message}; correct the template"]
    if variables != {"content"}:
        return [
            f"data.format_prompt={path}: uses the variables {sorted(variables)}; it must use `content`, the problem, "
            "and no other"
        ]
    return []
