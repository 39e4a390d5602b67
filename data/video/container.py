# SPDX-License-Identifier: Apache-2.0
"""A media file opened with libavformat: nothing but that one file, its moving pictures, its packets."""

from __future__ import annotations

import functools
from collections.abc import Generator, Iterator
from contextlib import closing
from typing import cast

import av

from data.video.regular_file import regular_file
from megatron_rl.errors import VideoDecodeError

# Playlists and descriptions that name other files, which no sha256 of this one vouches for; and text played as a film.
_NAME_OTHER_FILES = frozenset({"concat", "hls", "dash", "imf", "sdp", "rtsp", "sap", "vobsub", "svg_pipe", "webvtt"})
_TEXT_FILMS = frozenset({"tty"})
_LIST_STARTS = (b"ffconcat", b"#EXTM3U", b"v=0", b"# VobSub")
_LIST_WORDS = (b"<MPD", b"CompositionPlaylist", b"<svg")
_WEBP = "a WebP animation, which FFmpeg cannot play; convert it to mp4"
_PICTURES_OF_ITS_NAME = "image2"  # opens a.jpg as it stands, but for a%d.jpg the files a1.jpg, a2.jpg, ...
_STILL = av.stream.Disposition.attached_pic | av.stream.Disposition.still_image


def open_media(path: str) -> av.container.InputContainer:
    """The file, opened. Raises VideoDecodeError for what is no file, for text, and for what would open other files;
    FFmpeg's errors and OSError for the rest.

    Formats that open other files are refused before they see this one, so that none of those is touched.
    """
    regular_file(path)
    try:
        return av.open(path, options={"format_whitelist": _formats("%" not in path), "protocol_whitelist": "file"})
    except av.FFmpegError as error:
        if why := _why_not(path, error):
            raise VideoDecodeError(path, why) from error
        raise


def cause(error: Exception) -> str:
    """An error in FFmpeg's own words, without the number that PyAV puts before them."""
    if isinstance(error, UnicodeDecodeError):
        return "text in its header is garbled"
    return error.strerror if isinstance(error, av.FFmpegError | OSError) and error.strerror else str(error)


def video_stream(path: str, container: av.container.InputContainer) -> av.VideoStream:
    """The moving pictures of the file. Cover pictures are none, wherever they stand; of several films the one that
    FFmpeg's av_find_best_stream prefers, else the first. Raises VideoDecodeError where there is none."""
    films = [stream for stream in container.streams.video if not stream.disposition & _STILL]
    if not films:
        kinds = ", ".join(sorted({_kind(stream) for stream in container.streams}))
        raise VideoDecodeError(path, f"no video stream{f' (only {kinds})' if kinds else ''}")
    best = container.streams.best("video") if len(films) > 1 else None
    film = best if isinstance(best, av.VideoStream) and best in films else films[0]
    if film.codec_context is None or film.codec_context.width == 0:
        if container.format.name == "webp_pipe":
            raise VideoDecodeError(path, _WEBP)
        raise VideoDecodeError(path, "unknown codec or picture size (damaged file?)")
    return film


def demux(container: av.container.InputContainer, stream: av.stream.Stream | None = None) -> Iterator[av.Packet]:
    """The packets that hold data, of one stream or of all, to the end of the file.

    PyAV 18 ends with an IndexError where a damaged file brings up streams that its header did not name: at the end it
    goes through all streams of libavformat, and has objects only for those of the header. And a generator of PyAV that
    is dropped half-way without being closed keeps a few hundred bytes for good.
    """
    read = container.demux() if stream is None else container.demux(stream)
    with closing(cast("Generator[av.Packet]", read)) as packets:
        while True:
            try:
                packet = next(packets, None)
            except IndexError:
                return
            if packet is None:
                return
            if packet.size and (stream is None or packet.stream is stream):
                yield packet


def stamp(packet: av.Packet) -> int | None:
    """When it is shown, or decoded where the file says no more."""
    return packet.dts if packet.pts is None else packet.pts


@functools.cache
def _formats(with_image_files: bool) -> str:
    """libavformat's names of the formats that read one file and no other, with commas between."""
    names = {name for names in av.formats_available for name in names.split(",")}
    refused = _NAME_OTHER_FILES | _TEXT_FILMS
    return ",".join(sorted(names - refused - (set() if with_image_files else {_PICTURES_OF_ITS_NAME})))


def _kind(stream: av.stream.Stream) -> str:
    return "a cover picture" if stream.type == "video" else stream.type


def _why_not(path: str, error: av.FFmpegError) -> str:
    with open(path, "rb") as file:
        head = file.read(4096)
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if text.startswith(_LIST_STARTS) or any(word in text for word in _LIST_WORDS):
        return "a list of other files, not a video; name those files"
    if isinstance(error, av.ArgumentError):  # the format is not one of the allowed
        return "a text file, or a picture whose name (with a %) stands for others"
    return ""
