# SPDX-License-Identifier: Apache-2.0
"""What the first bytes of a compressed picture tell: whether another picture can refer to it, whether it is shown.

ITU-T H.264 7.4.1 (nal_ref_idc), H.265 7.4.2.2 (sub-layer non-reference pictures), ISO 14496-2 and 13818-2 (B pictures),
RFC 6386 9.1 and the VP9 bitstream specification 6.2 (show_frame); for AV1 see av1.py. VP9 pictures are never called
droppable: one leaves motion vectors behind for the next even when nothing refers to its pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from data.video.av1 import is_droppable, sequence_header

_AV1C_BYTES = 4  # of the configuration record, before the OBUs
_HEVC_LAST_SUBLAYER_PICTURE = 15
_HEVC_LAST_PICTURE, _H264_PICTURES, _NAL_REF_IDC = 31, (1, 2, 3, 4, 5), 0x60
_MPEG4_VOP, _MPEG4_B = b"\0\0\1\xb6", 2
_MPEG2_PICTURE, _MPEG2_B = b"\0\0\1\0", 3


class PacketParser:
    """Reads packets of one stream. `extradata` is the decoder configuration record of the container."""

    def __init__(self, codec: str, extradata: bytes | None):
        self._codec = codec
        self._length_size = _length_size(codec, extradata or b"")
        self._av1 = sequence_header((extradata or b"")[_AV1C_BYTES:]) if codec == "av1" else None

    def sublayer(self, packet: memoryview) -> int | None:
        """None for a picture that others may refer to. Otherwise its temporal sub-layer: only pictures of a higher
        sub-layer can refer to it, so in the highest one of the stream nothing does."""
        if self._codec == "h264":
            return self._h264_sublayer(packet)
        if self._codec == "hevc":
            return self._hevc_sublayer(packet)
        if self._codec == "av1":
            return self._av1_sublayer(bytes(packet))
        if self._codec == "mpeg4":
            return _all_b(bytes(packet), _MPEG4_VOP, lambda data: data[0] >> 6 == _MPEG4_B)
        if self._codec == "mpeg2video":
            return _all_b(bytes(packet), _MPEG2_PICTURE, lambda data: data[1] >> 3 & 7 == _MPEG2_B)
        return None

    def is_shown(self, packet: memoryview) -> bool:
        """False for the hidden reference pictures of VP8 and VP9, which no decoder gives out."""
        if self._codec == "vp8":
            return bool(packet[0] >> 4 & 1)
        if self._codec == "vp9":
            is_superframe = packet[len(packet) - 1] & 0xE0 == 0xC0
            return is_superframe or bool(packet[0] & 0b1000) or bool(packet[0] & 0b10)
        return True

    def _h264_sublayer(self, packet: memoryview) -> int | None:
        found = None
        for start in self._nal_units(packet):
            header = packet[start]
            if header & 31 in _H264_PICTURES:
                if header & _NAL_REF_IDC:
                    return None
                found = 0
        return found

    def _hevc_sublayer(self, packet: memoryview) -> int | None:
        found = None
        for start in self._nal_units(packet):
            kind = packet[start] >> 1 & 63
            if kind <= _HEVC_LAST_PICTURE:
                if kind > _HEVC_LAST_SUBLAYER_PICTURE or kind % 2 or start + 1 >= len(packet):
                    return None
                found = (packet[start + 1] & 7) - 1
        return found

    def _av1_sublayer(self, packet: bytes) -> int | None:
        """The sequence header stands in the container, or in the first packet and at keyframes."""
        self._av1 = sequence_header(packet[:256]) or self._av1
        return 0 if self._av1 and is_droppable(packet, self._av1) else None

    def _nal_units(self, packet: memoryview) -> Iterator[int]:
        """Where their headers stand."""
        return self._length_prefixed(packet) if self._length_size else _after_start_codes(packet)

    def _length_prefixed(self, packet: memoryview) -> Iterator[int]:
        size, position = self._length_size, 0
        while position + size < len(packet):
            yield position + size
            position += size + int.from_bytes(packet[position : position + size], "big")


def _length_size(codec: str, extradata: bytes) -> int:
    """Bytes of a NAL unit's length; 0 = start codes (MPEG-TS, raw streams)."""
    if codec == "h264" and len(extradata) > 4 and extradata[0] == 1:
        return (extradata[4] & 3) + 1
    if codec == "hevc" and len(extradata) > 21 and extradata[0] == 1:
        return (extradata[21] & 3) + 1
    return 0


def _after_start_codes(packet: memoryview) -> Iterator[int]:
    data = bytes(packet)
    position = data.find(b"\0\0\1")
    while 0 <= position < len(data) - 3:
        yield position + 3
        position = data.find(b"\0\0\1", position + 3)


def _all_b(data: bytes, start_code: bytes, is_b: Callable[[bytes], bool]) -> int | None:
    """0 if the packet holds pictures and all are of type B. (Packed streams have several in one packet.)"""
    position, found = data.find(start_code), False
    while position >= 0:
        header = data[position + 4 : position + 6]
        if len(header) < 2 or not is_b(header):
            return None
        found = True
        position = data.find(start_code, position + 4)
    return 0 if found else None
