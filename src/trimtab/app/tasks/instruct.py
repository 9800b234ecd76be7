"""Following instructions: rows of a question and its answer in any of the forms they are published in.

The score is the loss on held-out answers (and its exponential, the perplexity); nothing is generated.
Without files the rows are those of Stanford Alpaca (Taori et al. 2023), from the hub.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...errors import ConfigError, DataError
from .answering import Answering, Message
from .data import Columns, column

FORMS: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "conversations": ("conversations",),  # ShareGPT: from, value
    "instances": ("instruction", "instances"),  # Self-Instruct: several inputs to one instruction
    "alpaca": ("instruction", "output"),  # and input, which may be empty or missing
    "completion": ("prompt", "completion"),
    "response": ("query", "response"),  # MetaMathQA
    "query": ("query", "answer"),  # Code-Feedback
    "question": ("question", "answer"),  # GSM8K
}
"""Form -> the columns by which it is known; the first that fits."""

ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}


@dataclass(kw_only=True)
class Instruct(Answering):
    """Instruction tuning, with the loss on the answers only."""

    name: str = "instruct"
    prompt: str | None = None
    """Column of the prompt, where the rows have none of the known forms."""
    answer: str | None = None
    """Column of the answer, likewise."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("prompt", "answer"):
            value = getattr(self, key)
            if value is not None and not (isinstance(value, str) and value):
                raise ConfigError(f"task.{key}", value, "the name of a column")
        if (self.prompt is None) != (self.answer is None):
            missing = "answer" if self.answer is None else "prompt"
            raise ConfigError(f"task.{missing}", None, "name both columns, task.prompt and task.answer, or neither")

    @property
    def hub_sources(self) -> Mapping[str, tuple[str, str | None, str]]:
        return {"train": ("tatsu-lab/alpaca", None, "train")}

    def conversations(self, split: str, table: Columns, source: str) -> Columns:
        if self.prompt is None or self.answer is None:
            form = form_of(table, source)
            if split == "train":  # a prompt given whole is taken as it stands
                self.fallback_template = "plain" if form == "completion" else type(self).fallback_template
            return {"messages": CONVERTERS[form](table, source)}
        prompts = column(table, self.prompt, f"task.prompt={self.prompt!r}", source)
        answers = column(table, self.answer, f"task.answer={self.answer!r}", source)
        return {"messages": pairs(prompts, answers, source)}


def form_of(table: Columns, source: str) -> str:
    """The form of the rows, by their columns.

    Raises:
        DataError: when they have none of the known forms.
    """
    for form, needed in FORMS.items():
        if all(name in table for name in needed):
            return form
    forms = "; ".join(" and ".join(names) for names in FORMS.values())
    raise DataError(
        f"{source}: its columns {', '.join(table)} are in none of the forms known ({forms}); "
        "name two of them in task.prompt and task.answer"
    )


def pairs(prompts: Sequence[Any], answers: Sequence[Any], source: str) -> list[list[Message] | None]:
    """One question and one answer a row. Either may be a list of messages (TRL's conversational form)."""
    return [
        _turn(prompt, answer, "", f"{source}: row {i}") for i, (prompt, answer) in enumerate(zip(prompts, answers), 1)
    ]


def _turn(prompt: Any, answer: Any, about: Any, where: str) -> list[Message] | None:
    """The messages of one question and answer; None where the answer is empty."""
    if isinstance(answer, list):
        said = _messages(answer, where)
    elif answer is None or (isinstance(answer, str) and not answer.strip()):
        return None
    else:
        said = [{"role": "assistant", "content": _text(answer, "answer", where)}]
    if isinstance(prompt, list):
        asked = _messages(prompt, where)
    else:
        asked = [{"role": "user", "content": _text(prompt, "prompt", where)}]
        if about is not None and _text(about, "input", where).strip():
            asked[0]["input"] = str(about)
    return _up_to_last_answer([*asked, *said])


def _text(value: Any, what: str, where: str) -> str:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        found = "is empty" if value is None else f"is a {type(value).__name__}"
        raise DataError(f"{where}: its {what} {found}, where a text is needed")
    return value


def _messages(turns: Any, where: str) -> list[Message]:
    """Messages as ``{role, content}`` or ShareGPT's ``{from, value}``."""
    if not isinstance(turns, list):
        raise DataError(f"{where} has a {type(turns).__name__} where a list of messages is needed")
    out = []
    for turn in turns:
        role = turn.get("role", turn.get("from")) if isinstance(turn, dict) else None
        if not isinstance(role, str) or role not in ROLES:
            raise DataError(f"{where} has a message with role {role!r}; known are {', '.join(ROLES)}")
        out.append({"role": ROLES[role], "content": _text(turn.get("content", turn.get("value")), "message", where)})
    return out


def _up_to_last_answer(messages: list[Message]) -> list[Message] | None:
    said = [i for i, m in enumerate(messages) if m["role"] == "assistant" and m["content"].strip()]
    return messages[: said[-1] + 1] if said and said[-1] > 0 else None


def _from_chat(name: str) -> Callable[[Columns, str], list[list[Message] | None]]:
    return lambda table, source: [
        _up_to_last_answer(_messages(turns, f"{source}: row {i}")) for i, turns in enumerate(table[name], 1)
    ]


def _from_columns(prompt: str, answer: str) -> Callable[[Columns, str], list[list[Message] | None]]:
    return lambda table, source: pairs(table[prompt], table[answer], source)


def _from_alpaca(table: Columns, source: str) -> list[list[Message] | None]:
    n = len(table["instruction"])
    return [
        _turn(prompt, answer, about, f"{source}: row {i}")
        for i, (prompt, about, answer) in enumerate(
            zip(table["instruction"], table.get("input", [None] * n), table["output"]), 1
        )
    ]


def _from_instances(table: Columns, source: str) -> list[list[Message] | None]:
    out = []
    for i, (prompt, instances) in enumerate(zip(table["instruction"], table["instances"]), 1):
        for one in instances or ():
            if not isinstance(one, dict) or "output" not in one:
                raise DataError(f"{source}: row {i} has an instance that is no object with input and output")
            out.append(_turn(prompt, one["output"], one.get("input"), f"{source}: row {i}"))
    return out


CONVERTERS: dict[str, Callable[[Columns, str], list[list[Message] | None]]] = {
    "messages": _from_chat("messages"),
    "conversations": _from_chat("conversations"),
    "instances": _from_instances,
    "alpaca": _from_alpaca,
    "completion": _from_columns("prompt", "completion"),
    "response": _from_columns("query", "response"),
    "query": _from_columns("query", "answer"),
    "question": _from_columns("question", "answer"),
}
