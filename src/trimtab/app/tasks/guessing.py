"""Which task the columns of a file are for, for `trimtab init`.

What columns are called goes first, what stands in them second. Where that leaves two readings, nothing is chosen: the
message names the columns and the key that says which.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

from ...errors import ConfigError, DataError
from .chats import ABOUT, ANSWERS, BESIDE, CHATS, CHOICES, FORMS, PAIRS, in_small, loads
from .columns import Columns
from .data import is_missing, with_points
from .json_rows import is_chat
from .math import gold_of
from .summarize import KINDS

TEXTS = (
    "text", "sentence", "review", "content", "body", "comment", "message", "tweet", "post", "document", "article",
    "utterance", "headline", "description", "abstract", "question", "query", "prompt", "input", "title",
)  # fmt: skip
LABELS = (
    "label", "labels", "class", "category", "target", "gold_label", "sentiment", "intent", "topic", "emotion", "stars",
    "queue", "rating", "score", "similarity", "relevance", "is_duplicate", "polarity", "tag", "y",
)  # fmt: skip
TEXT_PAIRS = (
    ("premise", "hypothesis"), ("text", "text_pair"), ("query", "passage"), ("query", "document"),
    ("question", "passage"), ("question", "sentence"), ("question", "context"),
)  # fmt: skip
_LEARNED = (
    *ANSWERS, "answers", "canonical_solution", "summary", "highlights", "abstract", "tldr", "translation", "tags",
    "ner_tags", "chosen",
)  # fmt: skip
"""What is learned from another text, where it stands beside one."""
_DOCUMENTS = ("document", "article", "dialogue", "text", "content", "body", "passage", "transcript")
_NAMES_OF_ROWS = re.compile(
    r"(.*[_ ])?(id|idx|index|guid|uid|uuid|key|row|date|time|timestamp|url|hash)|unnamed.*|", re.I
)
_DATE = re.compile(r"\d{4}[-/.]\d{1,2}[-/.]\d{1,2}([T ].*)?|\d{1,2}[-/.]\d{1,2}[-/.](\d{2}|\d{4})( .*)?")
_MOST_CLASSES = 50
"""Of a column that is not called a label; and of whole numbers before they are taken for a scale."""


@dataclass(frozen=True)
class Guess:
    """A task, its settings that the columns tell, and what was understood, in words."""

    task: str
    settings: dict[str, Any] = field(default_factory=dict)
    told: str = ""
    unread: tuple[str, ...] = ()
    """Columns that the task leaves alone."""


@dataclass(frozen=True)
class _Column:
    name: str
    values: list[Any]
    """Those that are there."""
    rows: int

    @property
    def is_text(self) -> bool:
        return all(isinstance(value, str) for value in self.values)

    @property
    def is_plain(self) -> bool:
        return all(isinstance(value, (str, int, float)) for value in self.values)

    @property
    def numbers(self) -> list[float] | None:
        if any(isinstance(value, bool) for value in self.values):
            return None
        try:
            return [float(value) for value in self.values]
        except (TypeError, ValueError):
            return None

    @property
    def length(self) -> float:
        return sum(len(str(value)) for value in self.values) / len(self.values)

    @property
    def is_prose(self) -> bool:
        """Three words or more, in the mean."""
        return sum(len(str(value).split()) for value in self.values) >= 3 * len(self.values)

    @property
    def n_different(self) -> int:
        return len({re.sub(r"\.0+$", "", str(value).strip()) for value in self.values})  # 1.0 is 1

    @property
    def counts_rows(self) -> bool:
        numbers = self.numbers
        return numbers is not None and numbers == [numbers[0] + i for i in range(self.rows)]

    @property
    def is_scale(self) -> bool:
        """Numbers that are more or less, rather than names of classes."""
        numbers = self.numbers
        if numbers is None:
            return False
        return not all(n.is_integer() for n in numbers) or self.n_different > min(20, self.rows / 2)

    @property
    def repeats(self) -> bool:
        """Whether few short values come again and again, as those of classes do."""
        several = 2 <= self.n_different <= min(_MOST_CLASSES, self.rows / 3)
        return self.is_plain and several and self.length < 40 and not self.is_of_dates

    @property
    def is_of_dates(self) -> bool:
        return all(_DATE.fullmatch(str(value).strip()) for value in self.values)


def guess(table: Columns, source: str, given: Mapping[str, Any]) -> Guess:
    """The task for a table's columns.

    Args:
        source: which file it is, for messages.
        given: what the user says of ``task`` (name, text, label, …); it is taken as it stands.
    Raises:
        DataError: no task fits, or more than one.
    """
    seen = ", ".join(table)
    if any(len(name.split()) > 3 and len(name) > 20 for name in table):
        raise DataError(f"{source}: the first line of a file must name its columns; it reads {seen[:100]!r}")
    if len(table) == 1 and len({*re.split(r"[^\w ]+", seen.lower())} & {*TEXTS, *LABELS}) > 1:
        raise DataError(
            f"{source}: its first line names one column, {seen!r}; data.separator says what stands between them"
        )
    columns = {
        name: _Column(name, there, len(values))
        for name, values in table.items()
        if (there := [value for value in values if not is_missing(value)])
    }
    if not columns:
        raise DataError(f"{source}: no row has anything in it; its columns are {seen}")
    wanted = given.get("name")
    if wanted is None and {"prompt", "answer"} & given.keys():
        wanted = "instruct"
    if wanted is None and {"text_pair", "label"} & given.keys():
        wanted = "text_classification"
    if wanted is None and not given:
        _refuse_what_is_not_learned(table, columns, source)
    found = None
    if wanted in (None, "instruct", "math", "code", "summarize", "vqa"):
        found = _written(columns, wanted)
    if found is None and wanted in (None, "text_classification"):
        found = _classified(columns, source, given, list(table))
    if found is None and wanted in (None, "text"):
        found = _whole(columns, source, given, list(table), getattr(table, "notes", ()))
    if found is None and wanted is None:
        raise DataError(
            f"{source}: its columns {seen} fit no task by their names or values; say which is which: "
            "task.text=… task.label=… for classes or numbers, task.prompt=… task.answer=… for answers to learn"
        )
    found = found or Guess(str(wanted))
    settings = {**found.settings, **{key: value for key, value in given.items() if key != "name"}}
    for key in ("text", "text_pair", "label", "prompt", "answer", "document", "summary"):
        if (name := settings.get(key)) is not None and name not in table and key in given:
            raise ConfigError(f"task.{key}", name, f"no such column in {source}. It has {seen}")
    used = {str(value) for value in settings.values()}
    unread = () if found.task == "instruct" and "prompt" not in settings else tuple(n for n in columns if n not in used)
    return Guess(found.task, settings, found.told, unread if found.task in ("text_classification", "text") else ())


def _refuse_what_is_not_learned(table: Columns, columns: Mapping[str, _Column], source: str) -> None:
    """Columns that say what the rows are for, and that no task here reads: leaving them out would be another job."""
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
    for name in LABELS[:4]:
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


def _written(columns: Mapping[str, _Column], wanted: str | None) -> Guess | None:
    """Answers that the model is to write."""
    small = in_small(columns)
    held = [
        name for name, c in columns.items() if any(is_chat(v if isinstance(v, list) else loads(v)) for v in c.values)
    ]
    chats = [name for name in CHATS if name in columns and (name in held or not columns[name].is_plain)]
    others = [name for name in held if name not in BESIDE]
    if wanted == "vqa" or (
        wanted is None and {"image", "images", "image_path", "png_base64", "image_id"} & columns.keys()
    ):
        return Guess("vqa", {}, "questions about images")
    known = [*(kind.columns for kind in KINDS.values()), *((name, "summary") for name in _DOCUMENTS)]
    kinds = [(small[one], small[other]) for one, other in known if {one, other} <= small.keys()]
    if any(name in small and columns[small[name]].repeats for name in LABELS[:4]):  # a pair and its class
        kinds = [kind for kind in kinds if kind[1] != small.get("target")]
    if wanted == "summarize" or (wanted is None and kinds and not chats):
        named = dict(zip(("document", "summary"), kinds[0])) if kinds else {}
        return Guess(
            "summarize", named, f"documents ({kinds[0][0]}) and their summaries ({kinds[0][1]})" if kinds else ""
        )
    if wanted is None and ({"test_list", "code"} <= columns.keys() or {"canonical_solution", "test"} <= columns.keys()):
        return Guess("code", {}, "programs with their tests")
    if wanted in ("math", "code"):
        return Guess(wanted)
    if chats:
        return Guess("instruct", {}, f"conversations ({', '.join(chats)}{_and(columns, BESIDE)})")
    for form, needed in FORMS.items():
        if form in CHATS or not set(needed) <= small.keys():
            continue
        asked, answered = (small[name] for name in (needed[0], needed[-1]))
        answers, about = columns[answered], (PAIRS[form][2], *ABOUT) if form in PAIRS else ()
        choices = [small[name] for name in CHOICES if name in small]
        choices += [name for name in "AB" if {"A", "B"} <= columns.keys()]
        if form in PAIRS and not answers.is_plain and asked not in held:
            continue
        if wanted is None and needed[0] in ("question", "query", "problem") and not choices:
            golds = [gold_of(str(value)) for value in answers.values]
            if answers.numbers is not None or sum(gold is not None for gold in golds) > len(golds) / 2:
                return Guess("math", {}, f"problems ({asked}) and their solutions ({answered})")
        if wanted is None and answers.repeats and needed[0] != "instruction" and form != "completion" and not choices:
            continue  # yes and no, say: classes
        beside = _and(columns, [*(small.get(name or "") for name in about if name not in needed), *choices])
        return Guess("instruct", {}, f"prompts ({asked}{beside}) and answers ({answered})")
    if others and wanted in (None, "instruct"):
        return Guess("instruct", {"columns": {"messages": others[0]}}, f"conversations ({others[0]})")
    return Guess("instruct") if wanted else None


def _and(columns: Mapping[str, _Column], names: Iterable[str | None]) -> str:
    there = [name for name in dict.fromkeys(names) if name in columns]
    return f", with {', '.join(map(str, there))}" if there else ""


def _classified(
    columns: Mapping[str, _Column], source: str, given: Mapping[str, Any], names: list[str]
) -> Guess | None:
    """A class or a number for a text or two."""
    seen = ", ".join(names)
    if not given and not any(column.is_text and column.numbers is None for column in columns.values()):
        told = "no text in any row" if set(TEXTS) & (set(names) - set(columns)) else "no column of text"
        raise DataError(f"{source}: {told}; its columns are {seen}")
    label = columns.get(given["label"]) if "label" in given else _label(columns, source, given)
    if label is None:
        if given.get("name") or "label" in given:
            missing = f"task.label={given['label']!r}: no such" if "label" in given else "which is the label's"
            raise DataError(f"{source}: {missing} column? It has {seen}; say task.label=…")
        return None
    rest = {name: column for name, column in columns.items() if name != label.name}
    if "regression" not in given and with_points(label.values) != label.values:
        raise DataError(
            f"{source}: column {label.name!r} holds {label.values[0]!r}: if these are numbers with a decimal comma, "
            f"say task.label={label.name} task.regression=true; if classes, task.regression=false"
        )
    texts = _texts(rest, source, given)
    if not texts:
        raise DataError(
            f"{source}: no column of text beside the label {label.name!r}; its columns are {seen} (task.text)"
        )
    named = {*TEXTS, *(name.lower() for pair in TEXT_PAIRS for name in pair)}
    is_named = (
        bool({"label", "text"} & given.keys()) or texts[0].strip().lower() in named or all(map(str.isdigit, names))
    )
    if not is_named and label.name.strip() in {str(value).strip() for value in label.values}:
        raise DataError(
            f"{source}: the first line of a file must name its columns; it reads {seen[:100]!r}, and {label.name!r} is "
            f"among the labels below it, too; if it does name them: 'task.text={texts[0]}' 'task.label={label.name}'"
        )
    settings: dict[str, Any] = {"text": texts[0]}
    if len(texts) > 1:
        settings["text_pair"] = texts[1]
    settings["label"] = label.name
    if given.get("regression", label.is_scale and "labels" not in given):
        settings["regression"] = True
    what = "a number" if settings.get("regression") else f"one of {label.n_different} classes"
    told = " and ".join(texts[:2])
    return Guess(
        "text_classification",
        settings,
        f"{'a pair of texts' if len(texts) > 1 else 'a text'} ({told}) and {what} ({label.name})",
    )


def _label(columns: Mapping[str, _Column], source: str, given: Mapping[str, Any]) -> _Column | None:
    lower = {name.strip().lower(): name for name in columns}
    taken = {given.get("text"), given.get("text_pair")}
    for name in LABELS:
        column = columns.get(lower.get(name, ""))
        if column is not None and column.is_plain and column.name not in taken:
            return column  # of one class, too: reading it says what is lacking
    found = [
        column
        for name, column in columns.items()
        if name not in taken and name.lower() not in TEXTS and not _NAMES_OF_ROWS.fullmatch(name)
        and (column.repeats or (column.is_scale and not column.counts_rows))
    ]  # fmt: skip
    classes = [column for column in found if column.repeats] or found
    if len(classes) > 1:
        raise DataError(
            f"{source}: {', '.join(repr(column.name) for column in classes)} could each be the label; "
            f"say which: task.label={classes[0].name}"
        )
    return classes[0] if classes else None


def _texts(columns: Mapping[str, _Column], source: str, given: Mapping[str, Any]) -> list[str]:
    if "text" in given:
        return [given[key] for key in ("text", "text_pair") if given.get(key)]
    lower = {name.strip().lower(): name for name in columns}
    for first, second in TEXT_PAIRS:
        if {first.lower(), second.lower()} <= lower.keys():
            return [lower[first.lower()], lower[second.lower()]]
    named = [lower[name] for name in TEXTS if name in lower and columns[lower[name]].is_plain]
    pairs = [pair for pair in combinations(columns.values(), 2) if _is_pair(*pair)]
    pairs = [pair for pair in pairs if _stem(pair[0].name) in TEXTS] or ([] if named else pairs)
    if pairs:
        return [column.name for column in pairs[0]]
    free = [
        column
        for name, column in columns.items()
        if column.is_text and column.numbers is None and not column.repeats and not _NAMES_OF_ROWS.fullmatch(name)
    ]
    free.sort(key=lambda column: -column.length)
    alike = [c.name for c in columns.values() if c in free and c.is_prose and c.length > free[0].length / 2]
    if not named and len(alike) > 1:
        raise DataError(
            f"{source}: {', '.join(map(repr, alike))} could each be the text; say which: 'task.text={free[0].name}', "
            f"or both: 'task.text={alike[0]}' 'task.text_pair={alike[1]}'"
        )
    return named[:1] or [column.name for column in free[:1]]


def _is_pair(one: _Column, other: _Column) -> bool:
    """Whether two columns of text differ by 1 and 2 or A and B in their names: ``text1``, ``#2 String``, ``text_b``."""
    if not (one.is_text and other.is_text) or one.numbers or other.numbers or len(one.name) != len(other.name):
        return False
    differ = [i for i, (a, b) in enumerate(zip(one.name, other.name)) if a != b]
    if len(differ) != 1 or ((one.repeats or other.repeats) and _stem(one.name) not in TEXTS):
        return False
    at = differ[0]
    marks, before, after = one.name[at] + other.name[at], one.name[at - 1 : at], one.name[at + 1 : at + 2]
    is_apart = not after.isalpha() and (not before.isalpha() or (marks == "AB" and before.islower()))
    return marks == "12" or (marks.upper() == "AB" and is_apart)


