"""Rows in any of the forms that instructions and chats are published in -> conversations.

A conversation is a list of messages ``{role, content}``; a message may also have what the instruction is about
(``input``), calls of tools (``tool_calls``, as JSON), a ``name``, and ``train: False`` where it is read and not
learned. The first may have ``tools`` (JSON). A row that makes none is a text instead: what it lacks.
"""

from __future__ import annotations

import ast
import contextlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...errors import DataError
from .columns import Columns, Table
from .data import MISSING, is_missing
from .json_rows import CONTENT_KEYS, ROLE_KEYS, is_chat

Message = dict[str, Any]
Conversation = list[Message] | str

CHATS = ("messages", "conversations", "conversation")
"""Columns of lists of messages: OpenAI's ``{role, content}``, ShareGPT's ``{from, value}``."""
# Prompt, answer, and what the prompt is about.
PAIRS: dict[str, tuple[str, str, str | None]] = {
    "alpaca": ("instruction", "output", "input"),
    "dolly": ("instruction", "response", "context"),
    "completion": ("prompt", "completion", None),
    "prompt": ("prompt", "response", None),
    "response": ("query", "response", None),  # MetaMathQA
    "query": ("query", "answer", None),  # Code-Feedback
    "question": ("question", "answer", None),  # GSM8K
    "orca": ("question", "response", None),
    "targets": ("inputs", "targets", None),
    "problem": ("problem", "solution", None),  # MATH
    "input": ("input", "output", None),
}
PROMPTS = ("instruction", "prompt", "question", "problem", "query", "input", "inputs")
ANSWERS = ("output", "response", "completion", "solution", "answer", "targets")
_KNOWN = {names[:2] for names in PAIRS.values()}
PAIRS |= {f"{p} {a}": (p, a, None) for p in PROMPTS for a in ANSWERS if (p, a) not in _KNOWN}
ABOUT = ("input", "context", "passage", "document", "article")
"""Columns that hold what a prompt is about, beside any pair."""
CHOICES = ("choices", "options")
_LETTERS = "ABCDEFGHIJ"
FORMS: dict[str, tuple[str, ...]] = {
    **{name: (name,) for name in CHATS},
    "instances": ("instruction", "instances"),  # Self-Instruct: several inputs to one instruction
    **{form: names[:2] for form, names in PAIRS.items()},
}
"""Form -> the columns by which it is known; the first that fits."""
SYSTEMS = ("system", "system_prompt", "system_message", "system_instruction", "systemInstruction")
BESIDE = (*SYSTEMS, "history", "tools")
"""Columns that go with any form."""

ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "model", "bot", "ai", "function_call"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function", "function_response", "tool_response", "ipython"), "tool"),
}
"""What a role is called, in small letters -> the role."""

_GOOD = ("label", "is_correct", "correct")
"""Whether a row's answer is good, where all are true or false."""
_FLAGS_OF_ROWS = ("weight", "train")
_FLAGS = (*_FLAGS_OF_ROWS, "loss")
"""Whether a message, or a row, is learned: OpenAI's, axolotl's. A column called loss may hold numbers."""
_OF_MESSAGES = (*ROLE_KEYS, "tool_calls", "function_call", "name", "tool_call_id", *_FLAGS)

NO_TEXT, NO_ANSWER, NO_PROMPT, NOT_LEARNED = (
    "no text",
    "no answer",
    "no prompt",
    "no answer that is learned (weight, train)",
)


