"""Which task the columns of a file are for, for `trimtab init`.

What columns are called goes first, what stands in them second. Where that leaves two readings, nothing is chosen: the
message names the columns and the key that says which.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

from ...errors import ConfigError, DataError
from .cells import loads
from .columns import Columns
from .data import with_points
from .forms import ABOUT, ANSWERS, BESIDE, CHATS, CHOICES, FORMS, PAIRS, PROMPTS
from .json_rows import is_chat
from .labels import unit_of, units, without_unit
from .looks import Column, filled
from .math import gold_of
from .names import (
    CLASSES,
    DOCUMENTS,
    HEADINGS,
    IMAGES,
    LABELS,
    LEARNED,
    OF_TEXTS,
    TEXT_PAIRS,
    TEXTS,
    are_numbered,
    in_small,
    is_sentence,
    names_choices,
    names_rows,
    stem,
)
from .summarize import KINDS

_KEYS_OF_COLUMNS = ("text", "text_pair", "label", "prompt", "answer", "document", "summary")


@dataclass(frozen=True)
class Guess:
    """A task, its settings that the columns tell, and what was understood, in words."""

    task: str
    settings: dict[str, Any] = field(default_factory=dict)
    told: str = ""
    unread: tuple[str, ...] = ()
    """Columns that the task leaves alone."""


@dataclass(frozen=True)
class _File:
    """The columns of a file, and what the user says of the task."""

    source: str
    table: Columns
    columns: dict[str, Column]
    """Those that hold something."""
    given: Mapping[str, Any]

    @property
    def seen(self) -> str:
        return ", ".join(self.table)


def guess(table: Columns, source: str, given: Mapping[str, Any]) -> Guess:
    """The task for a table's columns.

    Args:
        source: which file it is, for messages.
        given: what the user says of ``task`` (name, text, label, …); it is taken as it stands.
    Raises:
        DataError: no task fits, or more than one.
    """
    file = _File(source, table, filled(table), given)
    _refuse_what_is_no_header(file)
    wanted = given.get("name")
    if wanted is None and {"prompt", "answer"} & given.keys():
        wanted = "instruct"
    if wanted is None and {"text_pair", "label"} & given.keys():
        wanted = "text_classification"
    if wanted is None and not given:
        _refuse_what_is_not_learned(file)
    found = None
    if wanted in (None, "instruct", "math", "code", "summarize", "vqa"):
        found = _written(file, wanted)
    if found is None and wanted in (None, "text_classification"):
        found = _classified(file)
    if found is None and wanted in (None, "text"):
        found = _whole(file)
    if found is None and wanted is None:
        raise DataError(
            f"{source}: its columns {file.seen} fit no task by their names or values; say which is which: "
            "task.text=… task.label=… for classes or numbers, task.prompt=… task.answer=… for answers to learn"
        )
    found = found or Guess(str(wanted))
    settings = {**found.settings, **{key: value for key, value in given.items() if key != "name"}}
    for key in _KEYS_OF_COLUMNS:
        if (name := settings.get(key)) is not None and name not in table and key in given:
            raise ConfigError(f"task.{key}", name, f"no such column in {source}. It has {file.seen}")
    used = {str(value) for value in settings.values()}
    leaves = found.task in ("text_classification", "text")
    return Guess(found.task, settings, found.told, tuple(n for n in file.columns if leaves and n not in used))


def _refuse_what_is_no_header(file: _File) -> None:
    seen = file.seen
    if any(map(is_sentence, file.table)):
        raise DataError(f"{file.source}: the first line of a file must name its columns; it reads {seen[:100]!r}")
    if len(file.table) == 1 and len({*re.split(r"[^\w ]+", seen.lower())} & {*TEXTS, *LABELS}) > 1:
        raise DataError(
            f"{file.source}: its first line names one column, {seen!r}; data.separator says what stands between them"
        )
    if not file.columns:
        raise DataError(f"{file.source}: no row has anything in it; its columns are {seen}")


def _refuse_what_is_not_learned(file: _File) -> None:
    """Columns that say what the rows are for, and that no task here reads: leaving them out would be another job."""
    table, columns, source = file.table, file.columns, file.source
    if {"preferred_output", "non_preferred_output"} <= table.keys():
        raise DataError(
            f"{source}: 'preferred_output' and 'non_preferred_output' are answers to prefer one of, which is not "
            "learned here; to learn the preferred ones, put them behind the input's messages, in one column messages"
        )
    if {"chosen", "rejected"} <= table.keys():
        chats = any(map(is_chat, columns["chosen"].values)) if "chosen" in columns else False
        asked = next((name for name in ("prompt", "question", "instruction", "input") if name in table), None)
        how = f"instruct task.prompt={asked} task.answer=chosen" if asked else "text task.text=chosen"
        how = "instruct 'task.columns={messages: chosen}'" if chats else how
        raise DataError(
            f"{source}: 'chosen' and 'rejected' are answers to prefer one of, which is not learned here; "
            f"to learn the chosen ones: task.name={how}"
        )
    for name in CLASSES:
        values = columns[name].values if name in columns else []
        values = [read if isinstance(read := loads(value), (list, dict)) else value for value in values]
        if any(isinstance(value, (list, dict)) for value in values):
            raise DataError(
                f"{source}: column {name!r} holds {type(values[0]).__name__}s, and one label a row is learned; "
                "make it one, or learn the text alone: task.name=text"
            )
        if name in table and not values and not set(CHATS) & columns.keys():
            raise DataError(
                f"{source}: column {name!r} has nothing in any row; to learn the text alone: task.name=text"
            )


# -- answers that the model is to write ------------------------------------------------------------------


def _written(file: _File, wanted: str | None) -> Guess | None:
    columns = file.columns
    held = [
        name for name, c in columns.items() if any(is_chat(v if isinstance(v, list) else loads(v)) for v in c.values)
    ]
    chats = [name for name in CHATS if name in columns and (name in held or not columns[name].is_plain)]
    if wanted == "vqa" or (wanted is None and IMAGES & columns.keys()):
        return Guess("vqa", {}, "questions about images")
    if wanted == "summarize" or (wanted is None and not chats):
        found = _summaries(columns)
        if found or wanted:
            return found or Guess("summarize")
    if wanted is None and ({"test_list", "code"} <= columns.keys() or {"canonical_solution", "test"} <= columns.keys()):
        return Guess("code", {}, "programs with their tests")
    if wanted in ("math", "code"):
        return Guess(wanted)
    if chats:
        return Guess("instruct", {}, f"conversations ({', '.join(chats)}{_and(columns, BESIDE)})")
    if found := _prompts(columns, held, wanted):
        return found
    if others := [name for name in held if name not in BESIDE]:
        return Guess("instruct", {"columns": {"messages": others[0]}}, f"conversations ({others[0]})")
    return Guess("instruct") if wanted else None


def _summaries(columns: Mapping[str, Column]) -> Guess | None:
    small = in_small(columns)
    known = [*(kind.columns for kind in KINDS.values()), *((name, "summary") for name in DOCUMENTS)]
    if any(name in small and columns[small[name]].repeats for name in CLASSES):
        known = [pair for pair in known if pair[1] != "target"]  # a pair of texts and its class
    for names in known:
        if small.keys() >= set(names):
            document, summary = (small[name] for name in names)
            settings = {"document": document, "summary": summary}
            return Guess("summarize", settings, f"documents ({document}) and their summaries ({summary})")
    return None


def _prompts(columns: Mapping[str, Column], held: Sequence[str], wanted: str | None) -> Guess | None:
    """Prompts and answers in two columns; ``held`` are those of messages."""
    small = in_small(columns)
    choices = [small[name] for name in CHOICES if name in small]
    choices += [name for name in "AB" if {"A", "B"} <= columns.keys()]
    for form, needed in FORMS.items():
        if form in CHATS or not set(needed) <= small.keys():
            continue
        asked, answered = (small[name] for name in (needed[0], needed[-1]))
        answers = columns[answered]
        if form in PAIRS and not answers.is_plain and asked not in held:
            continue
        if wanted is None and not choices:
            if needed[0] in ("question", "query", "problem") and _are_solutions(answers):
                return Guess("math", {}, f"problems ({asked}) and their solutions ({answered})")
            if answers.repeats and needed[0] != "instruction" and form != "completion":
                continue  # yes and no, say: classes
        about = (PAIRS[form][2] or "", *ABOUT) if form in PAIRS else ()
        beside = _and(columns, [*(small.get(name, "") for name in about if name not in needed), *choices])
        return Guess("instruct", {}, f"prompts ({asked}{beside}) and answers ({answered})")
    return None


def _are_solutions(answers: Column) -> bool:
    golds = [gold_of(str(value)) for value in answers.values]
    return answers.numbers is not None or sum(gold is not None for gold in golds) > len(golds) / 2


def _and(columns: Mapping[str, Column], names: Iterable[str]) -> str:
    there = [name for name in dict.fromkeys(names) if name in columns]
    return f", with {', '.join(there)}" if there else ""


# -- a class or a number for a text or two ---------------------------------------------------------------


def _classified(file: _File) -> Guess | None:
    columns, given, source = file.columns, file.given, file.source
    if not given and not any(column.is_text and column.numbers is None for column in columns.values()):
        told = "no text in any row" if set(TEXTS) & (file.table.keys() - columns.keys()) else "no column of text"
        raise DataError(f"{source}: {told}; its columns are {file.seen}")
    label = columns.get(given["label"]) if "label" in given else _label(file)
    if label is None:
        if given.get("name") or "label" in given:
            missing = f"task.label={given['label']!r}: no such" if "label" in given else "which is the label's"
            raise DataError(f"{source}: {missing} column? It has {file.seen}; say task.label=…")
        return None
    if not {"regression", "labels"} & given.keys():
        _refuse_unclear_numbers(label, source)
    beside = {name: column for name, column in columns.items() if name != label.name}
    if not {"text", "name"} & given.keys() and (choices := list(filter(names_choices, beside))):
        raise DataError(
            f"{source}: {', '.join(map(repr, choices))} look like choices, and {label.name!r} like the right one: "
            f"{_how_to_choose(label.name, choices, beside)}; if not, name text and label: task.text=… "
            f"'task.label={label.name}'"
        )
    texts = _texts(file, beside)
    if not texts:
        raise DataError(
            f"{source}: no column of text beside the label {label.name!r}; its columns are {file.seen} (task.text)"
        )
    is_named = texts[0].strip().lower() in OF_TEXTS or all(map(str.isdigit, file.table))
    says_so = is_named or {"label", "text"} & given.keys()
    if not says_so and label.name.strip() in {str(value).strip() for value in label.values}:
        raise DataError(
            f"{source}: the first line of a file must name its columns; it reads {file.seen[:100]!r}, and "
            f"{label.name!r} is among the labels below it, too; if it does name them: 'task.text={texts[0]}' "
            f"'task.label={label.name}'"
        )
    settings: dict[str, Any] = dict(zip(("text", "text_pair"), texts)) | {"label": label.name}
    what = f"one of {label.n_different} classes"
    if given.get("regression", label.is_scale and "labels" not in given):
        settings["regression"], what = True, "a number"
    what = f"{'a pair of texts' if len(texts) > 1 else 'a text'} ({' and '.join(texts)}) and {what} ({label.name})"
    return Guess("text_classification", settings, what)


def _how_to_choose(label: str, choices: Sequence[str], columns: Mapping[str, Column]) -> str:
    """How a model learns to answer with one of a row's choices."""
    others = [name for name, column in columns.items() if name not in choices and column.is_free_text]
    longest = max(others, key=lambda name: columns[name].length, default="…")
    asked = next((name for name in columns if name.strip().lower() in PROMPTS), longest)
    if len(choices) > 1:
        return f"to learn it, put them into one column of lists, choices, beside {asked!r} and answer (its letter)"
    ours = {"question": asked, "choices": choices[0], "answer": label}
    known = {"question": PROMPTS, "choices": CHOICES, "answer": ANSWERS}
    told = ", ".join(f"{name}: {theirs}" for name, theirs in ours.items() if theirs not in known[name])
    return f"to learn it, task.name=instruct 'task.columns={{{told}}}'"