def _stem(name: str) -> str:
    return re.sub(r"[_ -]?[12ABab]$", "", name.strip()).lower()


def _whole(
    columns: Mapping[str, _Column], source: str, given: Mapping[str, Any], names: list[str], notes: Iterable[str]
) -> Guess | None:
    """Plain text, to be learned as it stands."""
    if "text" in given:
        return Guess("text", {"text": given["text"]}, f"plain text ({given['text']})")
    texts = [c for name, c in columns.items() if c.is_text and c.numbers is None and not _NAMES_OF_ROWS.fullmatch(name)]
    named = [c for c in texts if c.name.strip().lower() in TEXTS]
    chosen = texts if len(texts) == 1 else named if len(named) == 1 else []
    if not chosen:
        return None
    nameless = next((note for note in notes if re.match(r"column (?!1 )\d+ has no name", note)), None)  # 1: an index
    if nameless and not given:
        raise DataError(f"{source}: {nameless}; name it, or say task.name=text 'task.text={chosen[0].name}'")
    lists = [name for name, column in columns.items() if any(isinstance(v, (list, dict)) for v in column.values)]
    if lists and not given:
        raise DataError(
            f"{source}: columns {', '.join(columns)}, of which {', '.join(lists)} hold lists; say what is learned: "
            f"task.name=text task.text={chosen[0].name} for that column alone, or task.prompt=… task.answer=…"
        )
    small = in_small(names)  # with those that hold nothing
    if not given and (learned := [small[name] for name in _LEARNED if name in small and small[name] != chosen[0].name]):
        raise DataError(
            f"{source}: {learned[0]!r} beside {chosen[0].name!r} is called like what is to be learned from it; if it "
            f"is, say 'task.prompt={chosen[0].name}' 'task.answer={learned[0]}', else task.name=text "
            f"'task.text={chosen[0].name}'"
        )
    return Guess("text", {"text": chosen[0].name}, f"plain text ({chosen[0].name})")