@dataclass
class Reader:
    """How rows are read, and what was met on the way."""

    columns: Mapping[str, str] = field(default_factory=dict)
    """Our name -> the file's, of columns and of the keys of a message (role, content)."""
    roles: Mapping[str, str] = field(default_factory=dict)
    """The file's names of roles -> ours, beside those that are known."""
    missing: frozenset[str] = frozenset(MISSING)
    asking: bool = False
    """Rows need no answer: a message stands in for the one to be written."""
    met: Counter[str] = field(default_factory=Counter)
    """What is worth saying -> in how many rows."""
    read: set[str] = field(default_factory=set)
    """Our names of the columns that were read."""
    unread: dict[str, None] = field(default_factory=dict)
    """Keys of messages that hold something and were not read, as they come."""
    answers_in: str | None = None
    """Column of the answers, as the file calls it."""

    def __post_init__(self) -> None:
        self._theirs: dict[str, str] = {}
        self._known = {**ROLES, **{name.lower(): role for name, role in self.roles.items()}}

    def form(self, table: Columns, source: str) -> str:
        """The form of the rows, by their columns.

        Raises:
            DataError: when they have none of the known forms, or a file lacks a column that the form needs.
        """
        for form, needed in FORMS.items():
            if all(name in table for name in (needed[:1] if self.asking and not self._is_whole(table) else needed)):
                for name in needed if not self.asking else ():
                    if lacking := getattr(table, "absent", {}).get(name):
                        raise DataError(
                            f"{source}: {lacking} has no column {name!r}, which others have; give files of one form"
                        )
                return form
        if self.asking:
            known = ", ".join(dict.fromkeys(names[0] for names in FORMS.values()))
            raise DataError(
                f"{source}: no column among {', '.join(table)} is called as prompts are ({known}); "
                f"say which it is: 'task.columns={{instruction: {next(iter(table))}}}'"
            )
        raise DataError(
            f"{source}: its columns {', '.join(table)} are in none of the forms known ({', '.join(CHATS)}; "
            f"a prompt ({', '.join(PROMPTS)}) and an answer ({', '.join(ANSWERS)}); instruction and instances); "
            "name two of them in task.prompt and task.answer, or say in task.columns what ours are called"
            + ("; task text learns a column of text whole" if "text" in table else "")
        )

    @staticmethod
    def _is_whole(table: Columns) -> bool:
        return any(all(name in table for name in needed) for needed in FORMS.values())

    def renamed(self, table: Columns, source: str, known: Sequence[str] = ()) -> Columns:
        """The table with our names of its columns.

        Args:
            known: names of ours that are known in capitals and with blanks around them, too.
        """
        ours = {theirs: name for name, theirs in self.columns.items() if name not in ("role", "content")}
        folded = in_small(name for name in table if name not in ours)
        ours |= {folded[n]: n for n in known if n in folded and n not in table and n not in ours.values()}
        self._theirs = {name: theirs for theirs, name in ours.items()}
        for theirs, name in ours.items():
            if theirs not in table:
                has = f"It has {', '.join(table)}"
                raise DataError(f"task.columns.{name}={theirs!r}: no such column in {source}. {has}")
        out = Table({name: values for name, values in table.items() if name not in ours})
        out.absent = {ours.get(name, name): file for name, file in getattr(table, "absent", {}).items()}
        out.update({name: table[theirs] for theirs, name in ours.items()})
        return out

    def conversations(self, table: Columns, source: str, form: str | None = None) -> list[Conversation]:
        """Each row's conversation, or what it lacks."""
        form = form or self.form(table, source)
        wheres = [f"{source}: row {i}" for i in range(1, len(table[FORMS[form][0]]) + 1)]
        if form in CHATS:
            self.read.add(form)
            return self.beside(table, [self._chat(turns, w) for turns, w in zip(table[form], wheres)], wheres)
        if form == "instances" and not self.asking:
            self.read |= {"instruction", "instances"}
            return [
                conversation
                for prompt, instances, where in zip(table["instruction"], table["instances"], wheres)
                for conversation in self._instances(prompt, instances, where)
            ]
        has_choices = any(name in table for name in CHOICES)  # then it may be the place of the right one
        for name in _GOOD if not self.asking else ():
            if has_choices and name == "correct":
                continue
            if False in (flags := {_flag(value) for value in table.get(name, ())}) and None not in flags:
                raise DataError(
                    f"{source}: column {name!r} says which answers are good, and learning apart from the bad ones "
                    "(KTO) is not done here; keep the rows where it is true, or name two columns in task.prompt and "
                    "task.answer to learn all rows"
                )
        prompt, answer, about = PAIRS.get(form, PAIRS["alpaca"])
        names = [
            name for name in dict.fromkeys((about or "", *ABOUT)) if name in table and name not in (prompt, answer)
        ]
        return self.pairs(table, prompt, answer, wheres, [name for name in names if all(map(_is_texts, table[name]))])

    def pairs(
        self, table: Columns, prompt: str, answer: str, wheres: Sequence[str], abouts: Sequence[str] | None = None
    ) -> list[Conversation]:
        """One question and one answer a row. Either may be a list of messages (TRL's conversational form).

        Args:
            abouts: columns of what the prompt is about; what stands in several is put one below the other. None: the
                two columns are all that is read, without choices.
        """
        self.read |= {prompt, answer, *(abouts or ())}
        self.answers_in = self._theirs.get(answer, answer)
        answers: Sequence[Any] = [None] * len(wheres) if self.asking else table[answer]
        prompts: Sequence[Any] = table[prompt]
        if abouts is not None:
            prompts, answers = self._with_choices(table, prompts, answers, wheres)
        found = []
        for i, row in enumerate(zip(prompts, answers)):
            there = [value for name in abouts or () if not is_missing(value := table[name][i], self.missing)]
            told = [_text(t, "input", wheres[i]) for v in there for t in (v if isinstance(v, list) else [v])]
            found.append(self._turn(*row, "\n\n".join(told) if told else None, wheres[i]))
        return self.beside(table, found, wheres)

    def _with_choices(
        self, table: Columns, prompts: Sequence[Any], answers: Sequence[Any], wheres: Sequence[str]
    ) -> tuple[Sequence[Any], Sequence[Any]]:
        """Prompts with the choices that stand in a column, or in columns A, B, …; answers by their letters."""
        letters = [letter for letter in _LETTERS if letter in table]
        for name in CHOICES:
            found = [_choices(value, self.missing) for value in table.get(name, ())]
            if found and None not in found:
                names, each = [name], [choices or {} for choices in found]
                break
        else:
            if letters[:2] != ["A", "B"]:
                return prompts, answers
            names, rows = letters, zip(*(table[letter] for letter in letters))
            each = [{a: str(v) for a, v in zip(letters, row) if not is_missing(v, self.missing)} for row in rows]
        self.read |= set(names)
        asked = [
            f"{prompt}\n\n" + "\n".join(f"{letter}. {text}" for letter, text in choices.items())
            if choices and isinstance(prompt, str)
            else prompt
            for prompt, choices in zip(prompts, each)
        ]
        places = [value for value in answers if not is_missing(value, self.missing)]
        if not places or not all(isinstance(value, int) and not isinstance(value, bool) for value in places):
            return asked, answers
        for value, choices, where in zip(answers, each, wheres):
            if isinstance(value, int) and choices and not 0 <= value < len(choices):
                raise DataError(f"{where}: its answer {value} is none of its {len(choices)} choices, counted from 0")
        self.met["\0places"] += 1
        named = [list(choices)[v] if isinstance(v, int) and choices else v for v, choices in zip(answers, each)]
        return asked, named

    def beside(self, table: Columns, found: list[Conversation], wheres: Sequence[str]) -> list[Conversation]:
        """The conversations with what other columns say: what came before, the system's words, tools."""
        n = len(found)
        names = (next((name for name in SYSTEMS if name in table), SYSTEMS[0]), "history", "tools")
        self.read |= set(names)
        systems, histories, tools = (table.get(name, [None] * n) for name in names)
        rows = zip(found, histories, systems, tools, wheres)
        found = [self._complete(*row) for row in rows]
        for name in _FLAGS_OF_ROWS if not self.asking else ():
            flags = [True if is_missing(value) else _flag(value) for value in table.get(name, ())]
            if flags and None not in flags:
                self.read.add(name)
                found = [one if flag or isinstance(one, str) else NOT_LEARNED for one, flag in zip(found, flags)]
        return found

    def _complete(self, found: Conversation, history: Any, system: Any, tools: Any, where: str) -> Conversation:
        if isinstance(found, str):
            return found
        found = [*self._history(history, where), *found]
        if not is_missing(system, self.missing) and found[0]["role"] != "system":
            told = _first(system, CONTENT_KEYS) if isinstance(system, dict) else system  # Gemini's, or a message
            found = [{"role": "system", "content": _content(told, where)}, *found]
        empty = [m["role"] == "assistant" and not (m["content"].strip() or m.get("tool_calls")) for m in found]
        found = [{**m, "train": False} if is_empty else m for m, is_empty in zip(found, empty)]  # to say nothing
        if tools := _from_json(tools, "tools", where):
            found = [{**found[0], "tools": json.dumps(tools, ensure_ascii=False)}, *found[1:]]
        return found

    def _history(self, value: Any, where: str) -> list[Message]:
        value = _from_json(value, "history", where)
        if not value:
            return []
        if isinstance(value, list) and all(isinstance(m, dict) for m in value):
            return self.messages(value, where)
        out: list[Message] = []
        for pair in value if isinstance(value, list) else [None]:
            if not isinstance(pair, (list, tuple)) or len(pair) != 2:
                raise DataError(f"{where}: its history is no list of [question, answer]")
            if all(is_missing(text, self.missing) for text in pair):
                continue
            for role, text in zip(("user", "assistant"), pair):
                out.append({"role": role, "content": _text(text, "history", where)})
        return out

    def _turn(self, prompt: Any, answer: Any, about: Any, where: str) -> Conversation:
        prompt, answer = (read if is_chat(read := loads(value)) else value for value in (prompt, answer))
        if self.asking:
            said: list[Message] = []
        elif isinstance(answer, list):
            said = self.messages(answer, where)
        elif is_missing(answer, self.missing):
            return self._left(NO_ANSWER, answer)
        else:
            said = [{"role": "assistant", "content": _text(answer, "answer", where)}]
        if isinstance(prompt, list):
            return self._up_to_last_answer([*self.messages(prompt, where), *said])
        if is_missing(about, self.missing):
            about = None
        if is_missing(prompt, self.missing):
            if about is None:
                return self._left(NO_PROMPT, prompt)
            prompt, about = about, None
        asked: Message = {"role": "user", "content": _text(prompt, "prompt", where)}
        if about is not None:
            asked["input"] = _text(about, "input", where)
        return self._up_to_last_answer([asked, *said])

    def _left(self, lack: str, value: Any) -> str:
        if isinstance(value, str) and value.strip():
            self.met[value.strip()] += 1
        return lack

    def _instances(self, prompt: Any, instances: Any, where: str) -> list[Conversation]:
        out = []
        for one in instances or ():
            if not isinstance(one, dict) or "output" not in one:
                raise DataError(f"{where} has an instance that is no object with input and output")
            out.append(self._turn(prompt, one["output"], one.get("input"), where))
        return out

    def _chat(self, turns: Any, where: str) -> Conversation:
        turns = _from_json(turns, "list of messages", where)
        if turns is None or turns == []:
            return NO_ANSWER
        return self._up_to_last_answer(self.messages(turns, where))

    def messages(self, turns: Any, where: str) -> list[Message]:
        """Messages as ``{role, content}`` or ShareGPT's ``{from, value}``."""
        if not isinstance(turns, list):
            raise DataError(f"{where} has a {type(turns).__name__} where a list of messages is needed")
        return [self._message(turn, where) for turn in turns]

    def _message(self, turn: Any, where: str) -> Message:
        if not isinstance(turn, dict):
            raise DataError(f"{where} has a {type(turn).__name__} where a message {{role, content}} is needed")
        called = _first(turn, (self.columns.get("role"), *ROLE_KEYS))
        role = self._known.get(called.strip().lower()) if isinstance(called, str) else None
        if called is None:
            raise DataError(
                f"{where} has a message without role; it has {', '.join(turn) or 'nothing'}: say which are role and "
                "content (task.columns={role: speaker, content: text})"
            )
        if role is None:
            raise DataError(
                f"{where} has a message with role {called!r}; known are {', '.join(self._known)}; "
                f"task.roles says what others are ({{{called}: user}})"
            )
        keys = (self.columns.get("content"), *CONTENT_KEYS)
        content = _first(turn, keys)
        calls = _from_json(turn.get("tool_calls"), "tool_calls", where)
        if isinstance(old := _from_json(turn.get("function_call"), "function_call", where), dict):
            calls = [{"type": "function", "function": old}]
        if str(called).lower() == "function_call":
            read = loads(content)
            each = read if isinstance(read, list) else [read]
            if all(isinstance(call, dict) and "name" in call for call in each):
                calls, content = [{"type": "function", "function": call} for call in each], ""
        if content is None:
            if not calls and not any(key in turn for key in keys):
                raise DataError(
                    f"{where} has a message without content; it has {', '.join(turn)}: say which of them is content "
                    "(task.columns={content: text})"
                )
            content = ""
        known = (*keys, self.columns.get("role"), *_OF_MESSAGES)
        self.unread |= {
            key: None for key, value in turn.items() if key not in known and value not in (None, "", [], {})
        }
        message: Message = {"role": role, "content": _content(content, where)}
        if calls:
            message["tool_calls"] = json.dumps(calls, ensure_ascii=False)
        for key in ("name", "tool_call_id"):
            if isinstance(turn.get(key), str):
                message[key] = turn[key]
        if not _is_learned(turn, where):
            message["train"] = False
        return message

    def _up_to_last_answer(self, messages: list[Message]) -> Conversation:
        """The messages up to the last answer that is learned; an assistant that speaks first answers nothing."""
        if self.asking:
            while messages and messages[-1]["role"] == "assistant":
                messages = messages[:-1]
            return [*messages, {"role": "assistant", "content": "?"}] if messages else NO_PROMPT
        asked = next((i for i, m in enumerate(messages) if m["role"] in ("user", "tool")), len(messages))
        said = [
            i
            for i, m in enumerate(messages)
            if i > asked and m["role"] == "assistant" and (m["content"].strip() or m.get("tool_calls"))
        ]
        learned = [i for i in said if m_is_learned(messages[i])]
        if not learned:
            return NOT_LEARNED if said else NO_ANSWER
        if any(m["role"] == "user" and not (m["content"].strip() or m.get("input")) for m in messages[: learned[-1]]):
            return NO_PROMPT
        if messages[-1]["role"] != "assistant":
            self.met["\0unanswered"] += 1
        return messages[: learned[-1] + 1]


