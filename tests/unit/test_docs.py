# SPDX-License-Identifier: Apache-2.0
"""What the documents name is there: files, keys of a recipe, modules that are run."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_rl.config.io import keys_of
from megatron_rl.config.schema import RlConfig, SftConfig

REPO = Path(__file__).parents[2]
DOCUMENTS = sorted([*REPO.glob("*.md"), *REPO.glob("docs/*.md")])
SOURCES = r"[\w./*-]+\.(?:py|sh|sbatch|lock|jinja)"
ROOTS = ("", "megatron_rl/", "tests/unit/")
KEYS = set(keys_of(RlConfig)) | set(keys_of(SftConfig))
SECTIONS = {key.partition(".")[0] for key in KEYS if "." in key}
GONE = {"reward.format_weight"}
"""Keys that CHANGELOG names to say what replaces them."""


def _quoted(document: Path) -> Iterator[str]:
    yield from re.findall(r"`([^`\n]+)`", document.read_text(encoding="utf-8"))


def _missing_files(document: Path) -> list[str]:
    """Files in backquotes that are not there. A bare name stands for one beside the file named before it."""
    missing, folder = [], REPO
    for name in _quoted(document):
        if re.fullmatch(r"(megatron_rl|model_providers|data|checkpoint_tools|scripts|tests)/(?:[\w/]*/)?", name):
            folder = REPO / name
            missing += [] if folder.exists() else [name]
        if not re.fullmatch(SOURCES, name) or name.startswith("path/"):
            continue
        if "/" in name:
            found = [path for root in ROOTS for path in REPO.glob(root + name)]
            folder = found[0].parent if found else folder
        else:
            found = [path for path in (folder / name, REPO / name) if path.exists()]
        missing += [] if found else [name]
    return missing


def _is_known(key: str, document: Path) -> bool:
    """Whether a schema has the key, or has it as a mapping whose keys are the user's (reward.terms.accuracy)."""
    above = key.rpartition(".")[0]
    is_mapping = above in KEYS and not any(other.startswith(f"{above}.") for other in KEYS)
    return key in KEYS or is_mapping or (document.name == "CHANGELOG.md" and key in GONE)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_files_that_a_document_names_are_there(document: Path) -> None:
    assert _missing_files(document) == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    targets = re.findall(r"\]\(((?!https?:)[^)#]+)", document.read_text(encoding="utf-8"))
    assert [target for target in targets if not (document.parent / target).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_keys_that_a_document_names_are_in_a_schema(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    named = {f"{section}.{rest}" for section, rest in re.findall(r"(?<![\w./])([a-z]+)\.([a-z_.]*[a-z_])=", text)}
    named |= {key for key in _quoted(document) if re.fullmatch(r"[a-z]+(\.[a-z_]+)+", key)}
    keys = {key for key in named if key.partition(".")[0] in SECTIONS and not key.endswith((".py", ".json", ".md"))}
    assert sorted(key for key in keys if not _is_known(key, document)) == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_commands_that_a_document_shows_can_be_run(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    modules = set(re.findall(r"\b(?:python -m|launch\.sh(?: --\w+ \S+)*|train\.sbatch) ([a-z_]+(?:\.[a-z_]+)?)", text))
    assert sorted(name for name in modules if importlib.util.find_spec(name) is None) == []
    scripts = set(re.findall(r"\b(?:bash|python) ((?:scripts|tests)/\S+?\.(?:sh|py))", text))
    assert sorted(name for name in scripts if not (REPO / name).exists()) == []


def test_a_name_that_leads_nowhere_is_found(tmp_path: Path) -> None:
    document = tmp_path / "a.md"
    document.write_text(
        "`megatron_rl/loop.py`, `train.py`, `gone.py`, `data/video/dali.py`, `train.py`, `docs`, `data/no/`"
    )
    assert _missing_files(document) == ["gone.py", "train.py", "data/no/"]
