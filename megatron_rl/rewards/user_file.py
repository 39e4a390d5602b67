# SPDX-License-Identifier: Apache-2.0
"""A function out of a user's Python file: `path/to/file.py:function`."""

from __future__ import annotations

import importlib.util
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_rl.types import Completion, Prompt

UserFunction = Callable[["Sequence[Prompt]", "Sequence[Completion]"], "Sequence[Mapping[str, object]]"]


def load_function(name: str, path: Path, function: str) -> UserFunction:
    """The function of the file at `path`; `name` is the value of reward.name, for messages.

    The file may import the modules beside it: its folder is searched last, so that it hides nothing installed. Raises
    ValueError when the file does not exist, cannot be run, or has no such function.
    """
    if path.suffix != ".py" or not path.is_file():
        raise ValueError(f"reward.name={name}: there is no Python file {path}; write path/to/file.py:function")
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.append(folder)
    spec = importlib.util.spec_from_file_location(f"user_reward_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickling in the user's file look their module up here
    try:
        spec.loader.exec_module(module)
    except (ImportError, SyntaxError, NameError, AttributeError, TypeError, ValueError, LookupError, OSError) as error:
        del sys.modules[spec.name]
        raise ValueError(f"reward.name={name}: {' '.join(_why(error, path).split())}") from error
    found = getattr(module, function, None)
    if not callable(found):
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise ValueError(
            f"reward.name={name}: {path} has no function '{function}'; it has {', '.join(known) or 'none'}"
        )
    return found


def _why(error: Exception, path: Path) -> str:
    """Where in the file, what, and what to do about it."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename} line {error.lineno}: {error.msg}; correct it"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename) == path]
    place = f"{path} line {lines[-1]}" if lines else str(path)
    told = f"{place}: {type(error).__name__}: {error}"
    if not isinstance(error, ImportError):
        return f"{told}; correct it"
    top = (error.name or "").partition(".")[0]
    hidden = sys.modules.get(top)
    if hidden is not None and (path.parent / f"{top}.py").is_file():
        where = getattr(hidden, "__file__", None)
        if where != str(path.resolve().parent / f"{top}.py"):
            return f"{told}; {top}.py beside it is hidden by {where or 'a built-in module'}: rename it"
    return f"{told}; install it, or put the module beside the file"
