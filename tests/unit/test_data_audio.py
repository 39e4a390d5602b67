# SPDX-License-Identifier: Apache-2.0
"""Sound against tones whose samples are known, on the clock of the pictures; features against transformers'."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from data.audio import RATE, decode_audio, log_mel
from data.rows.loader import fingerprint
from megatron_rl.errors import VideoDecodeError
from megatron_rl.types import Row
from tests.video_files import Kind, write_video

SECONDS = 3.0
LOSSLESS = [
    ("a.wav", "pcm_s16le", 48000),
    ("a.wav", "pcm_s16le", 16000),
    ("a.flac", "flac", 44100),
    ("a.mkv", "flac", 8000),
]
LOSSY = [("a.m4a", "aac", 48000), ("a.mp3", "libmp3lame", 44100), ("a.ogg", "libopus", 48000)]


def tone(rate: int, seconds: float = SECONDS, hertz: float = 440.0) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(round(rate * seconds)) / rate)).astype(np.float32)


def encode(stream, rate: int, channels: np.ndarray, begins: float = 0.0) -> list:
    """Packets of an audio stream; `channels` [C, samples], the first of them at that second."""
    layout = stream.layout.name
    frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(channels), format="fltp", layout=layout)
    frame.sample_rate, frame.time_base, frame.pts = rate, Fraction(1, rate), round(begins * rate)
    cutter = av.AudioResampler(stream.format, layout, rate, frame_size=stream.frame_size or 1024)
    frames = [*cutter.resample(frame), *cutter.resample(None)]
    return [packet for frame in [*frames, None] for packet in stream.encode(frame)]


def write_sound(path: Path, codec: str, rate: int, channels: np.ndarray) -> str:
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, layout="stereo" if len(channels) == 2 else "mono")
        container.mux(encode(stream, rate, channels))
    return str(path)


def write_film(path: Path, begins: float, picture: str) -> str:
    """The pictures of another file, and a tone that begins at that second of the container's clock."""
    with av.open(picture) as given, av.open(str(path), "w") as container:
        pictures = container.add_stream_from_template(given.streams.video[0])
        sound = container.add_stream("flac", rate=48000, layout="mono")
        for packet in given.demux(given.streams.video[0]):
            if packet.size:
                packet.stream = pictures
                container.mux(packet)
        container.mux(encode(sound, 48000, tone(48000)[None], begins))
    return str(path)


@pytest.mark.parametrize(("name", "codec", "rate"), LOSSLESS)
def test_samples_are_those_of_the_tone(tmp_path, name, codec, rate):
    got = decode_audio(write_sound(tmp_path / name, codec, rate, np.stack([tone(rate)] * 2)))
    assert got.dtype == np.float32 and len(got) == round(SECONDS * RATE)
    inner = slice(400, -400)  # a resampler's filter begins and ends in silence
    assert np.abs(got - tone(RATE))[inner].max() < 1e-4


@pytest.mark.parametrize(("name", "codec", "rate"), LOSSY)
def test_what_lossy_codecs_prepend_is_cut(tmp_path, name, codec, rate):
    got = decode_audio(write_sound(tmp_path / name, codec, rate, np.stack([tone(rate)] * 2)))
    assert round(SECONDS * RATE) <= len(got) <= round(SECONDS * RATE) + 1200  # a last block may be filled up
    assert np.abs(got[800:40_000] - tone(RATE)[800:40_000]).max() < 0.03


def test_channels_are_mixed_alike(tmp_path):
    opposite = np.stack([tone(RATE), -tone(RATE)])
    assert np.abs(decode_audio(write_sound(tmp_path / "a.wav", "pcm_s16le", RATE, opposite))).max() < 1e-4
    one = np.stack([tone(RATE), np.zeros_like(tone(RATE))])
    mixed = decode_audio(write_sound(tmp_path / "b.wav", "pcm_s16le", RATE, one))
    assert np.abs(mixed - tone(RATE) / 2).max() < 1e-4


