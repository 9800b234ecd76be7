"""Word problems: the final number of a generated solution, exactly.

Training rows are MetaMathQA's (query, response), GSM8K's (question, answer), MATH's (problem, solution) or
instruction rows; for scoring, a row's right answer is what its column ``answer`` says beside the solution, else what
its own solution ends in. Without files: trained on MetaMathQA (Yu et al. 2023) or, with ``dataset: gsm8k``, on GSM8K
(Cobbe et al. 2021), and scored on GSM8K's test rows.

Two readings of a generated solution, as in lm-eval's gsm8k: ``exact_match_strict`` takes what follows the
first mark (``####``), ``exact_match_flexible`` the last number there is. Unlike there, numbers are compared
as numbers (18, 18.0 and $18.00 are one), and right answers that are letters (A to E) or formulas count too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import TYPE_CHECKING, Any, ClassVar

from ...errors import ConfigError
from .answering import check_choice, mean_of
from .chats import Conversation
from .data import Columns, is_missing
from .instruct import Instruct

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

# A minus sign counts as one only where it cannot mean "take away"; currency may stand on either side of it.
_THOUSANDS = r"\d{1,3}(?:,\d{3})+(?!,?\d)"  # 1,200 is one number; 1,5 and 1, 2 are none
_NUMBER = rf"(?:(?<![\w)])-[$€£]?|[$€£]-?)?(?:{_THOUSANDS}|\d+)(?:\.\d+)?|(?<!\d)\.\d+"
# "12 km" is 12; "2 million" and "3 and a half" are not the number that they begin with.
_UNIT = r"\s+(?!(?:hundred|thousand|million|billion|trillion|dozen|and|or|to)\b)[A-Za-z][A-Za-z ,./-]*"
_LETTER = re.compile(r"\(?([A-E])\)?|\(([A-E])\).*|([A-E])(?:\)|[.:]\s).*")
_BLANK = r"(?<!\d)\s+|\s+(?!\d)"  # 2 1/2 is not 21/2
_CALCULATION = re.compile(r"<<[^<>]*>>")
GSM8K = ("openai/gsm8k", "main")
DATASETS: dict[str, tuple[str, str | None]] = {"metamathqa": ("meta-math/MetaMathQA", None), "gsm8k": GSM8K}
_BOLD = re.compile(r"(?<![\w)])\*\*(?=\S)(.+?)\*\*(?!\w)")  # 2**3 is a power
_BOXED = re.compile(r"\\f?boxed\s*")
_GOLD_MARKS = tuple(
    re.compile(mark)
    for mark in (
        "####",
        "The answer is:",
        _BOXED.pattern,
        r"(?mi:^\W*(?:final )?answer:)",
        "The answer is",
        "answer is",
    )
)
"""What a reference solution's final answer follows; the first of these that there is, where it comes last."""


