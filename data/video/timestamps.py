# SPDX-License-Identifier: Apache-2.0
"""Clocks of video files that repeat a time or go back: ascending times, as near to the file's as can be.

As for FFmpeg, the order of the frames is the order in which a decoder gives them.
"""

from __future__ import annotations

import numpy as np

from data.video.container import demux, open_media, video_stream

_COMES_BACK_WITHIN = 64  # frames; a clock that is behind for longer was set back
_REORDERED = 16  # places: B pictures in a row, at most, of x264 and x265; for more a decoder is asked
NEVER_REORDERED = frozenset({"vp8", "vp9", "av1", "gif", "apng"})
"""Codecs whose packets stand in the file in the order in which they are shown, keyframes or not."""


def tells_order(times: np.ndarray) -> bool:
    """Whether int64 [P] times of pictures in decoding order can be those of their showing: no two alike, and none
    far from its place."""
    ranks = np.argsort(np.argsort(times, kind="stable"))
    return len(set(times.tolist())) == len(times) and bool((np.abs(ranks - np.arange(len(times))) <= _REORDERED).all())


def ascending(times: np.ndarray) -> np.ndarray | None:
    """int64 [F] frames in the order in which they are shown -> the same, each later than the one before.

    A frame that is not later than the one before is put a tick behind it; a single one far ahead is put a tick behind
    its own predecessor. Where the clock goes back and stays back (recordings that were joined), it goes on from there
    with the usual step. None for a clock that stands still.
    """
    steps = np.diff(times)
    if not (steps > 0).any():
        return None if len(times) > 1 else times
    usual = max(int(np.median(steps[steps > 0])), 1)
    made: list[int] = []
    shift = 0
    for number, time in enumerate(times.tolist()):
        now = time + shift
        if made and now <= made[-1]:
            following = times[number + 1 : number + 1 + _COMES_BACK_WITHIN] + shift
            if not len(following) or following.max() > made[-1]:
                now = made[-1] + 1
            elif len(made) > 1 and made[-2] + 1 < now:
                made[-1] = made[-2] + 1
            else:
                shift += made[-1] + usual - now
                now = made[-1] + usual
        made.append(now)
    return np.asarray(made, np.int64)


def order_of_pictures(path: str) -> list[int]:
    """Numbers of the packets whose pictures come out of a decoder, in that order: the whole file is decoded.

    Empty where pictures cannot be told apart by their packets. Each packet gets its number for a timestamp.
    """
    order: list[int | None] = []
    with open_media(path) as container:
        stream = video_stream(path, container)
        for number, packet in enumerate(demux(container, stream)):
            packet.pts, packet.dts = number, None
            order += [frame.pts for frame in stream.codec_context.decode(packet)]
        order += [frame.pts for frame in stream.codec_context.decode(None)]
    known = [number for number in order if number is not None]
    return known if len(set(known)) == len(order) else []
