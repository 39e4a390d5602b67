# SPDX-License-Identifier: Apache-2.0
"""Whether a media file is all there, by the sizes that its container states: a cut one promises bytes that it lacks.

mp4 and its kin (ISO 14496-12, boxes), Matroska and WebM (RFC 8794, the segment), RIFF (AVI), ASF (WMV), Ogg
(RFC 3533, the last page) and MPEG-TS (packets of one size). Other containers state nothing; nor does a file that was
cut exactly between two parts.
"""

from __future__ import annotations

import os
from typing import BinaryIO

_BOXES_WITH_MEDIA = (b"moov", b"moof", b"mdat")
_SEGMENT = bytes.fromhex("18538067")
_EBML = bytes.fromhex("1a45dfa3")
_ASF_HEADER = bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c")
_ASF_DATA = bytes.fromhex("3626b2758e66cf11a6d900aa0062ce6c")
_RIFF_SLACK = 1024  # bytes by which some writers are off
_TS_PACKET = 188
_LAST_PAGES = 1 << 17  # an Ogg page has at most 65,307 bytes


def missing_bytes(path: str) -> int:
    """How many bytes the file lacks at its end; 0 where it is whole, or where its container does not tell."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        head = file.read(32)
        if head[:4] == _EBML:
            stated = _end_of_segment(file)
        elif head[:4] == b"RIFF" and head[8:12] == b"AVI ":
            stated = _end_of_riff(file, size)
        elif head[:16] == _ASF_HEADER:
            stated = _end_of_asf(file)
        elif head[:4] == b"OggS":
            stated = _end_of_ogg(file, size)
        elif head[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"styp", b"pnot"):
            stated = _end_of_boxes(file, size)
        elif head[:1] == b"\x47":
            stated = _end_of_ts(file, size)
        else:
            return 0
    return max(stated - size, 0)


def _end_of_boxes(file: BinaryIO, size: int) -> int:
    """Where the last box that matters ends."""
    position = end = 0
    while position + 8 <= size:
        file.seek(position)
        header = file.read(16)
        length, kind = int.from_bytes(header[:4], "big"), header[4:8]
        if length == 1:
            length = int.from_bytes(header[8:16], "big")
        if length == 0:  # up to the end of the file
            return size
        if length < 8:
            return end  # no box: what stands behind the last one is not ours to judge
        position += length
        if kind in _BOXES_WITH_MEDIA:
            end = position
    return end


def _end_of_segment(file: BinaryIO) -> int:
    """End of the first Matroska segment; 0 for one of unknown size (live recordings)."""
    position = 0
    for _ in range(4):
        file.seek(position)
        header = file.read(12)
        if len(header) < 12:
            return 0
        id_length = 4 if header[0] & 0xF0 == 0x10 else 1
        length = 9 - header[id_length].bit_length()
        if length > 8:
            return 0
        size = int.from_bytes(header[id_length : id_length + length], "big") & (1 << 7 * length) - 1
        unknown = size == (1 << 7 * length) - 1
        position += id_length + length
        if header[:4] == _SEGMENT:
            return 0 if unknown else position + size
        position += size
    return 0


def _end_of_riff(file: BinaryIO, size: int) -> int:
    """AVI files over 1 GB are several RIFF chunks, one behind the other."""
    position = 0
    while position + 12 <= size:
        file.seek(position)
        kind, length = file.read(4), int.from_bytes(file.read(4), "little")
        if kind != b"RIFF" or length in (0, 0xFFFFFFFF):  # behind the last one, or written to a pipe
            return 0
        position += 8 + length + length % 2
    return position - _RIFF_SLACK


def _end_of_asf(file: BinaryIO) -> int:
    file.seek(16)
    position = int.from_bytes(file.read(8), "little")
    file.seek(position)
    kind, length = file.read(16), int.from_bytes(file.read(8), "little")
    return position + length if kind == _ASF_DATA and length > 50 else 0


def _end_of_ogg(file: BinaryIO, size: int) -> int:
    """End of the last page that begins in the file."""
    start = max(size - _LAST_PAGES, 0)
    file.seek(start)
    tail = file.read()
    at = tail.rfind(b"OggS\0")
    if at < 0:
        return 0
    num_segments = tail[at + 26] if at + 26 < len(tail) else 0
    table = tail[at + 27 : at + 27 + num_segments]
    return start + at + 27 + num_segments + sum(table)


def _end_of_ts(file: BinaryIO, size: int) -> int:
    """End of the packet that the file ends in."""
    file.seek(0)
    start = file.read(4 * _TS_PACKET + 1)
    is_ts = len(start) > 4 * _TS_PACKET and set(start[::_TS_PACKET]) == {0x47}
    return -(-size // _TS_PACKET) * _TS_PACKET if is_ts else 0