def in_small(names: Iterable[str]) -> dict[str, str]:
    """Names in small letters and without blanks around them -> as they are; not where two become one.

    >>> in_small(["Question", "answer ", "a", "A"])
    {'question': 'Question', 'answer': 'answer '}
    """
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(name.strip().lower(), []).append(name)
    return {small: several[0] for small, several in found.items() if len(several) == 1}


def m_is_learned(message: Mapping[str, Any]) -> bool:
    """Whether an assistant's message is one to learn."""
    return message.get("train") is not False


def _is_learned(turn: Mapping[str, Any], where: str) -> bool:
    """What ``weight`` (OpenAI), ``train`` (axolotl) or ``loss`` say of a message."""
    for key in _FLAGS:
        value = turn.get(key)
        if value is None:
            continue
        if _flag(value) is None:
            raise DataError(f"{where} has a message with {key} {value!r}; it is learned (1, true) or not (0, false)")
        if not _flag(value):
            return False
    return True


def _flag(value: Any) -> bool | None:
    """What 0 and 1, false and true say, as text, too; None for anything else."""
    word = str(value).strip().lower().removesuffix(".0")
    return True if word in ("1", "true") else False if word in ("0", "false") else None


def _is_texts(value: Any) -> bool:
    """Whether a cell is a text, or several."""
    return not isinstance(value, dict) and all(isinstance(t, str) for t in (value if isinstance(value, list) else ()))


