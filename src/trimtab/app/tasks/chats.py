"""Rows in any of the forms that instructions and chats are published in -> conversations.

A conversation is a list of messages, as `messages.py` reads them; the first may have ``tools`` (JSON). A row that
makes none is a text instead: what it lacks.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...errors import DataError
from .cells import flag, from_json, is_texts, loads, written_out
from .choices import choices_of
from .columns import Columns, Table
from .data import MISSING, is_missing
from .forms import ABOUT, ANSWERS, CHATS, CHOICES, FORMS, PAIRS, PROMPTS, SYSTEMS
from .json_rows import CONTENT_KEYS, is_chat
from .messages import FLAGS_OF_ROWS, Message, Messages, content, first_of, is_learned
from .names import in_small

Conversation = list[Message] | str

_GOOD = ("label", "is_correct", "correct")
"""Whether a row's answer is good, where all are true or false."""

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
    read: set[str] = field(default_factory=set)
    """Our names of the columns that were read."""
    answers_in: str | None = None
    """Column of the answers, as the file calls it."""

    def __post_init__(self) -> None:
        self.messages = Messages(self.columns, self.roles)
        self._theirs: dict[str, str] = {}
        self._unanswered = self._other_systems = 0
        self._missing_words: Counter[str] = Counter()
        self._has_places = False

    def notes(self, n_rows: int) -> Iterator[str]:
        """What is worth saying of the rows that were read."""
        if n := self._unanswered:
            yield f"{n} of {n_rows} conversations end without an answer: read up to the last one"
        if n := self._other_systems:
            column = next(self._theirs.get(name, name) for name in SYSTEMS if name in self.read)
            yield (
                f"{n} of {n_rows} conversations begin with a system message of their own, another than in column "
                f"{column!r}: theirs is read"
            )
        if words := ", ".join(f"{word!r} {n}" for word, n in self._missing_words.most_common(6)):
            yield f"words that count as missing: {words} (data.missing lists them)"
        if self._has_places:
            yield "answers are the places of their choices, from 0, and learned by their letters"

    def form(self, table: Columns, source: str) -> str:
        """The form of the rows, by their columns.

        Raises:
            DataError: when they have none of the known forms, or a file lacks a column that the form needs.
        """
        fit = [form for form, needed in FORMS.items() if table.keys() >= set(needed)]
        if self.asking:
            fit = fit or [form for form, needed in FORMS.items() if needed[0] in table]
        if fit:
            absent = {} if self.asking else getattr(table, "absent", {})
            for name in FORMS[fit[0]]:
                if name in absent:
                    raise DataError(
                        f"{source}: {absent[name]} has no column {name!r}, which others have; give files of one form"
                    )
            return fit[0]
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
            if theirs not in table and not (self.asking and name in ANSWERS):
                has = f"It has {', '.join(table)}"
                raise DataError(f"task.columns.{name}={theirs!r}: no such column in {source}. {has}")
        out = Table({name: values for name, values in table.items() if name not in ours})
        out.absent = {ours.get(name, name): file for name, file in getattr(table, "absent", {}).items()}
        out.update({name: table[theirs] for theirs, name in ours.items() if theirs in table})
        return out

    def conversations(self, table: Columns, source: str, form: str | None = None) -> list[Conversation]:
        """Each row's conversation, or what it lacks."""
        form = form or self.form(table, source)
        wheres = [f"{source}: row {i}" for i in range(1, len(table[FORMS[form][0]]) + 1)]
        if form in CHATS:
            self.read.add(form)
            return self.beside(table, [self._chat(turns, w) for turns, w in zip(table[form], wheres)], wheres)
        if form == "instances" and "instances" in table:
            self.read |= {"instruction", "instances"}
            return [
                conversation
                for prompt, instances, where in zip(table["instruction"], table["instances"], wheres)
                for conversation in self._instances(prompt, instances, where)
            ]
        if not self.asking:
            _refuse_bad_answers(table, source)
        prompt, answer, about = PAIRS.get(form, PAIRS["alpaca"])
        names = [
            name for name in dict.fromkeys((about or "", *ABOUT)) if name in table and name not in (prompt, answer)
        ]
        return self.pairs(table, prompt, answer, wheres, [name for name in names if all(map(is_texts, table[name]))])

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
        if abouts is not None and (choices := choices_of(table, self.missing)):
            self.read |= set(choices.columns)
            prompts = choices.put_to(prompts)
            if places := choices.places(answers, self.missing):
                answers, self._has_places = choices.letters(places, wheres), True
        found = []
        for i, row in enumerate(zip(prompts, answers)):
            there = [value for name in abouts or () if not is_missing(value := table[name][i], self.missing)]
            told = [written_out(t, "input", wheres[i]) for v in there for t in (v if isinstance(v, list) else [v])]
            found.append(self._turn(*row, "\n\n".join(told) if told else None, wheres[i]))
        return self.beside(table, found, wheres)

    def beside(self, table: Columns, found: list[Conversation], wheres: Sequence[str]) -> list[Conversation]:
        """The conversations with what other columns say: what came before, the system's words, tools."""
        n = len(found)
        names = (next((name for name in SYSTEMS if name in table), SYSTEMS[0]), "history", "tools")
        self.read |= set(names)
        systems, histories, tools = (table.get(name, [None] * n) for name in names)
        rows = zip(found, histories, systems, tools, wheres)
        found = [self._complete(*row) for row in rows]
        for name in FLAGS_OF_ROWS if not self.asking else ():
            flags = [True if is_missing(value) else flag(value) for value in table.get(name, ())]
            if flags and None not in flags:
                self.read.add(name)
                found = [one if flag or isinstance(one, str) else NOT_LEARNED for one, flag in zip(found, flags)]
        return found

    def _complete(self, found: Conversation, history: Any, system: Any, tools: Any, where: str) -> Conversation:
        if isinstance(found, str):
            return found
        found = [*self._history(history, where), *found]
        if not is_missing(system, self.missing):
            told = first_of(system, CONTENT_KEYS) if isinstance(system, dict) else system  # Gemini's, or a message
            if found[0]["role"] != "system":
                found = [{"role": "system", "content": content(told, where)}, *found]
            elif isinstance(told, (str, list)) and content(told, where).strip() != found[0]["content"].strip():
                self._other_systems += 1
        empty = [m["role"] == "assistant" and not (m["content"].strip() or m.get("tool_calls")) for m in found]
        found = [{**m, "train": False} if is_empty else m for m, is_empty in zip(found, empty)]  # to say nothing
        if tools := from_json(tools, "tools", where):
            found = [{**found[0], "tools": json.dumps(tools, ensure_ascii=False)}, *found[1:]]
        return found

    def _history(self, value: Any, where: str) -> list[Message]:
        value = from_json(value, "history", where)
        if not value:
            return []
        if isinstance(value, list) and all(isinstance(m, dict) for m in value):
            return self.messages.read(value, where)
        out: list[Message] = []
        for pair in value if isinstance(value, list) else [None]:
            if not isinstance(pair, (list, tuple)) or len(pair) != 2:
                raise DataError(f"{where}: its history is no list of [question, answer]")
            if all(is_missing(text, self.missing) for text in pair):
                continue
            for role, text in zip(("user", "assistant"), pair):
                out.append({"role": role, "content": written_out(text, "history", where)})
        return out

    def _turn(self, prompt: Any, answer: Any, about: Any, where: str) -> Conversation:
        prompt, answer = (read if is_chat(read := loads(value)) else value for value in (prompt, answer))
        if self.asking:
            said: list[Message] = []
        elif isinstance(answer, list):
            said = self.messages.read(answer, where)
        elif is_missing(answer, self.missing):
            return self._left(NO_ANSWER, answer)
        else:
            said = [{"role": "assistant", "content": written_out(answer, "answer", where)}]
        if isinstance(prompt, list):
            return self._up_to_last_answer([*self.messages.read(prompt, where), *said])
        if is_missing(about, self.missing):
            about = None
        if is_missing(prompt, self.missing):
            if about is None:
                return self._left(NO_PROMPT, prompt)
            prompt, about = about, None
        asked: Message = {"role": "user", "content": written_out(prompt, "prompt", where)}
        if about is not None:
            asked["input"] = written_out(about, "input", where)
        return self._up_to_last_answer([asked, *said])

    def _left(self, lack: str, value: Any) -> str:
        if isinstance(value, str) and value.strip():
            self._missing_words[value.strip()] += 1
        return lack

    def _instances(self, prompt: Any, instances: Any, where: str) -> list[Conversation]:
        if self.asking and len(instances or ()) != 1:
            raise DataError(
                f"{where} has {len(instances or ())} instances, and a row is given one answer; "
                "give each a row of its own, with instruction and input"
            )
        out = []
        for one in instances or ():
            if not isinstance(one, dict) or not (self.asking or "output" in one):
                raise DataError(f"{where} has an instance that is no object with input and output")
            out.append(self._turn(prompt, one.get("output"), one.get("input"), where))
        return out

    def _chat(self, turns: Any, where: str) -> Conversation:
        turns = from_json(turns, "list of messages", where)
        if turns is None or turns == []:
            return NO_ANSWER
        return self._up_to_last_answer(self.messages.read(turns, where))

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
        learned = [i for i in said if is_learned(messages[i])]
        if not learned:
            return NOT_LEARNED if said else NO_ANSWER
        if any(m["role"] == "user" and not (m["content"].strip() or m.get("input")) for m in messages[: learned[-1]]):
            return NO_PROMPT
        if messages[-1]["role"] != "assistant":
            self._unanswered += 1
        return messages[: learned[-1] + 1]


def _refuse_bad_answers(table: Columns, source: str) -> None:
    for name in _GOOD:
        if name == "correct" and any(choices in table for choices in CHOICES):  # the place of the right one, maybe
            continue
        if False in (flags := {flag(value) for value in table.get(name, ())}) and None not in flags:
            raise DataError(
                f"{source}: column {name!r} says which answers are good, and learning apart from the bad ones "
                "(KTO) is not done here; keep the rows where it is true, or name two columns in task.prompt and "
                "task.answer to learn all rows"
            )