def _refuse_unclear_numbers(label: Column, source: str) -> None:
    numbers = list(without_unit(label.values))
    if with_points(numbers) != numbers:
        raise DataError(
            f"{source}: column {label.name!r} holds {label.values[0]!r}: if these are numbers with a decimal comma, "
            f"say task.label={label.name} task.regression=true; if classes, task.regression=false"
        )
    if not unit_of(label.values) and (found := units(label.values) - {""}):
        raise DataError(
            f"{source}: column {label.name!r} holds {label.values[0]!r}, and not all in one unit "
            f"({', '.join(sorted(found))}): write numbers in one; if these are classes, task.regression=false"
        )


def _label(file: _File) -> Column | None:
    small = {name.strip().lower(): name for name in file.columns}
    taken = {file.given.get("text"), file.given.get("text_pair")}
    for name in LABELS:
        column = file.columns.get(small.get(name, ""))
        if column is not None and column.is_plain and column.name not in taken:
            return column  # of one class, too: reading it says what is lacking
    free = [c for n, c in file.columns.items() if n not in taken and n.lower() not in TEXTS and not names_rows(n)]
    free = [column for column in free if not names_choices(column.name)]
    classes = [column for column in free if column.repeats]
    classes = classes or [column for column in free if column.is_scale and not column.counts_rows]
    if len(classes) > 1:
        raise DataError(
            f"{file.source}: {', '.join(repr(column.name) for column in classes)} could each be the label; "
            f"say which: task.label={classes[0].name}"
        )
    return classes[0] if classes else None


