"""Rewards: what an answer earns, as the sum over functions of weight * reward.

    exact_match, numeric, ...  the metrics of evaluate/metrics.py, of what the answer says and what its row expects, 0 to 1
    format:REGEX               1 where the whole answer matches, its thought, line breaks and all, else 0
    length:N                   1 at N tokens, 1/N less for each token more or fewer, 0 at least
    FILE.py:FUNCTION           one's own: f(prompts=[str], completions=[str], **columns) -> [float or None], as TRL calls them.
                               `columns` are lists too: every other column of the rows, and of ours `expected`, `messages` (the
                               turns that were asked, or None), `said` (the completions without their thoughts) and
                               `completion_ids`. It gets those that it names, or all with **
    model:DIR                  a reward model's: a checkpoint with a score head of one number, read through its own template

None means no reward: the function is left out of that answer's sum.
"""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import math
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sftjax import hosts
from sftjax.check import METRICS, shown
from sftjax.config import UserError, mistake, parts
from sftjax.data.chat import as_dict
from sftjax.evaluate.heldout import Question
from sftjax.evaluate.metrics import METRICS as SCORES
from sftjax.hf.load import resolve
from sftjax.hf.peft_read import base_of
from sftjax.train.manifest import hash_weights

KNOWN = tuple(name for name in METRICS if name in SCORES)


class Answered(NamedTuple):
    """A prompt and what the policy said: `ids` with the token that ended it, where `stopped`."""

    question: Question
    columns: dict[str, Any]  # the row's other columns
    ids: list[int]
    stopped: bool
    text: str
    said: str  # of the text, without the thought


Reward = Callable[[Sequence[Answered]], Sequence[float | None]]


