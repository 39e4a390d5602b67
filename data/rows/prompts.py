# SPDX-License-Identifier: Apache-2.0
"""Row -> Prompt: the question in the chat template, every media token in its place, the frames of every video chosen.

Nothing is decoded here; a demux pass tells enough. What cannot become a prompt raises BadSample with the reason.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import jinja2

from data.rows.chat import messages_of, places_of
from data.rows.manifest import Manifest
from data.rows.templates import RENDER_SECONDS, TooSlow, read_format_prompt, template_problems, time_limit
from data.video.frame_files import frames_of, shown_path
from data.video.frames import FrameSettings, choose_frames, seconds_per_grid
from data.video.images import probe_image
from megatron_rl.errors import BadSample, VideoDecodeError, raise_all
from megatron_rl.protocols import MediaSpec, MediaSpecs, VideoDecoder
from megatron_rl.types import MediaItem, MediaKind, Placeholder, Prompt, Row, Run, VideoInfo

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class PromptBuilder:
    """Builds prompts for one tokenizer, one model family and one set of data settings."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        specs: MediaSpecs,
        decoder: VideoDecoder,
        *,
        format_prompt: str = "",
        frames: FrameSettings,
        max_prompt_tokens: int,
        manifest: Manifest | None = None,
    ):
        problems = frames.problems(specs.pictures.temporal_patch_size) if specs.pictures else []
        if not tokenizer.chat_template:
            problems.append("model.hf: the tokenizer has no chat template; use an instruction-tuned checkpoint")
        else:
            problems += _chat_template_problems(tokenizer)
        if format_prompt:
            problems += template_problems(format_prompt)
        raise_all(problems, "prompts")
        self._placeholder_ids = specs.placeholder_ids
        self._tokenizer = tokenizer
        self._specs = specs
        self._decoder = decoder
        self._template = read_format_prompt(format_prompt)
        self._frames = frames
        self._max_prompt_tokens = max_prompt_tokens
        self._manifest = manifest
        self._control_tokens = control_tokens(tokenizer)

    def build(self, prompt_id: int, row: Row) -> Prompt:
        """The prompt of one row. Raises BadSample; the reason names the file if it is one's fault."""
        self._refuse_unknown_media(row)
        apart, joined = self._sounds(row)
        ids, kinds = self._tokenize(row, apart)
        videos = iter([(path, row.span_of(number)) for number, path in enumerate(row.videos)])
        still = {"image": iter(row.images), "audio": iter(apart)}
        groups = [
            self._group(row, *(next(videos) if kind == "video" else (next(still[kind]), row.span)), kind, joined)
            for kind in kinds
        ]
        prompt = self._expand(prompt_id, row, ids, groups)
        if len(prompt.token_ids) > self._max_prompt_tokens:
            num_media = sum(item.num_tokens for item in prompt.media)
            raise BadSample(
                row.source,
                f"prompt of {len(prompt.token_ids)} tokens ({num_media} of them {_named(prompt.media)}) is over "
                f"data.max_prompt_tokens={self._max_prompt_tokens}",
                "overlong",
            )
        return prompt

    def _refuse_unknown_media(self, row: Row) -> None:
        if (row.videos or row.images) and self._specs.pictures is None:
            first = (*row.videos, *row.images)[0]
            raise BadSample(row.source, f"{first}: this model takes no video and no image; use a model that does")
        for kind, paths in (("video", row.videos), ("image", row.images)):
            if paths and kind not in self._placeholder_ids:
                raise BadSample(row.source, f"{paths[0]}: this model takes no {kind}; use a model that does")
        if row.audios and self._specs.sound is None:
            raise BadSample(row.source, f"{row.audios[0]}: no model family here takes sound yet; leave out `audios`")

    def _sounds(self, row: Row) -> tuple[tuple[str, ...], frozenset[str]]:
        """(sounds that stand in the prompt by themselves, those that stand among the tokens of the same video)."""
        sound = self._specs.sound
        joined = frozenset(row.audios).intersection(row.videos if sound and sound.joins_video else ())
        return tuple(path for path in row.audios if path not in joined), joined

    def _tokenize(self, row: Row, audios: Sequence[str]) -> tuple[list[int], list[MediaKind]]:
        """Token ids with one placeholder for each medium, and the kinds of these."""
        text = self._template.render(content=row.problem) if self._template else row.problem
        for part in (row.system, *(turn for _, turn in row.history), text):
            refuse_control_tokens(row.source, part, "the text", self._control_tokens)
        num_media: dict[MediaKind, int] = {"image": len(row.images), "video": len(row.videos)}
        made = messages_of(row, text, num_media | ({"audio": len(audios)} if self._specs.sound else {}))
        messages: Any = made  # transformers types contents as text only
        try:
            rendered = self._tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=True, return_dict=False
            )
        except jinja2.TemplateError as error:  # such as one that knows no system turn
            raise BadSample(row.source, f"the chat template of model.hf refuses the row: {error}") from error
        ids = cast("list[int]", rendered)  # one conversation, tokenized
        kinds = places_of(made)
        for token_id in dict.fromkeys(self._placeholder_ids.values()):
            names = [kind for kind, own in self._placeholder_ids.items() if own == token_id]
            found, wanted = ids.count(token_id), sum(kind in names for kind in kinds)
            if found != wanted:
                name = "/".join(names)
                raise ValueError(
                    f"model.hf: the chat template wrote {found} {name} placeholders (token {token_id}) for {wanted} "
                    f"{name}s; use the template that belongs to the model"
                )
        return ids, kinds

    def _expand(self, prompt_id: int, row: Row, ids: Sequence[int], groups: Sequence[Sequence[MediaItem]]) -> Prompt:
        """Each placeholder becomes all tokens of its medium, or of its video and the sound of that."""
        expanded: list[int] = []
        placed: list[tuple[MediaItem, tuple[Run, ...]]] = []
        remaining = iter(groups)
        for token in ids:
            if not groups or token not in self._placeholder_ids.values():
                expanded.append(token)
                continue
            items, at = next(remaining), len(expanded)
            made = self._placeholder(items)
            shifted = [tuple((at + start, at + stop) for start, stop in runs) for runs in made.spans]
            placed += sorted(zip(items, shifted, strict=True), key=lambda pair: pair[1])
            expanded += made.token_ids
        media, spans = tuple(item for item, _ in placed), tuple(runs for _, runs in placed)
        return Prompt(prompt_id, row, tuple(expanded), media, spans)

    def _placeholder(self, items: Sequence[MediaItem]) -> Placeholder:
        first, *sound = items
        if first.kind == "audio":
            assert self._specs.sound is not None, "refused before"
            return self._specs.sound.placeholder(first)
        assert self._specs.pictures is not None, "refused before"
        return self._specs.pictures.placeholder(first, *sound)

    def _group(
        self, row: Row, path: str, span: tuple[float, float], kind: MediaKind, joined: Collection[str]
    ) -> tuple[MediaItem, ...]:
        """The items behind one placeholder: the medium and, of a video, the sound that is joined to it."""
        if kind == "audio":
            return (self._hear(row, path, span),)
        picture = self._look(row, path, span, kind)
        return (picture, self._hear(row, path, span)) if kind == "video" and path in joined else (picture,)

    def _look(self, row: Row, path: str, span: tuple[float, float], kind: MediaKind) -> MediaItem:
        spec = self._specs.pictures
        assert spec is not None, "refused before"
        with self._reading(row, path):
            info = probe_image(path) if kind == "image" else self._decoder.probe(path)
            file = _file_identity(path)
        if kind == "image":
            return _picture(row, info, (0,) * spec.temporal_patch_size, file, kind, spec)
        try:
            indices = choose_frames(info, self._frames, spec.temporal_patch_size, spec.frame_family, span)
        except ValueError as error:  # a range in which the video shows nothing
            raise BadSample(row.source, f"{shown_path(path)}: {error}") from error
        return _picture(row, info, indices, file, kind, spec)

    def _hear(self, row: Row, path: str, span: tuple[float, float]) -> MediaItem:
        from data.audio import decode_audio  # with PyAV: a recipe is checked without

        spec = self._specs.sound
        assert spec is not None, "refused before"
        with self._reading(row, path):
            num_samples = len(decode_audio(path, span, spec.rate))
            file = _file_identity(path)
        num_frames = spec.num_frames(num_samples)
        num_tokens = spec.num_tokens(num_frames)
        if not num_tokens:
            raise BadSample(row.source, f"{path}: {num_samples} samples of sound are too few for a token", "media")
        path = os.path.abspath(path)
        identity = [path, *file, span, num_frames, num_tokens, "audio"]
        return MediaItem(
            key=hashlib.sha256(json.dumps(identity).encode()).hexdigest(),
            path=path,
            frame_indices=(),
            timestamps=(),
            size_hw=(1, spec.num_mels),
            grid_thw=(-(-num_tokens // spec.tokens_per_unit), 1, 1),
            seconds_per_grid=0.0,
            num_tokens=num_tokens,
            num_frames=num_frames,
            frames_per_unit=spec.frames_per_unit,
            tokens_per_unit=spec.tokens_per_unit,
            kind="audio",
            span=span,
        )

    @contextmanager
    def _reading(self, row: Row, path: str) -> Iterator[None]:
        """What is wrong with the file, in the manifest or in the block, becomes a BadSample."""
        try:
            if self._manifest:
                frames = frames_of(path)
                for file in frames.paths if frames else (path,):
                    self._manifest.check(file)
            yield
        except VideoDecodeError as error:
            where = error.source if path.endswith(".frames") else path
            raise BadSample(row.source, f"{where}: {error.reason}", "media") from error
        except OSError as error:
            raise BadSample(row.source, f"{path}: {error.strerror}", "media") from error


def _file_identity(path: str) -> tuple[int, int]:
    stat = os.stat(path)
    return stat.st_size, stat.st_mtime_ns


def _picture(
    row: Row, info: VideoInfo, indices: tuple[int, ...], file: tuple[int, int], kind: MediaKind, spec: MediaSpec
) -> MediaItem:
    """A video or an image, of which the pictures `indices` are taken."""
    try:
        size_hw = spec.size_hw(len(indices), info.height, info.width)
    except ValueError as error:  # such as a picture 300 times wider than high
        raise BadSample(row.source, f"{shown_path(info.path)}: {info.width}x{info.height}: {error}") from error
    grid = (len(indices) // spec.temporal_patch_size, size_hw[0] // spec.patch_size, size_hw[1] // spec.patch_size)
    assert size_hw == (grid[1] * spec.patch_size, grid[2] * spec.patch_size)
    path = os.path.abspath(info.path)
    seconds = seconds_per_grid(info, indices, spec.temporal_patch_size)
    identity = [path, *file, indices, size_hw, grid, seconds, kind]
    per_unit = spec.tokens_per_unit(size_hw)
    return MediaItem(
        key=hashlib.sha256(json.dumps(identity).encode()).hexdigest(),
        path=path,
        frame_indices=indices,
        timestamps=tuple(info.timestamps[index] for index in indices),
        size_hw=size_hw,
        grid_thw=grid,
        seconds_per_grid=seconds,
        num_tokens=grid[0] * per_unit,
        num_frames=len(indices),
        frames_per_unit=spec.temporal_patch_size,
        tokens_per_unit=per_unit,
        kind=kind,
    )


def _named(media: Sequence[MediaItem]) -> str:
    return "video, image or sound" if any(item.kind == "audio" for item in media) else "video or image"


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """Tokens that steer the model; as words of a text they would do so too."""
    return tuple(sorted(str(token) for token in tokenizer.added_tokens_decoder.values() if token.special))


def refuse_control_tokens(source: str, text: str, what: str, tokens: Sequence[str]) -> None:
    """Raise BadSample where `text` has one of the tokens."""
    for token in tokens:
        if token in text:
            raise BadSample(source, f"{what} contains {token}, a control token of the model")


def _chat_template_problems(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Rendered once: a template that never ends would stop the run in its first step, without a word."""
    messages: Any = [{"role": "user", "content": "What is shown?"}]
    try:
        with time_limit(RENDER_SECONDS):
            tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    except TooSlow:
        return [f"model.hf: its chat template takes over {RENDER_SECONDS:g} s to render; use that of the model's maker"]
    except jinja2.TemplateSyntaxError as error:
        return [f"model.hf: its chat template is broken: line {error.lineno}: {error.message}; use the maker's"]
    except jinja2.TemplateError:
        return []  # it wants other turns than these, which a row may have
    return []
