"""Following instructions: rows of a question and its answer in any of the forms of `chats.py`.

The score is the loss on held-out answers (and its exponential, the perplexity); nothing is generated.
Without files the rows are those of Stanford Alpaca (Taori et al. 2023), from the hub.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...errors import ConfigError, did_you_mean
from .answering import Answering
from .chats import Reader
from .data import Columns, column
from .forms import COLUMNS


@dataclass(kw_only=True)
class Instruct(Answering):
    """Instruction tuning, with the loss on the answers only."""

    name: str = "instruct"
    prompt: str | None = None
    """Column of the prompt, where the rows have none of the known forms."""
    answer: str | None = None
    """Column of the answer, likewise."""
    columns: dict[str, str] | None = None
    """What the file calls our columns and the keys of a message: ``{messages: dialogue, role: speaker}``."""
    roles: dict[str, str] | None = None
    """What its roles mean: ``{teacher: assistant, pupil: user}``."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("prompt", "answer"):
            value = getattr(self, key)
            if value is not None and not (isinstance(value, str) and value):
                raise ConfigError(f"task.{key}", value, "the name of a column")
        if (self.prompt is None) != (self.answer is None):
            missing = "answer" if self.answer is None else "prompt"
            raise ConfigError(f"task.{missing}", None, "name both columns, task.prompt and task.answer, or neither")
        _check_names("columns", self.columns, ("role", "content", *COLUMNS), "the file's name for it", of_keys=True)
        _check_names("roles", self.roles, ("system", "user", "assistant", "tool"), "a role", of_keys=False)

    @property
    def hub_sources(self) -> Mapping[str, tuple[str, str | None, str]]:
        return {"train": ("tatsu-lab/alpaca", None, "train")}

    def conversations(self, split: str, table: Columns, source: str) -> Columns:
        reader = Reader(self.columns or {}, self.roles or {}, self.missing)
        table = reader.renamed(table, source, () if self.prompt else COLUMNS)
        if self.prompt is None or self.answer is None:
            form = reader.form(table, source)
            if split == "train":  # a prompt given whole is taken as it stands
                self.fallback_template = "plain" if form == "completion" else type(self).fallback_template
            found = reader.conversations(table, source, form)
        else:
            prompts = column(table, self.prompt, f"task.prompt={self.prompt!r}", source)
            column(table, self.answer, f"task.answer={self.answer!r}", source)
            wheres = [f"{source}: row {i}" for i in range(1, len(prompts) + 1)]
            found = reader.pairs(table, self.prompt, self.answer, wheres)
        self._answers_in = reader.answers_in
        self.notes += [f"{split}: {note}" for note in reader.notes(len(found))]
        self.say_unread(split, table, reader.read, [f"{key} of messages" for key in reader.messages.unread])
        return {"messages": found}

    def questions(self, table: Columns, source: str) -> Columns:
        reader = Reader(self.columns or {}, self.roles or {}, self.missing, asking=True)
        table = reader.renamed(table, source, () if self.prompt else COLUMNS)
        if self.prompt is None:
            form = reader.form(table, source)
            self.fallback_template = "plain" if form == "completion" else type(self).fallback_template
            return {"messages": reader.conversations(table, source, form)}
        prompts = column(table, self.prompt, f"task.prompt={self.prompt!r}", source)
        wheres = [f"{source}: row {i}" for i in range(1, len(prompts) + 1)]
        return {"messages": reader.pairs(table, self.prompt, str(self.answer), wheres)}


def _check_names(key: str, value: Any, known: Any, what: str, of_keys: bool) -> None:
    if value is None:
        return
    if not isinstance(value, Mapping):
        example = "{messages: dialogue}" if of_keys else "{teacher: assistant}"
        raise ConfigError(f"task.{key}", value, f"names, such as {example}")
    for name, other in value.items():
        if not isinstance(name, str) or not isinstance(other, str):
            raise ConfigError(f"task.{key}.{name}", other, what)
        if (one := name if of_keys else other) not in known:
            cure = f"{one!r} is none of {', '.join(known)}.{did_you_mean(one, known)}"
            raise ConfigError(f"task.{key}.{name}", other, cure)