class Rewards:
    """`Rewards("exact_match,length:20", "1,0.5")(answers)`. Raises UserError for what is no reward function.

    `model` makes one of the directory in model:DIR.
    """

    def __init__(self, specs: Any, weights: Any = (), *, key: str = "grpo.rewards", model: Callable[[str], Reward] | None = None):
        if callable(specs) or any(map(callable, () if isinstance(specs, str) else specs)):
            raise UserError(
                f"{key}: takes a function by its file, so that a run can be resumed: write it into one, FILE.py:FUNCTION"
            )
        names = [str(spec).strip() for spec in parts(specs)]
        if not names:
            raise UserError(f"{key} names no reward function; e.g. --config.{key}=exact_match or --config.{key}=rewards.py:mine")
        if twice := next((name for i, name in enumerate(names) if name in names[:i]), None):
            raise UserError(f"{key}: {twice} is named twice; name it once, with the sum of its weights")
        given = weights if isinstance(weights, (tuple, list)) else parts(str(weights))
        try:
            self.weights = np.array([float(weight) for weight in given] or [1.0] * len(names))
        except ValueError:
            self.weights = np.array([np.nan])
        if not np.isfinite(self.weights).all():
            raise UserError(f"--config.{key.rpartition('.')[0]}.reward_weights={shown(weights)}: needs numbers, e.g. 1,0.5")
        if len(self.weights) != len(names):
            raise UserError(
                f"{key.rpartition('.')[0]}.reward_weights: {len(self.weights)} weights for the {len(names)} functions of {key}"
            )
        self.functions = {short(name, names): function(name, key, model) for name in names}
        self.models = {short(name, names) for name in names if name.startswith("model:")}

    def __call__(self, answers: Sequence[Answered]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """(rewards [N], {function: its rewards [N], nan where it has none}). Raises UserError where a function is at fault."""
        each = {name: self.of(name, answers) for name in self.functions}
        if (lost := np.flatnonzero(np.all(np.isnan([*each.values()]), axis=0))).size:
            place = answers[lost[0]].question.where
            raise UserError(f"{place}: none of the reward functions ({', '.join(each)}) has a reward for an answer to this row")
        weighted = [w * np.nan_to_num(x) for w, x in zip(self.weights, each.values(), strict=True)]
        return np.sum(weighted, axis=0), each

    def of(self, name: str, answers: Sequence[Answered]) -> np.ndarray:
        """One function's, on every host what the first found: its own functions may draw, or ask a server, and are called once.
        A model lies on the devices of all hosts, which call it together."""
        found = np.zeros(len(answers))
        with hosts.agreeing():
            if hosts.first() or name in self.models:
                found = checked(name, self.functions[name](answers), len(answers))
        return hosts.of_first(found)


def fingerprint(specs: Any) -> str:
    """sha256 of the files that reward functions are in, and of the models that reward: what their names do not tell."""
    digest = hashlib.sha256()
    for kind, _, rest in (str(spec).strip().partition(":") for spec in parts(specs)):
        if kind.endswith(".py"):
            digest.update(Path(kind).read_bytes())
        if kind == "model":
            adapter = Path(rest).expanduser()
            beside = (adapter / "adapter_config.json").is_file()
            for directory in (adapter, resolve(base_of(adapter))) if beside else (resolve(rest),):
                digest.update(hash_weights(directory).encode())
    return digest.hexdigest()


def short(name: str, names: Sequence[str]) -> str:
    """What metrics call it: of one's own the function's name, of a model `model`; the whole where that is not enough."""
    kind, colon, rest = name.partition(":")
    brief = name if not colon else rest if kind.endswith(".py") else kind
    others = [other.partition(":") for other in names if other != name]
    return name if any(brief in (other[0], other[2]) for other in others) else brief


def function(name: str, key: str, model: Callable[[str], Reward] | None) -> Reward:
    kind, colon, rest = name.partition(":")
    if not colon and name in KNOWN:
        return metric(name)
    if kind == "format" and rest:
        return formatted(rest, key)
    if kind == "length":
        return near(rest, key)
    if kind == "model" and rest and model:
        try:
            return model(rest)
        except UserError as e:
            raise UserError(f"--config.{key}={name}: {e}") from e
    if kind.endswith(".py") and rest:
        return own(Path(kind), rest, key)
    raise UserError(
        f"--config.{key}={name}: is no reward function; there are {', '.join(KNOWN)}, format:REGEX, length:N, FILE.py:FUNCTION "
        "and model:DIR"
    )


def metric(name: str) -> Reward:
    def run(answers: Sequence[Answered]) -> list[float | None]:
        return [None if (e := a.question.expected) is None else float(SCORES[name](a.said, e)) for a in answers]

    return run


def formatted(pattern: str, key: str) -> Reward:
    try:
        regex = re.compile(pattern, re.DOTALL)
    except re.error as e:
        raise UserError(f"--config.{key}=format:{pattern}: is no regular expression: {e}") from e
    return lambda answers: [float(regex.fullmatch(a.text) is not None) for a in answers]


def near(text: str, key: str) -> Reward:
    if not text.isdecimal() or not int(text):
        raise UserError(f"--config.{key}=length:{text}: needs a number of tokens, e.g. length:20")
    n = int(text)
    return lambda answers: [max(0.0, 1 - abs(len(a.ids) - n) / n) for a in answers]


def own(file: Path, name: str, key: str) -> Reward:
    place = f"{file}:{name}"
    if not file.is_file():
        raise UserError(f"--config.{key}={place}: no such file")
    spec = importlib.util.spec_from_file_location(f"sftjax_rewards_{file.stem}", file)
    assert spec and spec.loader
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # a dataclass in it looks there for its types
    try:
        spec.loader.exec_module(module)
    except Exception as e:  # whatever a user's own program raises
        raise UserError(f"{where(file, e)}: {type(e).__name__}: {mistake(e)}") from e
    fn = getattr(module, name, None)
    if not callable(fn):
        raise UserError(f"--config.{key}={place}: {file} has no function {name}")
    named = {n: p for n, p in inspect.signature(fn).parameters.items() if p.kind is not p.VAR_POSITIONAL}
    takes_all = any(p.kind is p.VAR_KEYWORD for p in named.values())

    def run(answers: Sequence[Answered]) -> Any:
        given = table(answers)
        lacks = [n for n, p in named.items() if p.default is p.empty and p.kind is not p.VAR_KEYWORD and n not in given]
        if lacks:
            raise UserError(f"{place}: asks for {', '.join(lacks)}, and the rows have {', '.join(given)}")
        try:
            found = fn(**(given if takes_all else {n: given[n] for n in named if n in given}))
            return list(found) if isinstance(found, Iterator) else found  # a generator fails where it is read
        except Exception as e:  # likewise
            raise UserError(f"{where(file, e)}: {name} failed: {type(e).__name__}: {mistake(e)}") from e

    return run


def table(answers: Sequence[Answered]) -> dict[str, list[Any]]:
    """What a function of one's own may ask for, each a list with an entry an answer."""
    columns = {name for a in answers for name in a.columns}
    return {name: [a.columns.get(name) for a in answers] for name in sorted(columns)} | {
        "prompts": [a.question.prompt for a in answers],
        "completions": [a.text for a in answers],
        "said": [a.said for a in answers],
        "completion_ids": [a.ids for a in answers],
        "expected": [a.question.expected for a in answers],
        "messages": [[*map(as_dict, a.question.messages)] or None for a in answers],
    }


def checked(name: str, found: Any, n: int) -> np.ndarray:
    """[n] float64, nan for None. Raises UserError where it is anything else than n numbers."""
    try:
        values = list(found)
    except TypeError:
        raise UserError(f"{name}: returned {type(found).__name__}, must be a list with a number for each answer") from None
    if len(values) != n:
        raise UserError(f"{name}: returned {len(values)} rewards for {n} answers")
    for i, value in enumerate(values):
        if value is not None and not (isinstance(value, (Real, np.bool_)) and math.isfinite(float(value))):
            raise UserError(f"{name}: its reward for answer {i + 1} is {value!r}, must be a finite number or None")
    return np.array([np.nan if value is None else float(value) for value in values])


def where(file: Path, e: Exception) -> str:
    """`file:line` of the user's own line that failed."""
    frames = traceback.extract_tb(e.__traceback__)
    lines = [frame.lineno for frame in frames if Path(frame.filename).resolve() == file.resolve()]
    return f"{file}:{lines[-1]}" if lines else str(file)
