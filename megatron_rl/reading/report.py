# SPDX-License-Identifier: Apache-2.0
"""An inspection for people, and as JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict

from megatron_rl.reading.inspection import NUM_LISTED, Inspection, SeenPrompt
from megatron_rl.types import MediaItem

BAR = 40  # characters of the longest bar
NUM_BINS = 8
NUM_TIMES = 8  # frames that are written out


def as_json(inspection: Inspection) -> dict[str, object]:
    """What `--json` writes."""
    return {
        "usable": inspection.num_usable,
        "set_aside": [asdict(row) for row in inspection.set_aside],
        "unused_columns": list(inspection.unused_columns),
        "rows": [
            {
                "source": seen.source,
                "prompt_text": seen.text,
                "answer": seen.answer,
                "num_tokens": seen.num_tokens,
                "media": [_media_json(item) for item in seen.media],
            }
            for seen in inspection.seen
        ],
    }


def _media_json(item: MediaItem) -> dict[str, object]:
    return {
        "kind": item.kind,
        "path": item.path,
        "num_frames": item.num_frames,
        "frame_indices": list(item.frame_indices),
        "timestamps": list(item.timestamps),
        "size_hw": list(item.size_hw),
        "num_tokens": item.num_tokens,
    }


def as_text(inspection: Inspection) -> str:
    kinds = Counter(row.kind for row in inspection.set_aside)
    counts = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
    lines = [line for number, seen in enumerate(inspection.seen, start=1) for line in _seen_lines(number, seen)]
    lines += [f"usable rows: {inspection.num_usable}", f"set aside: {len(inspection.set_aside)}"]
    lines[-1] += f" ({counts})" if counts else ""
    lines += [f"  {row.source} [{row.kind}]: {row.reason}" for row in inspection.set_aside[:NUM_LISTED]]
    if len(inspection.set_aside) > NUM_LISTED:
        lines.append(f"  ... and {len(inspection.set_aside) - NUM_LISTED} more; --json lists all")
    lines += [] if inspection.unused_columns else ["columns that nothing uses: none"]
    lines += [f"note: {text}" for text in inspection.notes]  # with the columns
    lines += histogram(inspection.lengths)
    return "\n".join(lines)


def histogram(lengths: Sequence[int]) -> list[str]:
    """Prompt lengths in equal bins, one a line."""
    if not lengths:
        return ["prompt tokens: no prompt was built"]
    low, high = min(lengths), max(lengths)
    width = max(-(-(high - low + 1) // NUM_BINS), 1)
    bins = Counter((length - low) // width for length in lengths)
    most = max(bins.values())
    title = f"prompt tokens of {len(lengths)} rows: {low} to {high}, {sum(lengths) / len(lengths):.0f} on average"
    return [title, *(_bar(low + n * width, width, bins[n], most) for n in range((high - low) // width + 1))]


def _bar(first: int, width: int, count: int, most: int) -> str:
    return f"  {first:>7} - {first + width - 1:<7} {'#' * -(-count * BAR // most):<{BAR}} {count}"


def _seen_lines(number: int, seen: SeenPrompt) -> Iterator[str]:
    yield f"row {number}, {seen.source}: {seen.num_tokens} tokens"
    yield from (f"  | {line}" for line in seen.text.splitlines())
    yield f"  answer: {seen.answer}"
    for item in seen.media:
        height, width = item.size_hw
        yield f"  {item.kind} {item.path}: {item.num_frames} frames of {width} x {height}, {item.num_tokens} tokens"
        if item.kind == "video":
            pairs = list(zip(item.frame_indices, item.timestamps, strict=True))
            shown = ", ".join(f"{index} ({time:.2f} s)" for index, time in pairs[:NUM_TIMES])
            yield f"    frames {shown}{' ...' if len(pairs) > NUM_TIMES else ''}"
    yield ""
