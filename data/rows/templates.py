# SPDX-License-Identifier: Apache-2.0
"""Templates that others wrote: the prompt format of a recipe, and the chat template of a checkpoint.

Both are rendered in a sandbox (transformers brings its own), and once at the start under a time limit, because a
template may loop for as long as it likes.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import jinja2
import jinja2.meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

RENDER_SECONDS = 10.0


class TooSlow(Exception):
    """A template was still being rendered when its time was over."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TooSlow in the block when it takes longer. Only the main thread can be interrupted; others have no limit.

    A timer that runs already goes on afterwards with what was left of it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(_number: int, _frame: FrameType | None) -> None:
        raise TooSlow

    before = signal.signal(signal.SIGALRM, stop)
    left, interval = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, left, interval)
        signal.signal(signal.SIGALRM, before)


def read_format_prompt(path: str) -> jinja2.Template | None:
    """The template of `data.format_prompt`; None where none is named."""
    if not path:
        return None
    environment = ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined)
    return environment.from_string(Path(path).expanduser().read_text(encoding="utf-8").strip())


def template_problems(path: str) -> list[str]:
    """What is wrong with the user's prompt format."""
    name, file = f"data.format_prompt={path}", Path(path).expanduser()
    if not file.is_file():
        return [f"{name}: no such file; give a Jinja file that uses {{{{ content }}}}"]
    try:
        text = file.read_text(encoding="utf-8")
        variables = jinja2.meta.find_undeclared_variables(ImmutableSandboxedEnvironment().parse(text))
    except UnicodeDecodeError as error:
        return [f"{name}: not UTF-8 (byte {error.start}); save it as UTF-8"]
    except jinja2.TemplateSyntaxError as error:
        return [f"{name}: line {error.lineno}: {error.message}; correct the template"]
    if variables != {"content"}:
        return [f"{name}: uses the variables {sorted(variables)}; it must use `content`, the problem, and no other"]
    return _render_problems(path, name)


def _render_problems(path: str, name: str) -> list[str]:
    template = read_format_prompt(path)
    assert template is not None
    try:
        with time_limit(RENDER_SECONDS):
            template.render(content="What is shown?")
    except TooSlow:
        return [f"{name}: takes over {RENDER_SECONDS:g} s to render; correct its loops"]
    except (jinja2.TemplateError, ArithmeticError, LookupError, OverflowError, TypeError, ValueError) as error:
        return [f"{name}: cannot be rendered ({error}); correct the template"]
    return []
