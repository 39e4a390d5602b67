# SPDX-License-Identifier: Apache-2.0
"""One record -> its row, or one row for each answer of a conversation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from data.rows.columns import Record, as_text, whole
from data.rows.conversation import Conversation, is_conversation, read_conversation
from data.rows.marks import MARKS, num_marks, unescaped, with_marks_of
from data.rows.media import Folders, Medium, Span, data_type_of, read_fps, read_media, read_span
from data.rows.options import check_answer, read_options, with_options
from megatron_rl.rewards.grading import reference_answer
from megatron_rl.types import MediaKind, Row, Turn

_COLUMN_OF: Mapping[MediaKind, str] = {"video": "videos", "image": "images", "audio": "audios"}
_VIDEO_MME = "videoID"  # of VideoMME, whose files are called <videoID>.mp4
_Media = dict[MediaKind, list[Medium]]


class RowReader:
    """Reads one record. `columns` are those it has, and keys of turns that nothing uses as "messages.key"; `used` those
    from which something was taken."""

    def __init__(self, values: Mapping[str, object], named: Mapping[str, str], folders: Folders):
        self._record, self._folders = Record(values, named), folders
        self._unused_keys: set[str] = set()
        self.has_plain_marks = False

    @property
    def columns(self) -> list[str]:
        return [*self._record.columns, *sorted(self._unused_keys)]

    @property
    def used(self) -> set[str]:
        return self._record.used

    def rows(self, source: str, every_answer: bool) -> list[Row]:
        """The row of the record or, with `every_answer`, one for each answer of a conversation. Raises ValueError that
        says what is wrong with it."""
        conversation = self._conversation()
        system, media = self._system(conversation), self._media(conversation)
        turns = self._with_options(self._turns(conversation))
        if conversation and conversation.has_parts and not any(media.values()):
            raise ValueError(f"`{conversation.name}` has places for media, but the row names none")
        turns = self._with_marks(turns, media)
        span = read_span([self._record.find(name)[1] for name in ("video_start", "video_end")], "the row")
        label = self._label()
        rows = []
        for number, cut in enumerate(_cuts(turns, every_answer), start=1):
            taken, history = _media_until(media, turns, cut), turns[: cut - 1]
            problem, answer = turns[cut - 1][1], turns[cut][1]
            if any(media.values()) and not any(taken.values()):
                history, problem = tuple((role, unescaped(text)) for role, text in history), unescaped(problem)
            videos = taken["video"]
            rows.append(
                Row(
                    source=f"{source}#{number}" if every_answer and len(turns) > 2 else source,
                    problem=problem,
                    answer=answer,
                    videos=tuple(medium.path for medium in videos),
                    problem_type=label,
                    images=tuple(medium.path for medium in taken["image"]),
                    span=span,
                    audios=tuple(medium.path for medium in taken["audio"]),
                    system=system,
                    history=history,
                    video_spans=_own_spans(videos, span),
                )
            )
        return rows

    def _label(self) -> str:
        column, value = self._record.find("problem_type")
        if value is None:
            return ""
        return as_text(value, column) if isinstance(value, float) else whole(str(value), column)

    def _conversation(self) -> Conversation | None:
        for column in self._record.columns_of("messages"):
            if is_conversation(value := self._record.peek(column)):
                self._record.used.add(column)
                found = read_conversation(value, column)
                self._unused_keys |= found.unused
                return found
        return None

    def _system(self, conversation: Conversation | None) -> str:
        column, value = self._record.find("system")
        text = "" if value is None else as_text(value, column)
        stated = conversation.system if conversation else ""
        if text and stated and text != stated:
            raise ValueError(f"`{column}` and the system turn say different things; keep one of them")
        return text or stated

    def _turns(self, conversation: Conversation | None) -> tuple[Turn, ...]:
        """All turns, the last of which is the answer."""
        record = self._record
        if conversation is None:
            column, problem = record.find("problem")
            if problem is None:
                if named := [name for name in record.columns_of("messages") if record.peek(name) is not None]:
                    raise ValueError(f"`{named[0]}` holds no list of turns, and there is no `problem`")
                raise record.missing("problem")
            user: Turn = ("user", as_text(problem, column))
            return user, ("assistant", self._answer(required=True))
        turns, answer = conversation.turns, self._answer(required=False)
        if turns and turns[-1][0] == "assistant":
            stated = turns[-1][1]
            if not answer or answer == stated:
                return turns
            if not record.is_named("answer"):
                raise ValueError(
                    f"`{conversation.name}` ends with an answer and another column holds another one; name the column "
                    "with data.columns.answer to take that"
                )
            turns = turns[:-1]
        if not answer:
            raise ValueError(f"`{conversation.name}` ends without an answer of the assistant")
        return (*turns, ("assistant", answer))

    def _answer(self, required: bool) -> str:
        """The text of the file, byte for byte: SFT learns all of it. What a reward compares with is taken out of it
        when a response is graded."""
        column, value = self._record.find("answer")
        if value is None and required:
            raise self._record.missing("answer")
        return "" if value is None else as_text(value, column)

    def _with_options(self, turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
        column, value = self._record.find("options")
        last = len(turns) - 2
        if value is None or last < 0:
            return turns
        options = read_options(value, column)
        check_answer(reference_answer(turns[-1][1]), [text for _, text in options], "answer")
        role, text = turns[last]
        return (*turns[:last], (role, with_options(text, options)), turns[-1])

    def _media(self, conversation: Conversation | None) -> _Media:
        media: _Media = {}
        for kind in MARKS:
            column, value = self._column_of(kind)
            inline = conversation.media.get(kind, []) if conversation else []
            if inline and conversation:
                if value is not None:
                    raise ValueError(f"`{conversation.name}` and `{column}` both name media; keep one of them")
                column, value = conversation.name, inline
            media[kind] = [] if value is None else self._read_media(value, column, kind)
        return media

    def _read_media(self, value: object, column: str, kind: MediaKind) -> list[Medium]:
        return read_media(value, column, kind, self._folders, self._fps, self._unused_keys)

    def _column_of(self, kind: MediaKind) -> tuple[str, object]:
        """(column, value) of the media of one kind."""
        record, field = self._record, _COLUMN_OF[kind]
        column, value = record.find_only(field)
        if value is not None or record.is_named(field):
            return column, value
        if record.peek("path") is not None and record.peek("data_type") is not None:  # Video-R1
            if data_type_of(record.take("data_type"), "data_type") == kind:
                return "path", record.take("path")
        if kind == "video" and not record.columns_of(field) and (name := record.take(_VIDEO_MME)) is not None:
            return _VIDEO_MME, f"{as_text(name, _VIDEO_MME)}.mp4"
        return "", None

    def _fps(self) -> float | None:
        column, value = self._record.find("fps")
        return read_fps(value, column)

    def _with_marks(self, turns: tuple[Turn, ...], media: _Media) -> tuple[Turn, ...]:
        """LLaVA-Video writes <image> for a video: so it is read in a row without images, with one such mark a video."""
        users = [text for role, text in turns if role == "user"]
        if not any(media.values()):
            self.has_plain_marks = any(num_marks(text, kind) for text in users for kind in MARKS)
            return turns
        stated = {kind: sum(num_marks(text, kind) for text in users) for kind in MARKS}
        if media["image"] or stated["video"] or not 0 < stated["image"] == len(media["video"]):
            return turns
        return tuple((role, with_marks_of(text, "image", "video") if role == "user" else text) for role, text in turns)


def _cuts(turns: Sequence[Turn], every_answer: bool) -> Iterator[int]:
    """The numbers of the turns that are answers. Raises ValueError where one does not follow a turn of the user."""
    answers = [number for number, (role, _) in enumerate(turns) if role == "assistant" and number]
    for number in answers if every_answer else answers[-1:]:
        if turns[number - 1][0] != "user":
            raise ValueError("an answer does not follow a turn of the user")
        if not reference_answer(turns[number][1]):
            raise ValueError("`answer` is empty")
        yield number
    if not answers:
        raise ValueError("the conversation has no turn of the user before the answer")


def _media_until(media: _Media, turns: Sequence[Turn], cut: int) -> _Media:
    """The media whose marks stand before turn `cut`. A kind without marks stands first; where marks and media do not
    fit, all are kept, and the prompt is refused."""
    if cut == len(turns) - 1:
        return media
    taken: _Media = {}
    for kind, found in media.items():
        marks = [num_marks(text, kind) if role == "user" else 0 for role, text in turns]
        taken[kind] = found[: sum(marks[:cut])] if sum(marks) == len(found) else found
    return taken


def _own_spans(videos: Sequence[Medium], span: Span) -> tuple[Span, ...]:
    if all(medium.span is None for medium in videos):
        return ()
    return tuple(medium.span or span for medium in videos)