def _texts(file: _File, columns: Mapping[str, Column]) -> list[str]:
    """The one or two columns of text beside the label."""
    if "text" in file.given:
        return [file.given[key] for key in ("text", "text_pair") if file.given.get(key)]
    small = {name.strip().lower(): name for name in columns}
    for pair in TEXT_PAIRS:
        if set(pair) <= small.keys():
            return [small[name] for name in pair]
    named = [small[name] for name in TEXTS if name in small and columns[small[name]].is_plain]
    if named and named[0].strip().lower() in HEADINGS:  # of a column of another name
        named = [n for n in named if not any(c.is_prose and c.length > columns[n].length for c in columns.values())]
    free = sorted((column for column in columns.values() if column.is_free_text), key=lambda c: -c.length)
    if numbered := _numbered(columns, [] if named else free):
        return numbered
    alike = [c.name for c in columns.values() if c in free and c.is_prose and c.length > free[0].length / 2]
    if not named and len(alike) > 1:
        raise DataError(
            f"{file.source}: {', '.join(map(repr, alike))} could each be the text; say which: "
            f"'task.text={free[0].name}', or both: 'task.text={alike[0]}' 'task.text_pair={alike[1]}'"
        )
    return named[:1] or [column.name for column in free[:1]]


def _numbered(columns: Mapping[str, Column], free: Sequence[Column]) -> list[str]:
    """A pair of texts by their numbers or letters: ``text1`` and ``text2``, or any two of the ``free`` ones, where no
    third could be the text (two teams and a report)."""
    texts = [column for column in columns.values() if column.is_text and column.numbers is None]
    pairs = [pair for pair in combinations(texts, 2) if are_numbered(pair[0].name, pair[1].name)]
    for one, other in pairs:
        if stem(one.name) in TEXTS:
            return [one.name, other.name]
    for one, other in pairs:
        longest = max(one.length, other.length)
        others = [column for column in free if column not in (one, other)]
        if one in free and other in free and not any(c.is_prose or c.length > longest for c in others):
            return [one.name, other.name]
    return []


