# SPDX-License-Identifier: Apache-2.0
"""A plan for people: the work of a step, memory by phase, predicted times, what would help, layouts, frames."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from megatron_rl.planner.flops import step_flops
from megatron_rl.planner.gpus import GIB
from megatron_rl.planner.layout import trainer_name
from megatron_rl.planner.long_rl import Claim
from megatron_rl.planner.search import FrameLimit, Knob, Option, reason, suggested
from megatron_rl.planner.times import ASSUMED

SHOWN_KNOBS, SHOWN_LAYOUTS = 8, 5


def gib(size: float) -> str:
    return f"{size / GIB:.1f}"


def work_lines(option: Option) -> Iterator[RenderableType]:
    """What a step consists of, and how it is split."""
    case, work, packing = option.case, option.case.work, option.case.packing
    stages = [case.params(stage).total for stage in range(case.trainer.pipeline)]
    per_rank = f"{max(stages):,} parameters a rank" + (" of the fullest stage" if len(stages) > 1 else "")
    lines = [f"layout    {option.layout}; recompute {option.cfg.model.recompute}; {per_rank}"]
    if work.num_frames:
        size = f"{work.size_hw[1]} x {work.size_hw[0]}"
        lines.append(f"video     {work.num_frames:,} frames of {size} -> {work.video_tokens:,} tokens")
    lines += [
        f"step      {work.num_prompts} prompts of {work.prompt_tokens:,} tokens, {work.num_samples} responses of up to "
        f"{work.response_tokens:,} each",
        f"packing   {packing.num_microbatches} micro-batches of up to {case.largest:,} tokens a rank and update, "
        f"{case.rows:,} rows on the fullest rank; {packing.responses_a_bundle:.3g} responses share a prompt",
        f"engine    KV cache of {option.memory.engine.kv_tokens:,} tokens a replica: "
        f"{option.memory.engine.num_sequences} sequences decoded together",
    ]
    yield Text("\n".join(lines))


def memory_table(option: Option) -> Table:
    phases = option.memory.phases
    table = Table(title="Memory of the fullest GPU, GiB", title_justify="left")
    table.add_column("", overflow="fold")
    for phase in phases:
        stage = f"\n(stage {phase.stage})" if option.case.trainer.pipeline > 1 else ""
        table.add_column(phase.phase + stage, justify="right", overflow="fold")
    names = list(dict.fromkeys(name for phase in phases for name in phase.items))
    for name in names:
        cells = [gib(phase.items[name]) if name in phase.items else "" for phase in phases]
        table.add_row(name, *cells)
    table.add_section()
    table.add_row("in all", *(gib(phase.total) for phase in phases), style="bold")
    free = [option.memory.capacity - phase.total for phase in phases]
    table.add_row(f"free of {gib(option.memory.capacity)}", *(gib(size) for size in free))
    host = ", ".join(f"{name} {gib(size)}" for name, size in option.memory.host.items())
    table.caption, table.caption_justify = f"Host memory of a rank, GiB: {host}", "left"
    return table


def times_table(option: Option) -> Table:
    flops = step_flops(option.case)
    of = {
        "encode": flops.encode,
        "generate: prompts": flops.prefill,
        "generate: responses": flops.decode,
        "old log-probs": flops.log_probs,
        "reference": flops.log_probs,
        "update": flops.update,
    }
    table = Table(title="A step: FLOPs and predicted seconds", title_justify="left", caption_justify="left")
    for column in ("phase", "PFLOP, all GPUs", "predicted s"):
        table.add_column(column, justify="right" if column != "phase" else "left", overflow="fold")
    for phase, seconds in option.times.phases.items():
        table.add_row(phase, f"{of[phase] / 1e15:,.1f}" if phase in of else "", f"{seconds:,.1f}")
    table.add_section()
    table.add_row("step", f"{flops.total / 1e15:,.1f}", f"{option.times.step:,.1f}", style="bold")
    table.caption = (
        f"Predictions, not measurements: linears at {ASSUMED.linear:.0%} of the dense bf16 peak, attention "
        f"{ASSUMED.attention:.0%}, prefill {ASSUMED.prefill:.0%}, tower {ASSUMED.tower:.0%}, HBM {ASSUMED.hbm:.0%}, "
        f"links {ASSUMED.link:.0%}. Decoding of video files is not counted."
    )
    return table


def verdict(option: Option, problems: Sequence[str], knobs: Sequence[Knob]) -> Iterator[RenderableType]:
    """Whether the recipe fits; if not, what is in the way and which setting helps how much."""
    for problem in (*problems, *option.memory.engine.problems):
        yield Text(problem, style="red")
    if option.memory.fits:
        yield Text(f"It fits: {gib(-option.shortage)} GiB to spare.", style="red" if problems else "green")
        return
    for phase in option.memory.over:
        largest = sorted(phase.items, key=lambda name: -phase.items[name])[:3]
        parts = ", ".join(f"{name} {gib(phase.items[name])}" for name in largest)
        over = gib(phase.total - option.memory.capacity)
        yield Text(f"{phase.phase} does not fit: {over} GiB too much; the most is in {parts}", style="red")
    yield knobs_table(knobs)


def knobs_table(knobs: Sequence[Knob]) -> RenderableType:
    if not knobs:
        return Text("No single setting helps; see the layouts below.")
    table = Table(title="What would help, one setting at a time", title_justify="left")
    for column in ("setting", "peak, GiB", "then", "predicted s a step"):
        table.add_column(column, justify="left" if column in ("setting", "then") else "right", overflow="fold")
    for knob in knobs[:SHOWN_KNOBS]:
        option = knob.option
        fits = "fits" if option.memory.fits else reason(option)
        table.add_row(knob.setting, gib(option.memory.peak), fits, f"{option.times.step:,.0f}")
    return table


def faster(knob: Knob, option: Option) -> Text:
    seconds, peak = knob.option.times.step, gib(knob.option.memory.peak)
    return Text(
        f"Faster: {knob.setting} holds a prompt with all of its responses: {option.times.step:,.0f} -> "
        f"{seconds:,.0f} s predicted, peak {peak} GiB."
    )


def layouts_tables(options: Sequence[Option]) -> Iterator[RenderableType]:
    """The fastest that fit, and of each trainer's layout that does not the engine size that comes closest."""
    fitting = [o for o in options if o.memory.fits]
    table = Table(title=f"Layouts that fit: {len(fitting)} of {len(options)}", title_justify="left")
    for column in ("layout", "peak, GiB", "predicted s a step"):
        table.add_column(column, justify="left" if column == "layout" else "right", overflow="fold")
    for option in fitting[:SHOWN_LAYOUTS]:
        table.add_row(option.layout, gib(option.memory.peak), f"{option.times.step:,.0f}")
    yield table
    if (best := suggested(options)) is not None:
        sizes = best.cfg.parallel
        settings = f"parallel.tensor={sizes.tensor} parallel.pipeline={sizes.pipeline} parallel.context={sizes.context}"
        yield Text(
            f"Suggested: {settings} rollout.tensor={best.case.engine.tensor} ({best.times.step:,.0f} s predicted, "
            f"peak {gib(best.memory.peak)} GiB: nearly as fast as the fastest, with most memory to spare)"
        )
    others: dict[str, Option] = {}
    fit = {trainer_name(o.case.trainer) for o in fitting}
    for option in options[len(fitting) :]:
        if (name := trainer_name(option.case.trainer)) not in fit:
            others.setdefault(name, option)
    if others:
        table = Table(title="Why others do not", title_justify="left")
        table.add_column("trainer", overflow="fold")
        table.add_column("at best", overflow="fold")
        for name, option in others.items():
            table.add_row(name, reason(option))
        yield table