def test_a_span_is_the_slice_of_the_whole(tmp_path):
    path = write_sound(tmp_path / "a.flac", "flac", 44100, tone(44100)[None])
    whole = decode_audio(path)
    for start, stop in ((0.0, 1.0), (0.5, 1.75), (1.23456, 2.0), (2.9, 9.0), (5.0, 6.0)):
        expected = whole[round(start * RATE) : round(stop * RATE)]
        assert np.array_equal(decode_audio(path, (start, stop)), expected)


@pytest.mark.parametrize("begins", [0.0, 0.75])
def test_sound_stands_on_the_clock_of_the_pictures(tmp_path, begins):
    picture = write_video(tmp_path / "pictures.mkv", Kind("libx264", {"g": "15", "bf": "0"}), 50)
    got = decode_audio(write_film(tmp_path / "film.mkv", begins, picture))
    silent = round(begins * RATE)
    assert not got[:silent].any()
    assert len(got) == silent + round(SECONDS * RATE)
    # Matroska rounds timestamps to milliseconds
    assert np.abs(got[silent + 800 : -800] - tone(RATE)[800:-800]).max() < 0.002


def test_a_pause_is_silent(tmp_path):
    """Timestamps that jump, as in a recording that was interrupted."""
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=RATE, layout="mono")
        packets = encode(stream, RATE, tone(RATE, 2.0)[None])
        breaks = next(packet.pts for packet in packets if packet.pts >= RATE)
        for packet in packets:
            if packet.pts >= breaks:
                packet.pts, packet.dts = packet.pts + RATE, packet.dts + RATE
            container.mux(packet)
    got = decode_audio(str(path))
    rounding = RATE // 1000  # Matroska's timestamps are milliseconds
    assert abs(len(got) - 3 * RATE) <= rounding
    assert not got[breaks + rounding : breaks + RATE - rounding].any()
    assert np.abs(got[:breaks] - tone(RATE, 2.0)[:breaks]).max() < 1e-4


CUT = {"a.wav": "pcm_s16le", "a.flac": "flac", "a.m4a": "aac", "a.mka": "flac", "a.oga": "flac", "a.opus": "libopus"}


@pytest.mark.parametrize(("name", "codec"), CUT.items())
def test_a_cut_file_is_refused(tmp_path, name, codec):
    path = Path(write_sound(tmp_path / name, codec, 48000, tone(48000)[None]))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(VideoDecodeError, match="its sound (is cut|cannot be read)"):
        decode_audio(str(path))


def test_what_has_no_sound_says_so(tmp_path):
    silent = write_video(tmp_path / "silent.mp4", Kind("libx264"), 5)
    with pytest.raises(VideoDecodeError, match="has no audio track"):
        decode_audio(silent)
    with pytest.raises(VideoDecodeError, match="No such file"):
        decode_audio(str(tmp_path / "no.wav"))


def test_log_mel_is_the_extractors_without_padding(tmp_path):
    """On thirty seconds, where the extractor of Whisper, Qwen2-Audio and Qwen2.5-Omni pads nothing."""
    from transformers import WhisperFeatureExtractor

    extractor = WhisperFeatureExtractor(feature_size=128, chunk_length=30)
    extractor.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "preprocessor_config.json").read_text())["feature_size"] == 128
    long, short = tone(RATE, 30.0), tone(RATE, 4.0)
    theirs = extractor(long, sampling_rate=RATE, return_tensors="np")["input_features"][0]
    assert np.array_equal(log_mel(long, tmp_path), theirs) and theirs.shape == (128, 3000)
    assert log_mel(short, tmp_path).shape == (128, 400)
    with pytest.raises(ValueError, match="rate=8000: the model of .* hears 16000"):
        log_mel(short, tmp_path, rate=8000)


def test_rows_that_differ_in_sound_alone_are_other_rows():
    row = Row("a:1", "p", "a")
    assert fingerprint([row]) != fingerprint([Row("a:1", "p", "a", audios=("/x.wav",))])
