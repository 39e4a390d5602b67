# SPDX-License-Identifier: Apache-2.0
"""A reward of the user's own: its result checked, and taken as people return it."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import TYPE_CHECKING, NoReturn

from megatron_rl.rewards.terms import OVERALL, with_overall

if TYPE_CHECKING:
    from megatron_rl.rewards.user_file import UserFunction
    from megatron_rl.types import Completion, Prompt


@dataclass(frozen=True)
class UserReward:
    """A user's function, with its result checked: one dict of parts per completion.

    A part is a number (of Python or NumPy, or an array or tensor without dimensions), a text for the log, or None: this
    completion has no such part. Without `terms` the function gives "overall" itself. With `terms` it gives parts only,
    in every row all that `terms` names; where it declares the `parts` that rows may have, a row may lack some, which
    then add nothing.
    """

    name: str
    function: UserFunction
    terms: Mapping[str, float] = field(default_factory=dict)
    parts: tuple[str, ...] = ()

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[dict[str, float | str]]:
        results = self.function(prompts, completions)
        if not isinstance(results, (list, tuple)) or len(results) != len(completions):
            found = f"{len(results)} items" if isinstance(results, (list, tuple)) else type(results).__name__
            wanted = f"{len(completions)} completions; return a list with one dict for each"
            raise ValueError(f"reward.name={self.name}: returned {found} for {wanted}")
        return [self._checked(parts) for parts in results]

    def _checked(self, parts: object) -> dict[str, float | str]:
        if not isinstance(parts, Mapping):
            self._refuse(f"{parts!r} for one completion; return a dict of its parts")
        texts = {key: part for key, part in parts.items() if isinstance(part, str)}
        scalars = {key: part for key, part in parts.items() if part is not None and key not in texts}
        found = {key: as_number(part) for key, part in scalars.items()}
        finite = {key: value for key, value in found.items() if value is not None}
        wrong = [f"{key}={scalars[key]!r}" for key, value in found.items() if value is None]
        if wrong:
            self._refuse(f"{', '.join(wrong)}; return finite numbers, or text for the log")
        if problem := self._problem(finite, texts):
            self._refuse(problem)
        return {**(with_overall(finite, self.terms) if self.terms else finite), **texts}

    def _problem(self, finite: Mapping[str, float], texts: Mapping[str, str]) -> str | None:
        for name in (*self.terms, OVERALL):
            if name in texts:
                return f"{name}={texts[name]!r}, a text; return a number as {name}"
        if not self.terms:
            fix = f"return a dict with the key '{OVERALL}', or set reward.terms to the weights of the parts"
            return None if OVERALL in finite else f"{dict(finite)!r}; {fix}"
        if OVERALL in finite:
            return (
                f"'{OVERALL}' itself, and reward.terms would make it of the parts; empty reward.terms or return parts"
            )
        missing = [name for name in self.terms if name not in finite]
        if self.parts and len(missing) == len(self.terms):
            return f"{dict(finite)!r}, none of reward.terms ({', '.join(missing)}); name a part of that row there"
        if missing and not self.parts:
            fix = "return it in every row, or declare the parts that rows may have: <function>.parts = (...)"
            return f"{dict(finite)!r}, without {', '.join(missing)} of reward.terms; {fix}"
        return None

    def _refuse(self, problem: str) -> NoReturn:
        raise ValueError(f"reward.name={self.name}: returned {problem}")


def as_number(value: object) -> float | None:
    """The float that a part is; None for what is no finite number. An array or tensor counts when it has no dimensions;
    torch is not imported for that."""
    if getattr(value, "shape", None) == () and callable(item := getattr(value, "item", None)):
        value = item()
    if not isinstance(value, (numbers.Real, Decimal)):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def declared_parts(name: str, function: UserFunction) -> tuple[str, ...]:
    """The names in the attribute `parts` of a user's function; empty where it has none."""
    parts = getattr(function, "parts", ())
    if not isinstance(parts, tuple) or not all(isinstance(part, str) for part in parts):
        raise ValueError(f"reward.name={name}: its parts are {parts!r}; use a tuple of names")
    return parts
