"""One message of a conversation, by the keys and roles that chats are published with.

A message is ``{role, content}``; it may also have what an instruction is about (``input``), calls of tools
(``tool_calls``, as JSON), a ``name``, and ``train: False`` where it is read and not learned.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ...errors import DataError
from .cells import flag, from_json, loads, written_out
from .json_rows import CONTENT_KEYS, ROLE_KEYS

Message = dict[str, Any]

ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "model", "bot", "ai", "function_call"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function", "function_response", "tool_response", "ipython"), "tool"),
}
"""What a role is called, in small letters -> the role."""

FLAGS_OF_ROWS = ("weight", "train")
_FLAGS = (*FLAGS_OF_ROWS, "loss")
"""Whether a message, or a row, is learned: OpenAI's, axolotl's. A column called loss may hold numbers."""
_KEYS = (*ROLE_KEYS, "tool_calls", "function_call", "name", "tool_call_id", *_FLAGS)


@dataclass
class Messages:
    """How a file's messages are read, and what was left unread."""

    columns: Mapping[str, str] = field(default_factory=dict)
    """``role`` and ``content`` -> what the file calls them."""
    roles: Mapping[str, str] = field(default_factory=dict)
    """The file's names of roles -> ours, beside those that are known."""
    unread: dict[str, None] = field(default_factory=dict)
    """Keys that hold something and were not read, as they come."""

    def __post_init__(self) -> None:
        self._roles = {**ROLES, **{name.lower(): role for name, role in self.roles.items()}}
        self._role_keys = (self.columns.get("role"), *ROLE_KEYS)
        self._content_keys = (self.columns.get("content"), *CONTENT_KEYS)

    def read(self, turns: Any, where: str) -> list[Message]:
        """Messages as ``{role, content}`` or ShareGPT's ``{from, value}``."""
        if not isinstance(turns, list):
            raise DataError(f"{where} has a {type(turns).__name__} where a list of messages is needed")
        return [self._message(turn, where) for turn in turns]

    def _message(self, turn: Any, where: str) -> Message:
        if not isinstance(turn, dict):
            raise DataError(f"{where} has a {type(turn).__name__} where a message {{role, content}} is needed")
        message: Message = {"role": self._role(turn, where)}
        said, calls = self._said(turn, where)
        message["content"] = content(said, where)
        if calls:
            message["tool_calls"] = json.dumps(calls, ensure_ascii=False)
        for key in ("name", "tool_call_id"):
            if isinstance(turn.get(key), str):
                message[key] = turn[key]
        if not _is_marked_to_learn(turn, where):
            message["train"] = False
        known = (*self._content_keys, *self._role_keys, *_KEYS)
        self.unread |= {
            key: None for key, value in turn.items() if key not in known and value not in (None, "", [], {})
        }
        return message

    def _role(self, turn: Mapping[str, Any], where: str) -> str:
        called = first_of(turn, self._role_keys)
        if called is None:
            raise DataError(
                f"{where} has a message without role; it has {', '.join(turn) or 'nothing'}: say which are role and "
                "content (task.columns={role: speaker, content: text})"
            )
        role = self._roles.get(called.strip().lower()) if isinstance(called, str) else None
        if role is None:
            raise DataError(
                f"{where} has a message with role {called!r}; known are {', '.join(self._roles)}; "
                f"task.roles says what others are ({{{called}: user}})"
            )
        return role

    def _said(self, turn: Mapping[str, Any], where: str) -> tuple[Any, Any]:
        """A message's content and its calls of tools."""
        said = first_of(turn, self._content_keys)
        calls = from_json(turn.get("tool_calls"), "tool_calls", where)
        if isinstance(old := from_json(turn.get("function_call"), "function_call", where), dict):
            calls = [{"type": "function", "function": old}]
        if str(first_of(turn, self._role_keys)).lower() == "function_call":
            read = loads(said)
            each = read if isinstance(read, list) else [read]
            if all(isinstance(call, dict) and "name" in call for call in each):
                calls, said = [{"type": "function", "function": call} for call in each], ""
        if said is None and not calls and not any(key in turn for key in self._content_keys):
            raise DataError(
                f"{where} has a message without content; it has {', '.join(turn)}: say which of them is content "
                "(task.columns={content: text})"
            )
        return ("" if said is None else said), calls


def is_learned(message: Mapping[str, Any]) -> bool:
    """Whether an assistant's message is one to learn."""
    return message.get("train") is not False


def _is_marked_to_learn(turn: Mapping[str, Any], where: str) -> bool:
    """What ``weight`` (OpenAI), ``train`` (axolotl) or ``loss`` say of a message."""
    for key in _FLAGS:
        value = turn.get(key)
        if value is None:
            continue
        if flag(value) is None:
            raise DataError(f"{where} has a message with {key} {value!r}; it is learned (1, true) or not (0, false)")
        if not flag(value):
            return False
    return True


def first_of(turn: Mapping[str, Any], keys: Iterable[str | None]) -> Any:
    """The value of the first of some keys that has one."""
    return next((turn[key] for key in keys if key is not None and turn.get(key) is not None), None)


def content(value: Any, where: str) -> str:
    """A message's text; of a list of parts, those that are text."""
    if not isinstance(value, list):
        return written_out(value, "message", where)
    texts = []
    for part in value:
        kind = part.get("type", "text") if isinstance(part, dict) else "text"
        if kind not in ("text", "input_text", "output_text"):
            raise DataError(
                f"{where} has a message with {kind}; this task reads text alone"
                + (" (vqa reads images)" if "image" in str(kind) else "")
            )
        texts.append(written_out(part.get("text") if isinstance(part, dict) else part, "message", where))
    return "\n".join(texts)
