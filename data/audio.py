# SPDX-License-Identifier: Apache-2.0
"""Sound: mono samples on the clock of the pictures, and the spectrogram that a model family makes of them.

Sample i of what `decode_audio` gives is heard at i / rate seconds after the first frame of the video (of a file without
pictures: after its first sound). A track that begins later, or pauses by its timestamps, is silent there; what lies
before the first frame is cut. Priming samples and edit lists are FFmpeg's business. Damage is an error, never silence.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import av
import numpy as np

from data.video.container import cause, demux, open_media
from data.video.index_store import index_video
from data.video.whole_file import missing_bytes
from megatron_rl.errors import VideoDecodeError

if TYPE_CHECKING:
    from av.container import InputContainer

RATE = 16_000
_PAUSE_SECONDS = 0.05  # timestamps that jump by less are rounded ones
_MISSING_SECONDS = 0.5
_STATES_DURATION = (
    "mov,mp4,m4a,3gp,3g2,mj2",
    "wav",
    "flac",
)  # in the header, exactly, however much of the file is left


def decode_audio(path: str, span: tuple[float, float] = (0.0, math.inf), rate: int = RATE) -> np.ndarray:
    """float32 [samples] in [-1, 1]: the first audio track of a sound or video file, the mean of all channels.

    `span` (start, end) seconds, exact to a sample; what the track does not have at its end is left out. Raises
    VideoDecodeError where there is no sound, or where the track is cut or damaged.
    """
    try:
        with open_media(path) as container:
            if not container.streams.audio:
                raise VideoDecodeError(path, "has no audio track")
            origin = _first_picture(path, container)
            window = _Window(round(span[0] * rate), math.inf if math.isinf(span[1]) else round(span[1] * rate))
            for seconds, samples in _mono(path, container, rate):
                origin = seconds if origin is None else origin
                if not window.put(round((seconds - origin) * rate), samples):
                    break
            else:
                _check_complete(path, container, window.position / rate + (origin or 0.0))
    except (av.error.FFmpegError, OSError) as error:
        raise VideoDecodeError(path, f"its sound cannot be read: {cause(error)}") from error
    return window.samples()


def log_mel(samples: np.ndarray, folder: str | Path, rate: int = RATE) -> np.ndarray:
    """float32 [mel, frames] by the Hugging Face feature extractor of the checkpoint in `folder`, without padding."""
    from transformers import AutoFeatureExtractor

    extractor = AutoFeatureExtractor.from_pretrained(folder)
    if extractor.sampling_rate != rate:
        raise ValueError(
            f"rate={rate}: the model of {folder} hears {extractor.sampling_rate} samples a second; use that"
        )
    made = extractor(
        samples,
        sampling_rate=rate,
        padding="longest",
        truncation=False,
        return_attention_mask=True,
        return_tensors="np",
    )
    return made["input_features"][0][:, : int(made["attention_mask"][0].sum())]


class _Window:
    """Samples [first, stop) of a line of which pieces arrive in order; a gap between them is silence."""

    def __init__(self, first: int, stop: float):
        self._first, self._stop = first, stop
        self._parts: list[np.ndarray] = []
        self.position = 0  # up to which the line is known

    def put(self, at: int, samples: np.ndarray) -> bool:
        """`samples` begin at number `at`; whether more is wanted."""
        if at > self.position:
            self._keep(np.zeros(at - self.position, np.float32))
        self._keep(samples[max(0, self.position - at) :])
        return self.position < self._stop

    def samples(self) -> np.ndarray:
        return np.concatenate([np.zeros(0, np.float32), *self._parts])

    def _keep(self, samples: np.ndarray) -> None:
        wanted = slice(max(0, self._first - self.position), None)
        if not math.isinf(self._stop):
            wanted = slice(wanted.start, max(0, int(self._stop) - self.position))
        self._parts.append(samples[wanted].copy())
        self.position += len(samples)


def _first_picture(path: str, container: InputContainer) -> float | None:
    """Second of the first frame on the container's clock; None for a file without moving pictures."""
    if not any(not s.disposition & av.stream.Disposition.attached_pic for s in container.streams.video):
        return None
    index = index_video(path)
    return 0.0 if index.by_number else float(index.pts[0]) * index.time_base


def _mono(path: str, container: InputContainer, rate: int) -> Iterator[tuple[float, np.ndarray]]:
    """(second of its first sample, float32 samples) of each stretch of sound whose timestamps follow each other."""
    resampler, begins, num_out, expected = None, 0.0, 0, math.nan
    for frame in _frames(path, container):
        seconds = expected if frame.pts is None else float(frame.pts * (frame.time_base or 0))
        if resampler is None or abs(seconds - expected) > _PAUSE_SECONDS:
            if resampler is not None:
                yield begins + num_out / rate, _joined(resampler.resample(None))
            resampler, begins, num_out = av.AudioResampler("fltp", frame.layout, rate), seconds, 0
        expected = seconds + frame.samples / frame.sample_rate
        frame.pts = None  # the resampler would fill pauses by itself
        samples = _joined(resampler.resample(frame))
        yield begins + num_out / rate, samples
        num_out += len(samples)
    if resampler is not None:
        yield begins + num_out / rate, _joined(resampler.resample(None))


def _frames(path: str, container: InputContainer) -> Iterator[av.AudioFrame]:
    stream = container.streams.audio[0]
    decoder = stream.codec_context
    for packet in demux(container, stream):
        if packet.is_corrupt:
            at = "" if packet.pts is None else f" at {float(packet.pts * (packet.time_base or 0)):.1f} s"
            raise VideoDecodeError(path, f"its sound is cut or damaged{at}")
        yield from decoder.decode(packet)
    yield from decoder.decode(None)


def _joined(frames: list[av.AudioFrame]) -> np.ndarray:
    """All channels mixed alike, as librosa does."""
    return np.concatenate([np.zeros(0, np.float32), *(frame.to_ndarray().mean(0) for frame in frames)])


def _check_complete(path: str, container: InputContainer, end: float) -> None:
    """`end`: second at which the sound stopped."""
    if num_bytes := missing_bytes(path):
        raise VideoDecodeError(path, f"its sound is cut: {num_bytes:,} bytes that its container states are missing")
    stream = container.streams.audio[0]
    if container.format.name not in _STATES_DURATION or stream.duration is None:
        return
    stated = float(((stream.start_time or 0) + stream.duration) * (stream.time_base or 0))
    if end < stated - _MISSING_SECONDS:
        raise VideoDecodeError(path, f"its sound is cut: it ends at {end:.1f} s of {stated:.1f} s")
