# SPDX-License-Identifier: Apache-2.0
"""Encode every video of a recipe ahead of training: `scripts/launch.sh megatron_rl.cache_videos RECIPE.yaml`.

Fills `data.cache_dir` with what the training and evaluation rows will ask for, on any number of ranks. What is there
already is checked and left alone, so a job that was stopped goes on where it was.

The recipe is the one that will run, for RL or for SFT: all of it is checked, what this job reads is `CacheConfig`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_rl.config.command_line import run_job
from megatron_rl.config.schema import CacheConfig
from megatron_rl.reading.command_line import check_data

FOLDER = "cache_videos"  # in run_dir: what could not be used


def main(argv: Sequence[str]) -> None:
    summary = (
        "Encode the videos of a recipe into data.cache_dir, ahead of training. Give it the recipe that will run: one\n"
        "for megatron_rl.train or for megatron_rl.sft."
    )
    run_job(argv, CacheConfig, "python -m megatron_rl.cache_videos", summary, run, check_data)


def run(cfg: CacheConfig) -> None:
    """The whole job on this rank."""
    fill_cache(cfg)


def fill_cache(cfg: CacheConfig) -> dict[str, float]:
    """Encode what is not in the cache; returns the counts of all ranks together. Collective."""
    from checkpoint_tools.console import follow, note
    from megatron_rl.media.prompt_prefetcher import build_prompts, encode_media
    from megatron_rl.observe.quarantine import Quarantine
    from megatron_rl.observe.step_metrics import media_metrics
    from megatron_rl.reading.inputs import FIELDS, build_prompt_builder, load_tokenizer, usable_rows
    from megatron_rl.runtime import parallel
    from megatron_rl.runtime.device import choose_backend
    from megatron_rl.runtime.grid import Grid
    from megatron_rl.runtime.watchdog import watch_world
    from megatron_rl.session import build_decoder, build_media_encoder, build_provider, build_step_encoder

    backend = choose_backend(cfg.device, cfg.model.dtype)
    alone = Grid(parallel.world_size())  # every rank encodes by itself
    parallel.join_world(backend)
    with watch_world(60 * cfg.max_phase_minutes) as watchdog:
        mesh = parallel.initialize(backend, alone, alone)
        watchdog.set_phase(0, "model")
        provider = build_provider(cfg)
        decoder = build_decoder(cfg, backend)
        builder = build_prompt_builder(cfg.data, load_tokenizer(cfg.model.hf), provider.specs, decoder)
        encoder = build_step_encoder(cfg, build_media_encoder(cfg, backend, provider), provider, decoder)
        quarantine = Quarantine(Path(cfg.run_dir) / FOLDER, mesh.rank == 0, max_fraction=1.0)
        datasets = [part for field in FIELDS for part in usable_rows(cfg.data, field, quarantine)]
        rows = [row for part in datasets for row in part]
        starts = range(0, len(rows), cfg.train.prompts_per_step)
        for start in follow(starts, len(starts), "encoding") if mesh.rank == 0 else starts:
            watchdog.set_phase(start // cfg.train.prompts_per_step, "encode")
            pairs = list(enumerate(rows))[start : start + cfg.train.prompts_per_step]
            prompts, bad_rows = build_prompts(pairs, builder, mesh)
            _, bad_videos = encode_media(prompts, encoder)
            quarantine.add([*bad_rows, *bad_videos], len(pairs), cfg.data.train)
            encoder.forget()
        counts = media_metrics(encoder.take_counts())
    parallel.shut_down()
    if mesh.rank == 0:
        note(_report(cfg, len(rows), counts, quarantine.total))
    return counts


def _report(cfg: CacheConfig, num_rows: int, counts: dict[str, float], num_bad: int) -> str:
    encoded, cached = (int(counts.get(f"vision/{name}_patches", 0)) for name in ("encoded", "cached"))
    text = f"{cfg.data.cache_dir}: videos of {num_rows} rows; {encoded} patches encoded, {cached} were there"
    return f"{text}; {num_bad} rows set aside, see {cfg.run_dir}/{FOLDER}/quarantine.jsonl" if num_bad else text


if __name__ == "__main__":
    main(sys.argv[1:])
