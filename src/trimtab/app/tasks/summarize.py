"""Summaries, scored by ROUGE-1, -2, -L and -Lsum (Lin 2004), the best over a row's references.

Rows of XSum (document, summary), CNN/DailyMail (article, highlights), SciTLDR (source, target), DialogSum
(dialogue, summary), or any two columns. A long document is cut, never the instruction or the summary.

ROUGE is Google's rouge-score package with its stemmer, F1, averaged over rows, from 0 to 1. For Lsum a text
is split into sentences at its line breaks or, where it has none, after ``. ! ?``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, ClassVar

from ...errors import ConfigError, DataError
from .answering import Answering, check_choice, mean_of
from .cells import loads
from .columns import Columns, Table
from .data import column, is_missing
from .messages import Message

if TYPE_CHECKING:
    from datasets import Dataset

NEEDS = "ROUGE needs the package rouge-score: pip install 'trimtab[summarize]'"
SCORES = ("rouge1", "rouge2", "rougeL", "rougeLsum")


@dataclass(frozen=True)
class _Kind:
    columns: tuple[str, str]
    instruction: str
    repository: str
    configuration: str | None = None


_ONE = "Summarize the {} in one sentence."
KINDS = {
    "xsum": _Kind(("document", "summary"), _ONE.format("article"), "EdinburghNLP/xsum"),
    "cnn_dailymail": _Kind(
        ("article", "highlights"),
        "Summarize the article in three or four short sentences.",
        "abisee/cnn_dailymail",
        "3.0.0",
    ),
    "scitldr": _Kind(("source", "target"), _ONE.format("paper"), "allenai/scitldr", "Abstract"),
    "dialogsum": _Kind(("dialogue", "summary"), "Summarize the dialogue.", "knkarthick/dialogsum"),
}


@dataclass(kw_only=True)
class Summarize(Answering):
    """Summaries of documents, by a decoder (with an instruction) or an encoder-decoder."""

    name: str = "summarize"
    metric: str = "rougeL"
    """Headline score: rouge1, rouge2, rougeL or rougeLsum."""
    dataset: str | None = None
    """xsum, cnn_dailymail, scitldr or dialogsum: its columns, its instruction, and where no files are given its rows
    from the hub. Without it the columns tell."""
    document: str | None = None
    """Column of the document, where it has another name."""
    summary: str | None = None
    """Column of the summary (a text, or a list of references)."""
    instruction: str | None = None
    """What a decoder is asked to do."""
    prefix: str | None = None
    """Put before the document for an encoder-decoder; without it ``summarize: `` for T5, nothing for others."""
    max_source_length: int = 512
    """Tokens of the document."""
    max_target_length: int | None = 128
    """Tokens of the summary."""

    greater_is_better = True

    decoding_defaults: ClassVar[Mapping[str, Any]] = {"max_new_tokens": 128}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("task.metric", self.metric, SCORES)
        if self.dataset is not None:
            check_choice("task.dataset", self.dataset, KINDS)
        if find_spec("rouge_score") is None:  # now, not after hours of training
            raise ConfigError("task.name", self.name, NEEDS)
        if not isinstance(self.max_source_length, int) or self.max_source_length < 1:
            raise ConfigError("task.max_source_length", self.max_source_length, "a whole number of tokens, at least 1")
        if (self.document is None) != (self.summary is None):
            missing = "summary" if self.summary is None else "document"
            raise ConfigError(f"task.{missing}", None, "name both columns, task.document and task.summary, or neither")
        self._prefix = self.prefix or ""

    @property
    def hub_sources(self) -> Mapping[str, tuple[str, str | None, str]]:
        if self.dataset is None:
            return {}
        kind = KINDS[self.dataset]
        return {split: (kind.repository, kind.configuration, split) for split in ("train", "validation", "test")}

    def adjust_to(self, config: Any) -> None:
        super().adjust_to(config)
        if self.prefix is None:
            self._prefix = "summarize: " if config.model_type in ("t5", "mt5", "umt5") else ""

    def conversations(self, split: str, table: Columns, source: str) -> Columns:
        names, instruction = self._columns(table, source)
        self.say_unread(split, table, names)
        texts, references = self._read(table, names, source)
        return {
            "messages": [
                "no document" if text is None else self._turns(instruction, text, refs[0]) if refs else "no summary"
                for text, refs in zip(texts, references)
            ],
            "references": references,
        }

    def gathered(self, split: str, table: Table, source: str) -> Table:
        """Rows with the same document become one row with all their references (DialogSum gives one a row)."""
        if split == "train":
            return table
        (document, summary), _ = self._columns(table, source)
        texts, references = _together(*self._read(table, (document, summary), source))
        return Table({document: texts, summary: references}, table.notes)

    def _read(self, table: Columns, names: tuple[str, str], source: str) -> tuple[list[str | None], list[list[str]]]:
        documents, summaries = (table[name] for name in names)
        texts = [
            None if is_missing(value, self.missing) else _joined(value, i, source)
            for i, value in enumerate(documents, 1)
        ]
        return texts, [_references(value, i, source, self.missing) for i, value in enumerate(summaries, 1)]

    def questions(self, table: Columns, source: str) -> Columns:
        n = len(next(iter(table.values())))
        kinds = [KINDS[self.dataset]] if self.dataset else list(KINDS.values())
        for document, summary in [(self.document, self.summary), *(kind.columns for kind in kinds)]:
            if document in table and summary is not None:
                return self.conversations("train", {**table, summary: ["a summary"] * n}, source)
        return self.conversations("train", table, source)  # which says what is lacking

    def _columns(self, table: Columns, source: str) -> tuple[tuple[str, str], str]:
        """Of document and summary, and what a decoder is asked."""
        if self.document is not None and self.summary is not None:
            names: tuple[str, str] = (self.document, self.summary)
            instruction = KINDS[self.dataset].instruction if self.dataset else "Summarize the text."
        else:
            known = (
                [KINDS[self.dataset]]
                if self.dataset
                else [kind for kind in KINDS.values() if set(kind.columns) <= set(table)]
            )
            if not known:
                forms = "; ".join(" and ".join(kind.columns) for kind in KINDS.values())
                raise DataError(
                    f"{source}: its columns {', '.join(table)} are in none of the forms known ({forms}); "
                    "name two of them in task.document and task.summary"
                )
            names, instruction = known[0].columns, known[0].instruction
        for key, name in zip(("document", "summary"), names):
            column(table, name, f"task.{key}={name!r}", source)
        return names, self.instruction or instruction

    @staticmethod
    def _turns(instruction: str, document: str, summary: str) -> list[Message]:
        return [{"role": "user", "content": instruction, "input": document}, {"role": "assistant", "content": summary}]

    # Long documents.

    def source_text(self, messages: Sequence[Message]) -> str:
        return self._prefix + messages[-2]["input"]

    def example_columns(self, row: Mapping[str, Any], tokenizer: Any, where: str) -> dict[str, Any]:
        return super().example_columns(self._shortened(row, tokenizer), tokenizer, where)

    def question_columns(self, row: Mapping[str, Any], tokenizer: Any, where: str) -> dict[str, Any]:
        return super().question_columns(self._shortened(row, tokenizer), tokenizer, where)

    def _shortened(self, row: Mapping[str, Any], tokenizer: Any) -> dict[str, Any]:
        text = self._text_tokenizer(tokenizer)
        *before, user, answer = row["messages"]
        user = {**user, "input": first_tokens(user["input"], self.max_source_length, text)}
        if self.max_target_length is not None and not self.is_encoder_decoder:
            answer = {**answer, "content": first_tokens(answer["content"], self.max_target_length, text)}
        return {**row, "messages": [*before, user, answer]}

    # Scores.

    def needs_generation(self, rows: Dataset) -> bool:
        return True

    def score(self, rows: Dataset, answers: list[list[str]]) -> tuple[dict[str, float], list[dict[str, Any]]]:
        each = rouge([samples[0] for samples in answers], rows["references"][:])
        scored = [{"row": i, "summary": samples[0], **one} for i, (samples, one) in enumerate(zip(answers, each))]
        return {name: mean_of(one[name] for one in each) for name in SCORES}, scored


def rouge(summaries: Sequence[str], references: Sequence[Sequence[str]]) -> list[dict[str, float]]:
    """F1 of each summary, for each kind of ROUGE the best over its references.

    Raises:
        ConfigError: without the rouge-score package.

    >>> one, = rouge(["the cat sat"], [["the cat sat down", "a dog"]])
    >>> round(one["rouge1"], 4)  # precision 3/3, recall 3/4
    0.8571
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise ConfigError("task.name", "summarize", NEEDS) from error
    scorer = RougeScorer(list(SCORES), use_stemmer=True)
    out = []
    for summary, own in zip(summaries, references, strict=True):
        best = scorer.score_multi([by_sentences(text) for text in own], by_sentences(summary))
        out.append({name: float(best[name].fmeasure) for name in SCORES})
    return out