def _choices(value: Any, missing: frozenset[str]) -> dict[str, str] | None:
    """Letter -> text, of a list of texts, or of an object of letters or of lists ``label`` and ``text`` (ARC).

    None for what is no such thing; nothing in it for a cell without.
    """
    if is_missing(value, missing):
        return {}
    read = loads(value) if isinstance(value, str) else value
    if isinstance(read, dict) and isinstance(read.get("text"), list):
        read = dict(zip(map(str, read.get("label") or _LETTERS), read["text"]))
    if isinstance(read, list) and len(read) <= len(_LETTERS):
        read = dict(zip(_LETTERS, read))
    if not isinstance(read, dict) or not all(isinstance(text, (str, int, float)) for text in read.values()):
        return None
    return {str(letter): str(text) for letter, text in read.items()} if all(len(str(k)) == 1 for k in read) else None


def _first(turn: Mapping[str, Any], keys: Iterable[str | None]) -> Any:
    return next((turn[key] for key in keys if key is not None and turn.get(key) is not None), None)


def _content(value: Any, where: str) -> str:
    """A message's text; of a list of parts, those that are text."""
    if not isinstance(value, list):
        return _text(value, "message", where)
    texts = []
    for part in value:
        kind = part.get("type", "text") if isinstance(part, dict) else "text"
        if kind not in ("text", "input_text", "output_text"):
            raise DataError(
                f"{where} has a message with {kind}; this task reads text alone"
                + (" (vqa reads images)" if "image" in str(kind) else "")
            )
        texts.append(_text(part.get("text") if isinstance(part, dict) else part, "message", where))
    return "\n".join(texts)


def loads(value: Any) -> Any:
    """The list or object that a text is, in JSON or as Python prints it (pandas' to_csv); None for any other."""
    if not isinstance(value, str) or value.strip()[:1] not in ("[", "{"):
        return None
    for read in (json.loads, ast.literal_eval):
        with contextlib.suppress(ValueError, SyntaxError, RecursionError, MemoryError):
            return read(value)
    return None


def _from_json(value: Any, what: str, where: str) -> Any:
    """A list or object, also one that a cell holds as text, as in CSV files; None for none."""
    if is_missing(value):
        return None
    if isinstance(value, str) and value.strip()[:1] in ("[", "{"):
        if (read := loads(value)) is not None:
            return read
        try:
            json.loads(value)
        except ValueError as error:
            raise DataError(f"{where}: its {what} is not valid JSON: {error}") from error
    return value


def _text(value: Any, what: str, where: str) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return str(value)
    if not isinstance(value, str):
        found = "is empty" if value is None else f"is a {type(value).__name__}"
        raise DataError(f"{where}: its {what} {found}, where a text is needed")
    return value
