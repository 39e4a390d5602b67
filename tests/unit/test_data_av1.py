# SPDX-License-Identifier: Apache-2.0
"""AV1 headers written down bit by bit, as the specification lays them out, and what is read from them."""

from __future__ import annotations

import pytest

from data.video.av1 import SequenceHeader, is_droppable, sequence_header

PLAIN = SequenceHeader(
    decoder_model=False, presentation_time_bits=0, frame_id_bits=0, order_hint_bits=7, screen_content=2, integer_mv=2
)


def packed(*fields: tuple[int, int]) -> bytes:
    """(value, number of bits) ... -> bytes, filled up with zeros."""
    text = "".join(f"{value:0{count}b}" for value, count in fields if count)
    text += "0" * (-len(text) % 8)
    return bytes(int(text[i : i + 8], 2) for i in range(0, len(text), 8))


def obu(kind: int, payload: bytes, extension: bool = False, has_size: bool = True) -> bytes:
    header = packed((0, 1), (kind, 4), (int(extension), 1), (int(has_size), 1), (0, 1))
    return header + (b"\0" if extension else b"") + (bytes([len(payload)]) if has_size else b"") + payload


def sequence(
    timing=(0, 1), points=((0, 5), (0, 12), (4, 5)), ids=(0, 1), hints=((1, 1), (3, 2), (1, 1), (1, 1), (6, 3))
):
    hint_flag, hint_tools, choose_content, choose_mv, hint_bits = hints
    return obu(
        1,
        packed(
            (0, 3), (0, 1), (0, 1),  # profile, still picture, reduced header
            *([timing] if isinstance(timing[0], int) else timing),
            (0, 1),  # initial_display_delay_present_flag
            *points,
            (8, 4), (7, 4), (319, 9), (239, 8),  # width and height
            *([ids] if isinstance(ids[0], int) else ids),
            (0, 3), (0, 4),  # superblocks, filters; inter tools
            hint_flag, hint_tools, choose_content, choose_mv, hint_bits, (0, 20),
        ),
    )  # fmt: skip


MODEL = ((1, 1), (1, 32), (30, 32), (0, 1), (1, 1), (9, 5), (90_000, 32), (11, 5), (15, 5))


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (sequence(), PLAIN),
        (obu(2, b"") + sequence(), PLAIN),
        (sequence(ids=((1, 1), (3, 4), (2, 3))), SequenceHeader(False, 0, 8, 7, 2, 2)),
        (sequence(hints=((0, 1), (0, 0), (1, 1), (1, 1), (0, 0))), SequenceHeader(False, 0, 0, 0, 2, 2)),
        (sequence(timing=((1, 1), (1, 32), (30, 32), (0, 1), (0, 1))), PLAIN),
        (
            sequence(timing=MODEL, points=((0, 5), (0, 12), (9, 5), (0, 1), (1, 1), (3, 10), (4, 10), (0, 1))),
            SequenceHeader(True, 16, 0, 7, 2, 2),
        ),
        (obu(6, b"\x30\x00"), None),
        (b"", None),
    ],
)
def test_sequence_headers(data, expected):
    assert sequence_header(data) == expected


def frame(kind: int, refresh: int, shown: int = 1, existing: int = 0, resilient: int = 0, content: int = 0) -> bytes:
    primary = () if kind in (0, 2) or resilient else ((7, 3),)
    return packed(
        (existing, 1), (kind, 2), (shown, 1), *(() if shown else ((1, 1),)), (resilient, 1), (0, 1),
        (content, 1), *(((1, 1),) if content else ()), (0, 1), (77, 7), *primary, (refresh, 8), (0, 30),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("data", "droppable"),
    [
        (obu(6, frame(1, 0)), True),
        (obu(6, frame(1, 4)), False),
        (obu(6, frame(1, 0, content=1)), True),
        (obu(6, frame(1, 1, content=1)), False),
        (obu(6, frame(1, 0, resilient=1)), True),
        (obu(6, frame(1, 128, resilient=1)), False),
        (obu(6, frame(2, 0)), True),  # intra only
        (obu(6, frame(2, 64)), False),
        (obu(3, frame(1, 0)) + obu(4, b"tiles"), True),
        (obu(2, b"") + obu(6, frame(1, 8, shown=0)) + obu(6, frame(1, 0)), False),  # a hidden reference first
        (obu(6, frame(1, 0, shown=0)) + obu(6, frame(1, 0)), True),
        (obu(6, frame(0, 0)), False),  # a shown keyframe has no field: it refreshes all
        (obu(6, frame(3, 0)), False),  # a switch frame likewise
        (obu(3, frame(1, 0, existing=1)), False),
        (obu(6, frame(1, 0), extension=True), False),  # scalable
        (obu(6, frame(1, 0), has_size=False), False),
        (obu(2, b""), False),
        (b"", False),
    ],
)
def test_which_pictures_refresh_no_slot(data, droppable):
    assert is_droppable(data, PLAIN) is droppable


def test_fields_of_other_sequences_are_stepped_over():
    """With frame numbers of 8 bits, presentation times of 16, and no screen content tools."""
    other = SequenceHeader(True, 16, 8, 7, 0, 2)
    for refresh in (0, 2):
        data = packed(
            (0, 1), (1, 2), (1, 1), (999, 16), (0, 1), (0, 1), (5, 8), (0, 1), (77, 7), (7, 3), (0, 1), (refresh, 8)
        )
        assert is_droppable(obu(6, data), other) is (refresh == 0)
