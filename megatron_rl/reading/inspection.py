# SPDX-License-Identifier: Apache-2.0
"""Reads the data of a recipe as its job would, and tells what would come of it: no model, nothing left on disk."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from checkpoint_tools.console import follow
from data.rows.answers import AnswerEncoder
from data.rows.dataset import DataSet
from data.rows.loader import RowLoader
from data.rows.prompts import PromptBuilder
from data.video.frame_files import FrameFilesDecoder, shown_path
from data.video.open_decoder import build_video_decoder
from megatron_rl.config.schema import JobConfig, RlConfig, SftConfig
from megatron_rl.errors import BadSample, raise_all
from megatron_rl.reading.inputs import (
    FIELDS,
    build_answer_encoder,
    build_prompt_builder,
    data_sets,
    load_tokenizer,
    media_specs,
    repeat_note,
)
from megatron_rl.types import BadRow, MediaItem, Prompt, Row

NUM_LISTED = 20


@dataclass(frozen=True, slots=True)
class ReadLimits:
    """How much is read: `records` of each data set (0 = all), and of how many of these the media are opened (0 =
    all)."""

    records: int = 0
    prompts: int = 0


@dataclass(frozen=True, slots=True)
class SeenPrompt:
    """A prompt as people read it. `text`: with one placeholder for each medium, as the chat template writes it."""

    source: str
    text: str
    answer: str
    num_tokens: int
    media: tuple[MediaItem, ...]


@dataclass(frozen=True, slots=True)
class Inspection:
    """What reading came to. `num_usable`: rows of which nothing is known against them; `problems`: why the job would
    stop; `lengths`: tokens of every prompt that was built."""

    num_usable: int
    set_aside: tuple[BadRow, ...]
    unused_columns: tuple[str, ...]
    seen: tuple[SeenPrompt, ...]
    lengths: tuple[int, ...]
    notes: tuple[str, ...]
    problems: tuple[str, ...]
    first: Prompt | None


def inspect_inputs(cfg: JobConfig, limits: ReadLimits, num_shown: int = 0) -> Inspection:
    """Read all that the job would read. Raises ValueError for what stops it before its first row: a file that is none,
    a chat template that is missing."""
    tokenizer = load_tokenizer(cfg.model.hf)
    decoder = FrameFilesDecoder(build_video_decoder("cpu", cfg.data.decode_threads))
    builder = build_prompt_builder(cfg.data, tokenizer, media_specs(cfg), decoder)
    encode = build_answer_encoder(cfg, tokenizer) if isinstance(cfg, SftConfig) else None
    media = Path(cfg.run_dir) / "media"
    with TemporaryDirectory() as folder:

        def see(prompt: Prompt) -> SeenPrompt:
            return _seen(prompt, tokenizer.decode, Path(folder), media)

        return _Inspector(cfg, builder, encode, limits, Path(folder)).inspect(num_shown, see)


class _Inspector:
    """One pass over the data of a recipe."""

    def __init__(
        self,
        cfg: JobConfig,
        builder: PromptBuilder,
        encode: AnswerEncoder | None,
        limits: ReadLimits,
        folder: Path,
    ):
        self._cfg, self._builder, self._encode, self._limits, self._folder = cfg, builder, encode, limits, folder
        self._bad: list[BadRow] = []
        self._notes: list[str] = []
        self._problems: list[str] = []
        self._unused: dict[str, None] = {}
        self._fate: dict[int, BadRow | None] = {}  # by id() of a row: None where it is usable
        self._prompts: list[Prompt] = []

    def inspect(self, num_shown: int, see: Callable[[Prompt], SeenPrompt]) -> Inspection:
        fields = FIELDS if isinstance(self._cfg, RlConfig) else FIELDS[:1]  # SFT evaluates nothing
        read = {field: self._read(field) for field in fields}
        lengths: list[int] = []
        shown: list[SeenPrompt] = []
        first: Prompt | None = None
        for field, parts in read.items():
            for part in parts:
                for prompt in self._build(field, part):
                    first = first or prompt
                    lengths.append(len(prompt.token_ids))
                    if len(shown) < num_shown:
                        shown.append(see(prompt))
        if not self._limits.records and not self._limits.prompts and not self._problems:
            self._problems += self._batches(read)
        usable = sum(len(part.rows) for parts in read.values() for part in parts)
        usable -= sum(bad is not None for bad in self._fate.values())
        return Inspection(
            usable,
            tuple(self._bad),
            tuple(self._unused),
            tuple(shown),
            tuple(lengths),
            tuple(self._notes),
            tuple(self._problems),
            first,
        )

    def _read(self, field: str) -> list[DataSet]:
        """The rows of a field, and what is wrong with them all."""
        try:
            parts = data_sets(self._cfg.data, field, self._folder, self._limits.records)
        except ValueError as error:
            self._problems.append(str(error))
            return []
        for part in parts:
            self._bad += part.bad
            self._notes += [f"{field}={text}" for text in part.notes()]
            self._unused |= dict.fromkeys(part.unused_columns)
            self._problems += _too_many(part.bad, len(part.rows) + len(part.bad), f"{field}={part.name}", self._cfg)
        rows = [part.rows for part in parts]
        if parts and not all(rows if self._cfg.data.weights and field == "data.train" else [sum(map(len, rows))]):
            self._problems.append(f"{field}={', '.join(part.name for part in parts)}: no usable row in a data set")
        if field == "data.train" and parts and (note := repeat_note(rows, self._cfg.train.prompts_per_step)):
            self._notes += [] if self._limits.records else [note]
        return parts

    def _build(self, field: str, part: DataSet) -> Iterator[Prompt]:
        """The prompts of a data set, as far as the limit goes; those that cannot be built are set aside."""
        rows = part.rows[: self._limits.prompts] if self._limits.prompts else part.rows
        bad: list[BadRow] = []
        for row in follow(rows, len(rows), f"{field}={part.name}"):
            try:
                prompt = self._builder.build(len(self._fate), row)
                if self._encode and field == "data.train":
                    self._encode(row)
            except BadSample as error:
                bad.append(BadRow(row.source, error.reason, error.kind))
                self._fate[id(row)] = bad[-1]
            else:
                self._fate[id(row)] = None
                yield prompt
        self._bad += bad
        if bad and len(bad) == len(rows):
            self._problems.append(_listing(f"{field}={part.name}: none of {len(rows)} rows can be used", bad))
        elif bad:
            self._notes.append(
                f"{field}={part.name}: {len(bad)} of {len(rows)} rows whose media were opened are set aside"
            )

    def _batches(self, read: dict[str, list[DataSet]]) -> list[str]:
        """The first batch of which too much is set aside, in the order in which the job takes its rows."""
        cfg, problems = self._cfg, []
        train = [part.rows for part in read["data.train"]]
        if train:
            size = cfg.train.prompts_per_step
            loader = RowLoader(train, size, cfg.seed, cfg.data.shuffle, cfg.data.weights)
            num_batches = min(cfg.train.num_steps, -(-sum(map(len, train)) // size))
            batches = ([row for _, row in loader.next_batch()] for _ in range(num_batches))
            problems += self._first_faulty(batches, "step")
        held_out = [row for part in read.get("data.eval", []) for row in part.rows]
        if isinstance(cfg, RlConfig):
            size = cfg.eval.batch_size
            starts = range(0, len(held_out), size)
            problems += self._first_faulty((held_out[start : start + size] for start in starts), "evaluation batch")
        return problems

    def _first_faulty(self, batches: Iterable[Sequence[Row]], name: str) -> list[str]:
        for number, rows in enumerate(batches):
            bad = [found for row in rows if (found := self._fate[id(row)]) is not None]
            problems = _too_many(bad, len(rows), f"{name} {number}", self._cfg)
            if not problems and len(bad) == len(rows):
                problems = [_listing(f"{name} {number}: none of its {len(rows)} rows can be used", bad)]
            if problems:
                return problems
        return []


def _too_many(bad: Sequence[BadRow], num_rows: int, where: str, cfg: JobConfig) -> list[str]:
    limit = cfg.data.max_bad_fraction
    faulty = [row for row in bad if row.kind != "overlong"]
    if not num_rows or len(faulty) <= limit * num_rows:
        return []
    title = f"data.max_bad_fraction={limit}: {len(faulty)} of {num_rows} rows of {where} cannot be used; mend them"
    return [_listing(title, faulty)]


def _listing(title: str, bad: Sequence[BadRow]) -> str:
    more = [f"    ... and {len(bad) - NUM_LISTED} more"] if len(bad) > NUM_LISTED else []
    return "\n".join([title, *(f"    {row.source}: {row.reason}" for row in bad[:NUM_LISTED]), *more])


def _seen(prompt: Prompt, decode: Callable[[list[int]], object], folder: Path, media_folder: Path) -> SeenPrompt:
    """`folder` is where embedded media lie now, `media_folder` where they will in the run."""
    dropped = {n for runs in prompt.spans for start, stop in runs for n in range(start, stop)}
    dropped -= {runs[0][0] for runs in prompt.spans}
    text = str(decode([token for n, token in enumerate(prompt.token_ids) if n not in dropped]))
    media = tuple(replace(item, path=_lasting_path(item.path, folder, media_folder)) for item in prompt.media)
    return SeenPrompt(prompt.row.source, text, prompt.row.answer, len(prompt.token_ids), media)


def _lasting_path(path: str, folder: Path, media_folder: Path) -> str:
    path = shown_path(path)
    return str(media_folder / Path(path).relative_to(folder)) if Path(path).is_relative_to(folder) else path


def refuse(inspection: Inspection) -> None:
    """Raise one ValueError with every problem, if there is any."""
    raise_all(inspection.problems, "data")
