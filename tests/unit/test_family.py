# SPDX-License-Identifier: Apache-2.0
"""One reader of configurations, whatever their form, and one table of families."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from model_providers.family import FAMILIES, family_of, imported, read_config, shape_and_weights, text_section

TEXT = {"model_type": "qwen2", "hidden_size": 64, "rope_theta": 1e6}


def _write(folder: Path, config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    return folder


def test_a_flat_configuration_stays_as_it_is(tmp_path: Path) -> None:
    config = {**TEXT, "vision_config": {"depth": 2}}
    assert read_config(_write(tmp_path, config)) == config == read_config(tmp_path / "config.json")
    assert text_section(config) is config


def test_the_language_model_is_found_where_it_is_nested(tmp_path: Path) -> None:
    nested = read_config(_write(tmp_path / "a", {"model_type": "qwen2_5_vl", "text_config": TEXT}))
    assert text_section(nested) == TEXT
    thinker = {"model_type": "thinker", "text_config": TEXT, "audio_config": {"d_model": 8}}
    omni = read_config(_write(tmp_path / "b", {"model_type": "omni", "thinker_config": thinker, "talker_config": {}}))
    assert omni["model_type"] == "omni" and omni["audio_config"] == {"d_model": 8}
    assert text_section(omni) == TEXT


def test_folders_of_a_checkpoint_become_sections(tmp_path: Path) -> None:
    _write(tmp_path, {"model_type": "llava_llama", "fps": 2})
    _write(tmp_path / "llm", TEXT)
    _write(tmp_path / "vision_tower", {"model_type": "siglip_vision_model"})
    _write(tmp_path / "mm_projector", {"mm_projector_type": "mlp_downsample"})
    config = read_config(tmp_path)
    assert text_section(config) == TEXT and config["fps"] == 2
    assert config["vision_config"]["model_type"] == "siglip_vision_model"
    assert config["projector_config"] == {"mm_projector_type": "mlp_downsample"}


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "config.json is not readable"), ("[]", "config.json is not a JSON object"), (None, "has no config.json")],
)
def test_a_file_that_is_no_configuration_is_named(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        _write(tmp_path, text)
    with pytest.raises(ValueError, match=f"--model={tmp_path}: {message}.*; "):
        read_config(tmp_path, "--model")


def test_an_unknown_family_and_an_incomplete_configuration_are_refused() -> None:
    with pytest.raises(ValueError, match="model.hf=m: no provider for model_type=bert; one of .*qwen2, qwen2_5_vl"):
        family_of({"model_type": "bert"}, "m")
    with pytest.raises(ValueError, match="model.hf=m: config.json has no 'num_attention_heads'; give a complete one"):
        shape_and_weights(TEXT, "m")


def test_what_a_family_names_exists() -> None:
    for family in FAMILIES.values():
        for reference in (family.specs, family.positions, *family.encoders.values()):
            assert not reference or callable(imported(reference)), f"{family.name}: {reference}"


def test_the_table_costs_no_torch() -> None:
    code = "import sys, model_providers.family; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
