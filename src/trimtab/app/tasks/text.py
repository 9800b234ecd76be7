"""Plain text, learned whole: going on with the training of a language model.

Rows have a column of text, or are the lines, paragraphs or the whole of ``.txt`` files. Texts are put one after the
other, each with its end token, and cut into rows of ``max_length`` tokens, so that nothing is padded and nothing lost;
with ``pack: false`` each text is a row of its own, cut to that length.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

from ...errors import ConfigError, DataError
from .answering import Answering, check_choice
from .chats import NO_TEXT
from .data import Columns, column, is_missing, text_of

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

PARTS = ("line", "paragraph", "document")
_USUAL_LENGTH = 1024
"""Tokens of a row where neither the recipe nor the model says fewer."""


@dataclass(kw_only=True)
class PlainText(Answering):
    """The loss on every token."""

    name: str = "text"
    text: str = "text"
    """Column of the text."""
    pack: bool = True
    """Texts stand one after the other in rows of full length; else each is a row."""
    sample_by: str = "line"
    """What makes a text of a ``.txt`` file: a line, a paragraph (between empty lines), or the document."""

    metric = "perplexity"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("task.sample_by", self.sample_by, PARTS)
        if not isinstance(self.text, str) or not self.text:
            raise ConfigError("task.text", self.text, "the name of a column")
        if not isinstance(self.pack, bool):
            raise ConfigError("task.pack", self.pack, "true or false")
        for key, usual in (("template", "auto"), ("system", None)):
            if (value := getattr(self, key)) != usual:
                raise ConfigError(f"task.{key}", value, "plain text has no prompts; task instruct has")

    @property
    def reads_lines(self) -> str | None:
        return self.sample_by

    @property
    def counts_rows(self) -> bool:
        """Whether there are as many rows to train on as in the file."""
        return not self.pack

    def adjust_to(self, config: Any) -> None:
        super().adjust_to(config)
        if self.is_encoder_decoder:
            raise ConfigError("task.name", self.name, f"needs a decoder; {config.model_type} is an encoder-decoder")

    def conversations(self, split: str, table: Columns, source: str) -> Columns:
        values = column(table, self.text, f"task.text={self.text!r}", source)
        return {
            "messages": [
                NO_TEXT
                if is_missing(value, self.missing)
                else [{"role": "assistant", "content": text_of(value, self.text, f"{source}: row {i}")}]
                for i, value in enumerate(values, 1)
            ]
        }

    def questions(self, table: Columns, source: str) -> Columns:
        found = self.conversations("test", table, source)["messages"]
        return {"messages": [turns if isinstance(turns, str) else [*turns, *turns] for turns in found]}

    def question_text(self, row: Any, tokenizer: Any, where: str) -> str:
        text = self._text_tokenizer(tokenizer)
        begins = text.bos_token if text.bos_token and text("a")["input_ids"][:1] == [text.bos_token_id] else ""
        return begins + row["messages"][0]["content"]

    def lead(self, messages: Any, tokenizer: Any, where: str = "row") -> str:
        return ""

    # Rows.

    def set_template(self, tokenizer: Any) -> None:
        """Plain text needs none."""

    def ends(self, tokenizer: Any, model: Any = None) -> tuple[int, ...]:
        end = self._text_tokenizer(tokenizer).eos_token_id
        return () if end is None else (end,)

    def prepare(self, rows: DatasetDict, tokenizer: Any, model: Any = None) -> DatasetDict:
        from datasets import Dataset, DatasetDict

        self.meet(tokenizer, model)
        self._ends = self.ends(tokenizer, model)
        most = self.length_limit(tokenizer, model) or _USUAL_LENGTH
        limit = self.max_length or min(most, _USUAL_LENGTH)
        ready = {}
        for split, part in rows.items():
            ids = [self._ids_of(turns[0]["content"], tokenizer) for turns in part["messages"][:]]
            if self.pack:
                whole = list(chain.from_iterable(ids))
                cut = [whole[i : i + limit] for i in range(0, len(whole), limit)]
                cut = cut[:-1] if len(cut) > 1 and len(cut[-1]) < 2 else cut  # one token alone has nothing to predict
                self.notes.append(f"{split}: {len(ids)} texts, {len(whole)} tokens in {len(cut)} rows of {limit}")
            else:
                cut = [row[:limit] for row in ids]
                if n := sum(len(row) > limit for row in ids):
                    self.notes.append(f"{split}: {n} of {len(ids)} rows cut to {limit} tokens (task.max_length)")
            if max(map(len, cut)) < 2:
                raise DataError(f"data.{split}: no text has two tokens or more")
            self.places[split] = [] if self.pack else list(range(len(cut)))
            ready[split] = Dataset.from_dict(
                {"input_ids": cut, "attention_mask": [[1] * len(row) for row in cut], "labels": cut}
            )
        return DatasetDict(ready)

    def _ids_of(self, text: str, tokenizer: Any) -> list[int]:
        ids: list[int] = self._text_tokenizer(tokenizer)(text)["input_ids"]
        return ids if not self._ends or ids[-1:] == [self._ends[0]] else [*ids, self._ends[0]]

    def selection_rows(self, ready: DatasetDict) -> Dataset:
        return ready["train"].remove_columns("labels")
