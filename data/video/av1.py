# SPDX-License-Identifier: Apache-2.0
"""Which AV1 pictures nothing refers to: the first bits of sequence and frame headers.

AV1 bitstream specification 5.5 (sequence header) and 5.9.2 (frame header). Everything that a later picture can use of
an earlier one (pixels, motion, probabilities, film grain) is kept in reference slots, so a picture that refreshes no
slot can be left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

_SEQUENCE_HEADER, _FRAME_HEADER, _FRAME = 1, 3, 6
_KEY, _INTRA_ONLY, _SWITCH = 0, 2, 3
_CHOOSE = 2
_UNKNOWN = b"\x80"  # show_existing_frame: taken for one that refreshes a slot


class _Bits:
    """Reads bits, most significant first; zeros past the end."""

    def __init__(self, data: bytes):
        self._value = int.from_bytes(data, "big")
        self._left = len(data) * 8

    def __call__(self, count: int) -> int:
        self._left -= count
        return self._value >> max(self._left, 0) & (1 << count) - 1

    def leading_zeros(self) -> int:
        count = 0
        while count < 32 and not self(1):
            count += 1
        return count


@dataclass(frozen=True, slots=True)
class SequenceHeader:
    """What has to be known of it to find `refresh_frame_flags` in a frame header."""

    decoder_model: bool
    presentation_time_bits: int
    frame_id_bits: int
    order_hint_bits: int
    screen_content: int
    integer_mv: int


def sequence_header(data: bytes) -> SequenceHeader | None:
    """The first sequence header among these OBUs; None where there is none, or one of a still picture."""
    for kind, payload in _obus(data):
        if kind == _SEQUENCE_HEADER:
            return _parse_sequence(_Bits(payload[:64]))
    return None


def is_droppable(data: bytes, sequence: SequenceHeader) -> bool:
    """Whether no picture in these OBUs refreshes a reference slot."""
    found = False
    for kind, payload in _obus(data):
        if kind in (_FRAME_HEADER, _FRAME):
            if _refreshes(_Bits(payload[:32]), sequence):
                return False
            found = True
    return found


def _obus(data: bytes) -> Iterator[tuple[int, bytes]]:
    """(type, payload). Ends early at one without a size or of a scalable stream: nothing is claimed about those."""
    position = 0
    while position < len(data):
        header = data[position]
        has_extension, has_size = header >> 2 & 1, header >> 1 & 1
        if has_extension or not has_size:
            yield _FRAME, _UNKNOWN
            return
        size, position = _leb128(data, position + 1)
        yield header >> 3 & 15, data[position : position + size]
        position += size


def _leb128(data: bytes, position: int) -> tuple[int, int]:
    value = 0
    for number, byte in enumerate(data[position : position + 8]):
        value |= (byte & 127) << number * 7
        if not byte & 128:
            return value, position + number + 1
    return len(data), len(data)


def _parse_sequence(bits: _Bits) -> SequenceHeader | None:
    bits(4)
    if bits(1):  # reduced_still_picture_header
        return None
    decoder_model, delay_bits, time_bits = False, 0, 0
    if bits(1):  # timing_info_present_flag
        bits(64)
        equal_interval = bits(1)
        if equal_interval:
            bits(bits.leading_zeros())
        decoder_model = bool(bits(1))
        if decoder_model:
            delay_bits = bits(5) + 1
            bits(37)
            time_bits = 0 if equal_interval else bits(5) + 1
            bits(5 if equal_interval else 0)
    _skip_operating_points(bits, decoder_model, delay_bits)
    width_bits, height_bits = bits(4) + 1, bits(4) + 1
    bits(width_bits + height_bits)
    frame_id_bits = bits(4) + 2 + bits(3) + 1 if bits(1) else 0
    bits(7)
    has_order_hint = bits(1)
    bits(2 if has_order_hint else 0)
    screen_content = _CHOOSE if bits(1) else bits(1)
    integer_mv = _CHOOSE
    if screen_content and not bits(1):
        integer_mv = bits(1)
    return SequenceHeader(
        decoder_model, time_bits, frame_id_bits, bits(3) + 1 if has_order_hint else 0, screen_content, integer_mv
    )


def _skip_operating_points(bits: _Bits, decoder_model: bool, delay_bits: int) -> None:
    has_display_delay = bits(1)
    for _ in range(bits(5) + 1):
        bits(12)
        if bits(5) > 7:  # seq_level_idx
            bits(1)
        if decoder_model and bits(1):
            bits(2 * delay_bits + 1)
        if has_display_delay and bits(1):
            bits(4)


def _refreshes(bits: _Bits, sequence: SequenceHeader) -> bool:
    """Whether the frame header refreshes a reference slot; True where that takes more of the header to tell."""
    if bits(1):  # show_existing_frame: may be a keyframe, and costs nothing to decode
        return True
    kind, is_shown = bits(2), bits(1)
    if kind == _SWITCH or (kind == _KEY and is_shown):
        return True
    bits(sequence.presentation_time_bits if is_shown else 1)  # the latter: showable_frame
    error_resilient = bits(1)
    bits(1)  # disable_cdf_update
    screen_content = bits(1) if sequence.screen_content == _CHOOSE else sequence.screen_content
    bits(1 if screen_content and sequence.integer_mv == _CHOOSE else 0)
    bits(sequence.frame_id_bits + 1 + sequence.order_hint_bits)
    if kind not in (_KEY, _INTRA_ONLY) and not error_resilient:
        bits(3)  # primary_ref_frame
    if sequence.decoder_model and bits(1):
        return True
    return bits(8) != 0
