# SPDX-License-Identifier: Apache-2.0
"""Make the quick start's data set: `make_videos.py OUT [--train 512] [--eval 128] [--seed 0]`.

Real mp4 files, half H.264 with B-frames and half VP9, each showing a coloured square that moves over dim noise. The
question is the same for every video, so only the pixels tell the answer. `warmup.jsonl` pairs the training videos with
random letters: it teaches the form of an answer and nothing else.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np

COLOURS = {"A": (225, 30, 30), "B": (30, 200, 40), "C": (40, 60, 230), "D": (230, 215, 30)}
QUESTION = "Which colour moves? A red B green C blue D yellow"
NUM_FRAMES, FPS = 12, 8
SIZE, SQUARE = 64, 24
NOISE = 70  # brightest background value: dim beside every colour
# The ultrafast preset (plus the B-frames it leaves out) gives the same bytes every time; x264's look-ahead does not.
CODECS = {
    "h264": ("libx264", {"preset": "ultrafast", "bf": "2", "g": "12", "crf": "20", "threads": "1"}),
    "vp9": ("libvpx-vp9", {"deadline": "realtime", "cpu-used": "8", "b": "0", "crf": "24", "threads": "1"}),
}


@dataclass(frozen=True)
class MadeVideo:
    """One video to make: its name, the letter of its colour, and the codec to encode it with."""

    name: str
    answer: str
    codec: str


def plan_clips(split: str, num_clips: int) -> list[MadeVideo]:
    """Letters balanced, and each letter balanced over the codecs."""
    letters, codecs = list(COLOURS), list(CODECS)
    return [
        MadeVideo(f"videos/{split}_{i:04d}.mp4", letters[i % len(letters)], codecs[i // len(letters) % len(codecs)])
        for i in range(num_clips)
    ]


def draw_frames(rng: np.random.Generator, colour: tuple[int, int, int]) -> np.ndarray:
    """uint8 [F, H, W, 3]: the square starts anywhere, moves in a straight line and bounces off the border."""
    frames = rng.integers(0, NOISE, (NUM_FRAMES, SIZE, SIZE, 3), dtype=np.uint8)
    room = SIZE - SQUARE
    position = rng.uniform(0, room, 2)
    angle = rng.uniform(0, 2 * np.pi)
    velocity = rng.uniform(1.5, 4.0) * np.array([np.sin(angle), np.cos(angle)])
    for t in range(NUM_FRAMES):
        folded = np.abs((position + t * velocity + room) % (2 * room) - room)  # triangle wave: reflection at 0 and room
        y, x = np.rint(folded).astype(int)
        frames[t, y : y + SQUARE, x : x + SQUARE] = colour
    return frames


def encode(path: Path, frames: np.ndarray, codec: str) -> None:
    encoder, options = CODECS[codec]
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream(encoder, rate=FPS, options=options)
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height, stream.pix_fmt = SIZE, SIZE, "yuv420p"
        for image in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))


def write_rows(path: Path, clips: list[MadeVideo], answers: list[str]) -> None:
    rows = (
        {"problem": QUESTION, "answer": answer, "videos": [clip.name], "problem_type": "colour"}
        for clip, answer in zip(clips, answers, strict=True)
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def make_split(out: Path, split: str, num_clips: int, rng: np.random.Generator) -> list[MadeVideo]:
    clips = plan_clips(split, num_clips)
    for clip in clips:
        encode(out / clip.name, draw_frames(rng, COLOURS[clip.answer]), clip.codec)
    order = [clips[i] for i in rng.permutation(num_clips)]
    write_rows(out / f"{split}.jsonl", order, [clip.answer for clip in order])
    return order


def make_dataset(out: Path, num_train: int, num_eval: int, seed: int) -> None:
    (out / "videos").mkdir(parents=True, exist_ok=True)
    train_rng, eval_rng, warmup_rng = (np.random.default_rng([seed, stream]) for stream in range(3))
    train = make_split(out, "train", num_train, train_rng)
    make_split(out, "eval", num_eval, eval_rng)
    write_rows(out / "warmup.jsonl", train, [str(letter) for letter in warmup_rng.choice(list(COLOURS), num_train)])


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the videos and questions of the quick start.")
    parser.add_argument("out", type=Path, help="folder for train.jsonl, eval.jsonl, warmup.jsonl and videos/")
    parser.add_argument("--train", type=int, default=512, help="number of training videos (default: 512)")
    parser.add_argument("--eval", type=int, default=128, help="number of held-out videos (default: 128)")
    parser.add_argument("--seed", type=int, default=0, help="seed of every random choice (default: 0)")
    args = parser.parse_args()
    make_dataset(args.out, args.train, args.eval, args.seed)
    print(f"{args.out}: {args.train} training and {args.eval} held-out videos, half H.264, half VP9")


if __name__ == "__main__":
    main()
