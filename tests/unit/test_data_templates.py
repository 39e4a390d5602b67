# SPDX-License-Identifier: Apache-2.0
"""Templates of others: they may not run code, and may not run for ever."""

from __future__ import annotations

import signal
import threading
import time

import pytest

from data.rows import prompts, templates
from data.rows.templates import TooSlow, template_problems, time_limit
from tests.unit.test_data_prompts import make, tokenizer  # noqa: F401  fixtures

ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}{{ content }}"


def test_a_prompt_format_that_runs_code_is_refused(tmp_path):
    file = tmp_path / "f.jinja"
    file.write_text(f"{{{{ cycler.__init__.__globals__.os.popen('touch {tmp_path}/x').read() }}}}{{{{ content }}}}")
    [problem] = template_problems(str(file))
    assert problem.startswith(f"data.format_prompt={file}: cannot be rendered (access to attribute")
    assert not (tmp_path / "x").exists()


def test_a_prompt_format_without_an_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(templates, "RENDER_SECONDS", 0.2)
    file = tmp_path / "f.jinja"
    file.write_text(ENDLESS)
    [problem] = template_problems(str(file))
    assert problem == f"data.format_prompt={file}: takes over 0.2 s to render; correct its loops"


def test_a_chat_template_without_an_end_is_refused(make, tokenizer, monkeypatch):  # noqa: F811
    monkeypatch.setattr(prompts, "RENDER_SECONDS", 0.2)
    monkeypatch.setattr(tokenizer, "chat_template", ENDLESS)
    with pytest.raises(ValueError, match=r"model\.hf: its chat template takes over 0\.2 s to render"):
        make(tokenizer=tokenizer)


def test_a_time_limit_leaves_other_timers_alone():
    seen = []
    before = signal.signal(signal.SIGALRM, lambda *_: seen.append(1))
    try:
        signal.setitimer(signal.ITIMER_REAL, 100.0)
        with pytest.raises(TooSlow), time_limit(0.01):
            time.sleep(5)
        assert 0 < signal.getitimer(signal.ITIMER_REAL)[0] <= 100.0 and not seen
        with time_limit(50.0):
            pass
        assert signal.getitimer(signal.ITIMER_REAL)[0] > 50.0
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_other_threads_have_no_limit():
    done = []

    def work() -> None:
        with time_limit(0.001):
            time.sleep(0.05)
        done.append(1)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [1]
