# SPDX-License-Identifier: Apache-2.0
"""Row -> Prompt: the question in the chat template, every video token in its place, the frames of every video chosen.

Nothing is decoded here; a demux pass tells enough. What cannot become a prompt raises BadSample with the reason.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import jinja2
import jinja2.meta

from data.rows.manifest import Manifest
from data.video.frames import FrameSettings, choose_frames, seconds_per_grid
from data.video.images import probe_image
from megatron_rl.errors import BadSample, VideoDecodeError, raise_all
from megatron_rl.protocols import MediaSpec, VideoDecoder
from megatron_rl.types import MediaItem, Prompt, Row, VideoInfo

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MARKERS = {"<image>": "image", "<video>": "video"}


class PromptBuilder:
    """Builds prompts for one tokenizer, one model family and one set of data settings."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        spec: MediaSpec | None,
        decoder: VideoDecoder,
        *,
        video_placeholder_id: int | None,
        image_placeholder_id: int | None = None,
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
        self._placeholder_ids = {"video": video_placeholder_id, "image": image_placeholder_id}
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
        if (row.videos or row.images) and self._spec is None:
            first = (*row.videos, *row.images)[0]
            raise BadSample(row.source, f"{first}: this model takes no video and no image; use a model that does")
        if row.audios:
            raise BadSample(row.source, f"{row.audios[0]}: no model family here takes sound yet; leave out `audios`")
        ids, kinds = self._tokenize(row)
        paths = {"video": iter(row.videos), "image": iter(row.images)}
        videos = tuple(self._artifact(row, next(paths[kind]), is_image=kind == "image") for kind in kinds)
        ids = self._expand(ids, videos)
        if len(ids) > self._max_prompt_tokens:
            num_video = sum(video.num_tokens for video in videos)
            raise BadSample(
                row.source,
                f"prompt of {len(ids)} tokens ({num_video} of them video or image) is over "
                f"data.max_prompt_tokens={self._max_prompt_tokens}",
                "overlong",
            )
        return Prompt(prompt_id, row, ids, videos)

    def _tokenize(self, row: Row) -> tuple[list[int], list[str]]:
        """Token ids with one placeholder for each video and image, and which is which."""
        text = self._template.render(content=row.problem) if self._template else row.problem
        for token in self._special:
            if token in text:
                raise BadSample(row.source, f"the text contains {token}, a control token of the model")
        content = _content(row, text)
        messages = [{"role": "user", "content": content}]
        ids = self._tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=False
        )
        kinds = [part["type"] for part in content if part["type"] != "text"] if isinstance(content, list) else []
        for kind, token_id in self._placeholder_ids.items():
            found, wanted = ids.count(token_id), kinds.count(kind)
            if found != wanted:
                raise ValueError(
                    f"model.hf: the chat template wrote {found} {kind} placeholders (token {token_id}) for {wanted} "
                    f"{kind}s; use the template that belongs to the model"
                )
        return ids, kinds

    def _expand(self, ids: Sequence[int], videos: Sequence[MediaItem]) -> tuple[int, ...]:
        """Each placeholder becomes all tokens of its video or image."""
        expanded: list[int] = []
        remaining = iter(videos)
        for token in ids:
            if videos and token in self._placeholder_ids.values():
                video = next(remaining)
                expanded += self._spec.placeholder(video.num_tokens, video.is_image)
            else:
                expanded.append(token)
        return tuple(expanded)

    def _artifact(self, row: Row, path: str, is_image: bool) -> MediaItem:
        try:
            if self._manifest:
                self._manifest.check(path)
            info = probe_image(path) if is_image else self._decoder.probe(path)
            stat = os.stat(path)
            file = stat.st_size, stat.st_mtime_ns
        except VideoDecodeError as error:
            raise BadSample(row.source, f"{path}: {error.reason}", "media") from error
        except OSError as error:
            raise BadSample(row.source, f"{path}: {error.strerror}", "media") from error
        spec = self._spec
        if is_image:
            return self._describe(row, info, (0,) * spec.temporal_patch_size, file, is_image)
        try:
            indices = choose_frames(info, self._frames, spec.temporal_patch_size, spec.frame_family, row.span)
        except ValueError as error:  # a range in which the video shows nothing
            raise BadSample(row.source, f"{path}: {error}") from error
        return self._describe(row, info, indices, file, is_image)

    def _describe(
        self, row: Row, info: VideoInfo, indices: tuple[int, ...], file_identity: tuple[int, int], is_image: bool
    ) -> MediaItem:
        spec = self._spec
        try:
            size_hw = spec.size_hw(len(indices), info.height, info.width)
        except ValueError as error:  # such as a picture 300 times wider than high
            raise BadSample(row.source, f"{info.path}: {info.width}x{info.height}: {error}") from error
        grid = (len(indices) // spec.temporal_patch_size, size_hw[0] // spec.patch_size, size_hw[1] // spec.patch_size)
        assert size_hw == (grid[1] * spec.patch_size, grid[2] * spec.patch_size)
        assert grid[1] % spec.merge_size == 0 and grid[2] % spec.merge_size == 0
        path = os.path.abspath(info.path)
        seconds = seconds_per_grid(info, indices, spec.temporal_patch_size)
        identity = [path, *file_identity, indices, size_hw, grid, seconds, is_image]
        return MediaItem(
            key=hashlib.sha256(json.dumps(identity).encode()).hexdigest(),
            path=path,
            frame_indices=indices,
            timestamps=tuple(info.timestamps[index] for index in indices),
            size_hw=size_hw,
            grid_thw=grid,
            seconds_per_grid=seconds,
            num_tokens=grid[0] * grid[1] * grid[2] // spec.merge_size**2,
            is_image=is_image,
        )


def _content(row: Row, text: str) -> str | list[dict[str, str]]:
    """The user's turn. `<video>` and `<image>` in the text say where these go; a kind without markers goes first.

    With neither it is a plain string: templates of text-only models know nothing else.
    """
    content: list[dict[str, str]] = []
    for marker, kind in _MARKERS.items():
        num_markers, num_files = text.count(marker), len(row.images if kind == "image" else row.videos)
        if num_markers and num_markers != num_files:
            raise BadSample(row.source, f"{num_markers} {marker} markers in the text for {num_files} {kind}s")
        if not num_markers:
            content += [{"type": kind}] * num_files
    for piece in re.split("(<image>|<video>)", text):
        if piece in _MARKERS:
            content.append({"type": _MARKERS[piece]})
        elif piece:
            content.append({"type": "text", "text": piece})
    return content if row.videos or row.images else text


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
