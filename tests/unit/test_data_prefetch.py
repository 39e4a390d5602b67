# SPDX-License-Identifier: Apache-2.0
"""Background decoding: the right frames, in order, within the budget, errors where the frames are taken."""

from __future__ import annotations

import threading

import pytest
import torch

from data.video.prefetch import FramePrefetcher, FrameRequest
from megatron_rl.errors import VideoDecodeError
from megatron_rl.types import VideoInfo

SIZE = (4, 8)


class FakeDecoder:
    """Frames filled with their index. Waits for `gate`; counts what has been decoded and not been let go."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.order: list[str] = []
        self.threads: set[str] = set()

    def probe(self, path: str) -> VideoInfo:
        raise NotImplementedError

    def decode(self, path, frame_indices, size_hw):
        self.gate.wait(30)
        self.order.append(path)
        self.threads.add(threading.current_thread().name.split("_")[0])
        if path == "bad":
            raise VideoDecodeError(path, "moov lost")
        values = torch.tensor(frame_indices, dtype=torch.uint8).view(-1, 1, 1, 1)
        return values.expand(-1, 3, *size_hw).contiguous()


def request(path: str, *frames: int) -> FrameRequest:
    return FrameRequest(path, frames, SIZE)


def test_frames_come_as_asked_and_in_the_background():
    decoder = FakeDecoder()
    prefetcher = FramePrefetcher(decoder, 1 << 20)
    asked = [request(name, number, number + 1) for number, name in enumerate("abcd")]
    prefetcher.ask(asked)
    for number, one in enumerate(asked):
        frames = prefetcher.take(one)
        assert frames.shape == (2, 3, *SIZE) and frames[:, 0, 0, 0].tolist() == [number, number + 1]
    assert decoder.order == list("abcd") and decoder.threads == {"decode"}
    assert prefetcher.num_bytes == 0


def test_no_more_is_decoded_than_the_budget_allows():
    decoder = FakeDecoder()
    one = request("a", 1).num_bytes
    assert one == 3 * 4 * 8
    prefetcher = FramePrefetcher(decoder, 2 * one)
    asked = [request(name, 1) for name in "abcd"]
    decoder.gate.clear()
    prefetcher.ask(asked)
    assert prefetcher.num_bytes == 2 * one
    decoder.gate.set()
    for item in asked:
        prefetcher.take(item)
        assert prefetcher.num_bytes <= 2 * one
    assert sorted(decoder.order) == list("abcd")


def test_without_a_budget_frames_are_decoded_where_they_are_taken():
    decoder = FakeDecoder()
    prefetcher = FramePrefetcher(decoder, 0)
    prefetcher.ask([request("a", 1)])
    assert decoder.order == []
    assert prefetcher.take(request("a", 1)).shape == (1, 3, *SIZE)
    assert decoder.threads == {"MainThread"}


def test_what_was_not_asked_for_is_decoded_all_the_same():
    prefetcher = FramePrefetcher(FakeDecoder(), 1 << 20)
    prefetcher.ask([request("a", 1)])
    assert prefetcher.take(request("b", 7))[0, 0, 0, 0] == 7
    assert prefetcher.take(request("a", 1))[0, 0, 0, 0] == 1
    assert prefetcher.take(request("a", 1))[0, 0, 0, 0] == 1, "a second time it is decoded again"


def test_a_bad_file_is_an_error_where_it_is_taken_and_nowhere_else():
    prefetcher = FramePrefetcher(FakeDecoder(), 1 << 20)
    prefetcher.ask([request("bad", 1), request("good", 2)])
    assert prefetcher.take(request("good", 2))[0, 0, 0, 0] == 2
    with pytest.raises(VideoDecodeError, match="moov lost"):
        prefetcher.take(request("bad", 1))


def test_dropped_requests_are_not_decoded():
    decoder = FakeDecoder()
    prefetcher = FramePrefetcher(decoder, 1 << 20)
    decoder.gate.clear()
    prefetcher.ask([request(name, 1) for name in "abc"])
    prefetcher.drop()
    assert prefetcher.num_bytes == 0
    decoder.gate.set()
    prefetcher.ask([request("d", 1)])
    assert prefetcher.take(request("d", 1)).shape == (1, 3, *SIZE)
    assert decoder.order[-1] == "d" and set(decoder.order) <= {"a", "d"}