@dataclass(kw_only=True)
class Math(Instruct):
    """Problems with one right final answer."""

    name: str = "math"
    metric: str = "exact_match_flexible"
    """Headline score: exact_match_flexible or exact_match_strict."""
    dataset: str = "metamathqa"
    """What is trained on where no files are given: metamathqa or gsm8k."""
    marks: list[str] = field(default_factory=lambda: ["####"])
    """What the final answer follows, for the strict score (MetaMathQA's solutions end in ``The answer is:``)."""
    calculator_marks: bool = False
    """Keep GSM8K's ``<<48/2=24>>`` in what is learned."""
    instruction: str | None = None
    """Put before every problem, when training and when asking."""

    greater_is_better = True
    read_beside = ("answer",)
    decoding_defaults: ClassVar[Mapping[str, Any]] = {
        "max_new_tokens": 256,
        "stop": ("\nQuestion:", "### Instruction:"),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("task.metric", self.metric, ("exact_match_flexible", "exact_match_strict", "answer_loss"))
        check_choice("task.dataset", self.dataset, DATASETS)
        self.greater_is_better = self.metric != "answer_loss"
        if isinstance(self.marks, str):
            self.marks = [self.marks]
        is_list = isinstance(self.marks, list) and bool(self.marks)
        if not is_list or not all(isinstance(mark, str) and mark for mark in self.marks):
            raise ConfigError("task.marks", self.marks, "a list of texts, such as ['####', 'The answer is:']")

    @property
    def hub_sources(self) -> Mapping[str, tuple[str, str | None, str]]:
        return {"train": (*DATASETS[self.dataset], "train"), "test": (*GSM8K, "test")}

    def conversations(self, split: str, table: Columns, source: str) -> Columns:
        messages = super().conversations(split, table, source)["messages"]
        names = (name for name in table if name.strip().lower() == "answer" and name != self._answers_in)
        stated = table.get(next(names, ""), [])
        out: Columns = {"messages": [self._asked(turns) for turns in messages]}
        # A Self-Instruct row may become several; then there is no column of answers to go with them.
        given = [None if is_missing(value, self.missing) else str(value) for value in stated]
        given = given if len(given) == len(messages) else [None] * len(messages)
        out["gold"] = [
            _gold(turns[-1]["content"], value) if isinstance(turns, list) else None
            for turns, value in zip(messages, given)
        ]
        return out

    def load_data(self, data: Mapping[str, Any] | None = None) -> DatasetDict:
        rows = super().load_data(data)
        for split in self.eval_splits(rows):
            golds = rows[split]["gold"][:]
            if n := sum(gold is None for gold in golds):
                self.notes.append(
                    f"{split}: {n} of {len(golds)} rows state no final answer and are not scored"
                    if n < len(golds)
                    else f"{split}: no row states a final answer: exact match is not scored; it is known by #### 12, "
                    "\\boxed{12}, 'The answer is 12', a bare 12, or a column answer"
                )
        return rows

    def questions(self, table: Columns, source: str) -> Columns:
        return {"messages": [self._asked(turns) for turns in super().questions(table, source)["messages"]]}

    def _asked(self, turns: Conversation) -> Conversation:
        if isinstance(turns, str):
            return turns
        turns = [dict(m) for m in turns]
        for m in turns:
            if m["role"] == "assistant" and not self.calculator_marks:
                m["content"] = _CALCULATION.sub("", m["content"])
            elif m["role"] == "user" and self.instruction:
                m["content"] = f"{self.instruction}\n\n{m['content']}"
        return turns

    def needs_generation(self, rows: Dataset) -> bool:
        return any(gold is not None for gold in rows["gold"])

    def score(self, rows: Dataset, answers: list[list[str]]) -> tuple[dict[str, float], list[dict[str, Any]]]:
        scored: list[dict[str, Any]] = []
        for i, (gold, turns, samples) in enumerate(zip(rows["gold"], rows["messages"], answers)):
            if gold is None:
                continue
            # A row whose answer is nothing but the number teaches no mark: the whole answer is read in its place.
            is_bare = gold_of(turns[-1]["content"]) is None
            marks = () if is_bare and bare_gold(turns[-1]["content"]) is not None else self.marks
            strict = [is_same(strict_answer(text, marks, gold), gold) for text in samples]
            flexible = [is_same(flexible_answer(text, gold), gold) for text in samples]
            scored.append({"row": i, "gold": gold, "strict": strict, "flexible": flexible})
        return {
            "exact_match_flexible": mean_of(mean_of(row["flexible"]) for row in scored),
            "exact_match_strict": mean_of(mean_of(row["strict"]) for row in scored),
        }, scored


def _gold(solution: str, stated: str | None) -> str | None:
    """The right answer that stands beside the solution, else the one that the solution ends in."""
    own = gold_of(solution) or bare_gold(solution)
    if stated is None:
        return own
    return gold_of(stated) or (None if "\n" in stated.strip() else _answer_in(stated)) or own


def gold_of(solution: str) -> str | None:
    """The final answer that a reference solution states, as text; None if it states none.

    >>> gold_of("48/2 = 24 clips, 72 in all.\\n#### 72")
    '72'
    >>> gold_of("So the price is 1,200. The answer is: $1,200. I hope this helps!")
    '$1,200'
    """
    solution = _unmarked(solution)
    for mark in _GOLD_MARKS:
        if found := list(mark.finditer(solution)):
            is_boxed = mark.pattern == _BOXED.pattern
            return _answer_in(solution[found[-1].start() if is_boxed else found[-1].end() :])
    return None


def _unmarked(text: str) -> str:
    """Without what Markdown and LaTeX put around a number, and with one sign for minus."""
    text = _BOLD.sub(r"\1", text).replace("\u2212", "-").replace("\\!", "")
    return re.sub(r"\\([$%])", r"\1", text)


def _answer_in(text: str) -> str | None:
    """The answer that a text begins with, up to the end of its line or sentence."""
    text = _unmarked(text).strip().split("\n")[0].strip()
    if boxes := list(_BOXED.finditer(text)):
        text = _in_braces(text[boxes[-1].end() :]).strip()
    letter = _LETTER.fullmatch(text.removesuffix("."))
    text = re.split(r"(?<!\b[A-Z])[.!?](?=\s+[A-Z(])", text)[0].removesuffix(".")  # the sentence's own full stop
    if letter := letter or _LETTER.fullmatch(text):
        return letter[1] or letter[2] or letter[3]
    # Words after a number are its unit ("18 hours"); anything else makes it a formula.
    number = re.fullmatch(rf"({_NUMBER})[%$€£]?(?:{_UNIT})?[\s,.]*", text)
    return number[1] if number else text or None


def _in_braces(text: str) -> str:
    """What stands in the braces that a text begins with, which may hold others; without them, up to ``$``."""
    depth = 0
    for i, char in enumerate(text if text.startswith("{") else ""):
        depth += (char == "{") - (char == "}")
        if not depth:
            return text[1:i]
    return text.lstrip("{").split("$")[0]


def bare_gold(solution: str) -> str | None:
    """The final answer where a reference solution is nothing but that: a number, an option's letter, one formula.

    >>> [bare_gold(text) for text in ("72", "1,200 euros", "(B)", "3/4", "It is 72, then.")]
    ['72', '1,200', 'B', '3/4', None]
    """
    text = solution.strip().removesuffix(".")
    if "\n" in text or (re.search(r"[.!?]\s", text) and not _LETTER.fullmatch(text)):
        return None
    stated = _answer_in(text)
    return stated if stated != text or not re.search(r"\s", text) else None


def strict_answer(text: str, marks: Sequence[str], gold: str) -> str | None:
    """What follows the first mark in a generated text, of the right answer's kind; without marks, the text itself.

    Around a number, what Markdown and LaTeX put there is left out.

    >>> strict_answer("It is 3.\\n#### 1,200\\nQuestion: 7", ["####"], "5")
    '1,200'
    """
    text = _unmarked(text)
    places = [(text.index(mark), mark) for mark in marks if mark in text]
    if marks and not places:
        return None
    at, mark = min(places) if places else (0, "")
    after = text[at + len(mark) :].lstrip(" :" if places else None)
    if begins := _BOXED.match(after.lstrip("$")):
        after = _in_braces(after.lstrip("$")[begins.end() :])
    if number_of(gold) is not None:
        found = re.match(_NUMBER, after)
        return found[0] if found else None
    if _is_letter(gold):
        found = re.match(r"\(?([A-Z])\)?(?![A-Za-z])", after)
        return found[1] if found else None
    return _answer_in(after)


def flexible_answer(text: str, gold: str) -> str | None:
    """The last number (or option letter) anywhere in a generated text.

    >>> flexible_answer("5 + 7 = 12, so $12.00 it is.", "12")
    '$12.00'
    """
    text = _unmarked(text)
    if number_of(gold) is not None:
        numbers = re.findall(_NUMBER, text)
        return numbers[-1] if numbers else None
    if _is_letter(gold):
        letters = re.findall(r"(?<![A-Za-z])([A-E])(?![A-Za-z])", text)
        return letters[-1] if letters else None
    return gold_of(text) or _answer_in(text)


def is_same(answer: str | None, gold: str) -> bool:
    """Equal as numbers, if both are; else as text without spaces, dollar signs and a final stop.

    Whole numbers must be equal exactly, others to a millionth (1.3333333 and 4/3 written out are one).

    >>> is_same("$18.00", "18"), is_same("\\\\frac{1}{2}", " \\\\frac{1}{2}."), is_same(None, "3")
    (True, True, False)
    """
    if answer is None:
        return False
    left, right = number_of(answer), number_of(gold)
    if left is not None and right is not None:
        is_whole = all(number == number.to_integral_value() for number in (left, right))  # % fails beyond 28 digits
        return left == right if is_whole else abs(left - right) <= abs(right) * Decimal("1e-6")
    return _plain(answer) == _plain(gold)


def number_of(text: str) -> Decimal | None:
    """The number that a text is, whatever thousands separators, currency or percent signs it has.

    >>> number_of("1,200.0") == number_of("$1200")
    True
    """
    cleaned = re.sub(rf"(?<![\d,]){_THOUSANDS}", lambda found: found[0].replace(",", ""), text.replace("\u2212", "-"))
    cleaned = re.sub(rf"{_BLANK}|[$€£%]", "", cleaned).removesuffix(".")
    return Decimal(cleaned) if re.fullmatch(r"-?(\d+\.?\d*|\.\d+)", cleaned) else None


def _is_letter(gold: str) -> bool:
    return re.fullmatch(r"[A-E]", gold.strip()) is not None


def _plain(text: str) -> str:
    return re.sub(rf"{_BLANK}|[$]", "", text).removesuffix(".").strip("()")