def by_sentences(text: str) -> str:
    """One sentence a line; a text with line breaks stays as it is.

    >>> by_sentences("It rained. Nobody came!")
    'It rained.\\nNobody came!'
    """
    text = text.strip()
    return text if "\n" in text else re.sub(r"(?<=[.!?])\s+", "\n", text)


def first_tokens(text: str, n: int, tokenizer: Any) -> str:
    """The text up to the end of its n-th token."""
    if len(text) <= n:  # a token has at least one character
        return text
    if getattr(tokenizer, "is_fast", False):
        ends = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        return text if len(ends) <= n else text[: ends[n - 1][1]]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return text if len(ids) <= n else tokenizer.decode(ids[:n], skip_special_tokens=True)


def _joined(value: Any, number: int, source: str) -> str:
    """A document: a text, or a list of sentences."""
    value = loads(value) or value  # as pandas writes them into CSV
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        value = " ".join(value)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{source}: row {number} has no document")
    return value


def _references(value: Any, number: int, source: str, missing: frozenset[str]) -> list[str]:
    read = loads(value)  # several, as pandas writes them into CSV
    values = next((one for one in (value, read) if isinstance(one, list)), [value])
    if not all(text is None or isinstance(text, str) for text in values):
        raise DataError(f"{source}: row {number} has a summary that is no text")
    return [text for text in values if not is_missing(text, missing)]


def _together(
    documents: Sequence[str | None], references: Sequence[list[str]]
) -> tuple[list[str | None], list[list[str]]]:
    found: dict[str, list[str]] = {}
    for document, own in zip(documents, references):
        if document is not None:
            found.setdefault(document, []).extend(own)
    lacking = documents.count(None)  # each a row of its own, to be counted
    return [*found, *[None] * lacking], [*found.values(), *[[] for _ in range(lacking)]]
