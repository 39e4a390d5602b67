# SPDX-License-Identifier: Apache-2.0
"""What the documents name is there: files, keys of a recipe, modules that are run."""

from __future__ import annotations

import ast
import importlib.util
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_rl.config.io import keys_of
from megatron_rl.config.schema import RlConfig, SftConfig
from megatron_rl.rewards.registry import load_reward
from megatron_rl.types import Completion, Prompt, Row

REPO = Path(__file__).parents[2]
DOCUMENTS = sorted([*REPO.glob("*.md"), *REPO.glob("docs/*.md")])
SOURCES = r"[\w./*-]+\.(?:py|sh|sbatch|lock|jinja)"
MADE_BY_A_RUN = {"run.lock"}
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
        if not re.fullmatch(SOURCES, name) or name.startswith("path/") or name in MADE_BY_A_RUN:
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


METRIC_GROUPS = (
    "actor correction critic data eval prompt_length response_length reward rollout sft sync timing_s vision"
)
METRIC = re.compile(rf"(?:{METRIC_GROUPS.replace(' ', '|')})(?:/[a-z_]+)+")


def described_metrics() -> set[str]:
    """Names in docs/metrics.md."""
    return set(filter(METRIC.fullmatch, _quoted(REPO / "docs/metrics.md")))


def test_every_metric_is_described() -> None:
    """The names that stand whole in the source; tests/dist/test_jobs.py looks at those that a run has logged."""
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in REPO.glob("megatron_rl/**/*.py")]
    constants = {node.value for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    names = {text for text in constants if isinstance(text, str) and METRIC.fullmatch(text)}
    missing = names - described_metrics() - {"critic/score", "timing_s/rollout"}  # the first half of a name; an example
    assert len(names) > 30 and sorted(missing) == []


def test_no_metric_is_described_that_is_gone() -> None:
    source = "\n".join(path.read_text(encoding="utf-8") for path in REPO.glob("megatron_rl/**/*.py"))
    words = set(re.findall(r"\w+", source))
    assert sorted(name for name in described_metrics() if name.rpartition("/")[2] not in words) == []


def test_the_reward_in_contributing_scores_answers(tmp_path: Path) -> None:
    text = (REPO / "CONTRIBUTING.md").read_text(encoding="utf-8")
    code = re.search(r"^    def score\(.*?\n\n", text, re.MULTILINE | re.DOTALL)
    assert code is not None and "reward.terms: {accuracy: 0.9, short: 0.1}" in text
    (tmp_path / "reward.py").write_text(textwrap.dedent(code[0]))
    reward = load_reward(f"{tmp_path}/reward.py:score", {"accuracy": 0.9, "short": 0.1})
    prompts = [Prompt(i, Row(f"rows.jsonl:{i}", "?", answer), (1,)) for i, answer in enumerate("AB")]
    said = [(0, " A", 65), (0, "B", 64), (1, "B\n", 64)]
    completions = [Completion(p, 0, (1,) * length, (0.0,) * length, text, False) for p, text, length in said]
    assert [parts["overall"] for parts in reward(prompts, completions)] == [0.9, 0.1, 1.0]