# -- plain text, to be learned as it stands --------------------------------------------------------------


def _whole(file: _File) -> Guess | None:
    columns, given, source = file.columns, file.given, file.source
    if "text" in given:
        return Guess("text", {"text": given["text"]}, f"plain text ({given['text']})")
    texts = [name for name, c in columns.items() if c.is_text and c.numbers is None and not names_rows(name)]
    named = [name for name in texts if name.strip().lower() in TEXTS]
    chosen = texts if len(texts) == 1 else named if len(named) == 1 else []
    if not chosen:
        return None
    text, found = chosen[0], Guess("text", {"text": chosen[0]}, f"plain text ({chosen[0]})")
    if given:
        return found
    if nameless := [place for place in getattr(file.table, "nameless", ()) if place > 1]:  # the first: an index
        raise DataError(
            f"{source}: column {nameless[0]} has no name in the first line and is not read; name it, or say "
            f"task.name=text 'task.text={text}'"
        )
    if lists := [name for name, column in columns.items() if any(isinstance(v, (list, dict)) for v in column.values)]:
        raise DataError(
            f"{source}: columns {', '.join(columns)}, of which {', '.join(lists)} hold lists; say what is learned: "
            f"task.name=text task.text={text} for that column alone, or task.prompt=… task.answer=…"
        )
    of_it = columns[text]
    rivals = [
        c.name for c in columns.values()
        if c is not of_it and c.is_free_text and not names_choices(c.name)
        and (text.strip().lower() in PROMPTS or (c.is_prose and c.length > of_it.length))
    ]  # fmt: skip
    small = in_small(file.table)  # with those that hold nothing
    if learned := [small[name] for name in LEARNED if name in small and small[name] != text]:
        raise DataError(
            f"{source}: {learned[0]!r} beside {text!r} is called like what is to be learned from it; if it is, say "
            f"'task.prompt={text}' 'task.answer={learned[0]}', else task.name=text 'task.text={text}'"
        )
    if rivals:
        raise DataError(
            f"{source}: {', '.join(map(repr, rivals))} beside {text!r}: if one of them is to be learned from it, say "
            f"'task.prompt={text}' 'task.answer={rivals[0]}', else task.name=text 'task.text={text}'"
        )
    return found