def limit_text(limit: FrameLimit, gpus: int) -> Text:
    """The most frames of the recipe's model on these GPUs."""
    if limit.option is None:
        return Text(f"Frames: not even one temporal patch fits on {gpus} GPUs: {limit.stopped_by}")
    tokens = limit.option.case.work.prompt_tokens
    return Text(
        f"Frames: up to {limit.num_frames:,} a video ({tokens:,} tokens a prompt) fit on {gpus} GPUs, with full "
        f"recomputation, rollout.kv_cache_gib={limit.option.cfg.rollout.kv_cache_gib:g} and {limit.option.layout}. "
        f"Beyond: {limit.stopped_by}."
    )


def claims_table(claims: Sequence[Claim], gpu: str) -> Table:
    frames = f"{claims[0].num_frames:,} frames"
    title = f"Long-RL's claim, planned on {gpu}: {frames} a video, and the most that fit"
    table = Table(title=title, title_justify="left", caption_justify="left")
    table.add_column("model", overflow="fold")
    table.add_column("GPUs", justify="right", overflow="fold")
    table.add_column(frames, overflow="fold")
    table.add_column("most frames", justify="right", overflow="fold")
    table.add_column("tokens", justify="right", overflow="fold")
    table.add_column("beyond", overflow="fold")
    for claim in claims:
        tokens = f"{claim.num_frames * claim.tokens_a_frame:,} tokens"
        if claim.option is not None:
            peak, seconds = gib(claim.option.memory.peak), claim.option.times.step
            answer = f"{tokens}: fit on {claim.option.layout}\npeak {peak} GiB, {seconds:,.0f} s a step predicted"
        else:
            answer = f"{tokens} do not fit: {claim.why_not}"
        found = claim.limit.option
        most = (f"{claim.limit.num_frames:,}", f"{found.case.work.prompt_tokens:,}") if found else ("none", "")
        table.add_row(claim.title, str(claim.gpus), answer, *most, claim.limit.stopped_by)
        table.add_section()
    cfg = next((c.limit.option.cfg for c in claims if c.limit.option is not None), None)
    if cfg is not None:
        table.caption = (
            f"One prompt a GPU and step, {cfg.rollout.num_samples} responses of {cfg.rollout.max_response_tokens} "
            "tokens, reference kept, full recomputation. The model's config.json must allow the length."
        )
    return table
