"""What every task with a written answer shares: conversations, prompts, labels on the answer, its loss.

A row is a conversation, as `chats.py` makes them: messages with the roles ``system``, ``user``, ``assistant`` and
``tool``. Decoders read it through the tokenizer's chat template (one is put there where it has none, so
that it is saved with the adapter) and learn what the assistant says; encoder-decoders read the user's words
and learn the answer.

`instruct.py`, `math.py`, `code.py`, `summarize.py` and `vqa.py` say which columns make a conversation, and
how a generated answer is scored.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from ...errors import ConfigError, DataError, did_you_mean
from ..report.words import some
from ..runfolder import is_main
from .answer_loss import answer_scores, answer_sums, kept_sums
from .chats import NO_ANSWER
from .columns import Table
from .data import MISSING, NO_VALIDATION, Columns, DataSpec, column, duplicates, is_missing
from .encoding import TEMPLATES, Encoding, Padder, ids_of
from .files import from_dataset
from .generation import Decoding, MakeBar, Question, generate, text_of
from .messages import Message

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

SPLITS = ("train", "validation", "test")

HUB_ROWS = {
    "tatsu-lab/alpaca": 52002 - 500,  # 500 are held out
    "meta-math/MetaMathQA": 395000,
    "openai/gsm8k": 7473,
    "m-a-p/CodeFeedback-Filtered-Instruction": 156526,
    "EdinburghNLP/xsum": 204045,
    "abisee/cnn_dailymail": 287113,
    "allenai/scitldr": 1992,
    "knkarthick/dialogsum": 12460,
    "derek-thomas/ScienceQA": 6218,  # those with an image, of 12726
}
"""Training rows of what is fetched where no files are given, for plans without data."""

_STRATA = "data.stratify"
"""Column that a split is stratified by, until it is split."""
_BLANK: Message = {"input": "", "tool_calls": "", "tools": "", "name": "", "tool_call_id": "", "train": True}


@dataclass(kw_only=True)
class Answering(Encoding):
    """Base of the tasks in which a model writes an answer. A subclass provides `conversations`."""

    name: str
    max_length: int | None = None
    """Tokens of prompt and answer together; without it, what the model can take."""
    max_target_length: int | None = None
    """Tokens of the answer of an encoder-decoder."""
    template: str = "auto"
    """``own``: the tokenizer's chat template; ``alpaca``; ``plain``; a ``*.jinja`` file; ``auto``: the
    tokenizer's own where it has one, else alpaca (plain for prompt and completion rows)."""
    system: str | None = None
    """A system message for rows that have none."""
    generation: dict[str, Any] = field(default_factory=dict)
    """``max_new_tokens``, ``batch_size``, ``samples``, ``seed``, ``stop``, and fields of transformers'
    `GenerationConfig`."""
    generations: str | None = None
    """Folder that keeps generated answers, so that an interrupted evaluation goes on where it stopped."""
    notes: list[str] = field(default_factory=list, init=False)
    places: dict[str, list[int]] = field(default_factory=dict, init=False)
    """Of a split's prepared rows among its raw ones."""

    auto_class = "AutoModelForCausalLM"
    task_type = "CAUSAL_LM"
    metric = "answer_loss"
    greater_is_better = False
    training_metric = "answer_loss"
    """What `compute_metrics` can tell while training; lower is better."""

    def __post_init__(self) -> None:
        for key in ("max_length", "max_target_length"):
            value = getattr(self, key)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 2):
                raise ConfigError(f"task.{key}", value, "a whole number of tokens, at least 2")
        for key in ("system", "generations"):
            value = getattr(self, key)
            if value is not None and not (isinstance(value, str) and value):
                raise ConfigError(f"task.{key}", value, "a text, or leave it out")
        if not str(self.template).endswith(".jinja"):
            check_choice("task.template", self.template, ("auto", "own", *TEMPLATES, "*.jinja"))
        self.decoding = Decoding.read(self.generation, **self.decoding_defaults)
        self.is_encoder_decoder = False
        self._special: tuple[Any, tuple[str, ...]] | None = None
        self._answer_room: int | None = None
        self.missing = frozenset(MISSING)
        self.train_rows = self._rows_on_the_hub()

    def _rows_on_the_hub(self) -> int | None:
        """Training rows of the hub's dataset, for plans without data; what is refused later is unknown here."""
        try:
            return HUB_ROWS.get(self.hub_sources["train"][0])
        except KeyError:
            return None

    # What a subclass says.

    @property
    def reads_lines(self) -> str | None:
        """What makes a text of a ``.txt`` file, for tasks that read such."""
        return None

    decoding_defaults: ClassVar[Mapping[str, Any]] = {"max_new_tokens": 256}

    @property
    def hub_sources(self) -> Mapping[str, tuple[str, str | None, str]]:
        """Split -> (repository, configuration, split) on the hub."""
        return {}

    def conversations(self, split: str, table: Columns, source: str) -> Columns:
        """From a file's columns to ``messages`` (the answer last) and what scoring needs.

        Rows whose ``messages`` is None, or a text that says what they lack, are left out, with a note.
        """
        raise NotImplementedError

    def gathered(self, split: str, table: Table, source: str) -> Table:
        """The file's rows, those that are scored as one put together; before some are chosen (``data.max_samples``)."""
        return table

    def needs_generation(self, rows: Dataset) -> bool:
        """Whether `score` has anything to say about these rows."""
        return False

    def decoding_for(self, rows: Dataset) -> Decoding:
        """How these rows' answers are decoded: as set, unless the rows ask for more."""
        return self.decoding

    def score(self, rows: Dataset, answers: list[list[str]]) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Scores by name, and for each row what it was given."""
        return {}, []

    def say_unread(self, split: str, table: Columns, read: Iterable[str], others: Iterable[str] = ()) -> None:
        """Notes the columns that hold something and are left alone."""
        left = [
            name for name, values in table.items()
            if name not in {*read, *self.read_beside} and not all(is_missing(value, self.missing) for value in values)
        ]  # fmt: skip
        if split == "train" and (names := [*left, *others]):
            self.notes.append(f"{split}: not read: {some(names)}")

    read_beside: ClassVar[tuple[str, ...]] = ()
    """Columns that are read for scoring."""

    # The task's interface.

    def adjust_to(self, config: Any) -> None:
        """An encoder-decoder is another class of model, and reads its prompt apart from its answer."""
        from ..model_facts import reads_only

        self.is_encoder_decoder = bool(getattr(config, "is_encoder_decoder", False))
        if not self.is_encoder_decoder and reads_only(config):
            raise ConfigError(
                "task.name",
                self.name,
                f"needs a model that writes; {config.model_type} is an encoder, which reads "
                "(for text_classification): name a decoder or an encoder-decoder",
            )
        if self.is_encoder_decoder:
            self.auto_class, self.task_type = "AutoModelForSeq2SeqLM", "SEQ_2_SEQ_LM"
        else:
            self.auto_class, self.task_type = type(self).auto_class, type(self).task_type

    def load_data(self, data: Mapping[str, Any] | None = None) -> DatasetDict:
        from datasets import Dataset, DatasetDict

        spec = DataSpec.read(data, SPLITS, self.reads_lines)
        self.notes.clear()
        self.missing = spec.missing
        if not spec.is_given and not self.hub_sources:
            raise ConfigError("data.train", None, "give a file with training rows (JSONL, CSV or Parquet)")
        rows: dict[str, Dataset] = {}
        for split, source, table in spec.tables() if spec.is_given else self._hub_tables():
            self.notes += [f"{split}: {note}" for note in table.notes]
            table = _kept(self.gathered(split, table, source), spec, split, self.notes)
            made = self.conversations(split, table, source)
            if split == "train" and isinstance(spec.stratify, str):
                strata = column(table, spec.stratify, f"data.stratify={spec.stratify!r}", source)
                if len(strata) == len(made["messages"]):
                    made[_STRATA] = [str(value) for value in strata]
            rows[split] = Dataset.from_dict(self._with_messages(split, made, source))
        found = self._with_held_out(rows, spec)
        self.notes += duplicates({split: _what_tells_apart(part) for split, part in found.items()})
        return DatasetDict(found)

    def prepare(self, rows: DatasetDict, tokenizer: Any, model: Any = None) -> DatasetDict:
        from datasets import DatasetDict

        self.meet(tokenizer, model)
        self._ends = self.ends(tokenizer, model)
        limit = self.length_limit(tokenizer, model)
        for split in self.eval_splits(rows):
            if self.needs_generation(rows[split]):
                self._room(tokenizer, model)  # now, not after hours of training
                text = self._text_tokenizer(tokenizer)
                self.decoding_for(rows[split]).try_out(self._ends, text.pad_token_id, len(text))
        ready = {}
        for split, part in rows.items():
            cut = part.map(
                self._encoder(split, tokenizer, limit),
                with_indices=True,
                remove_columns=part.column_names,
                keep_in_memory=True,
                desc=f"Tokenising {split}",
            )
            kept = np.flatnonzero(np.asarray(cut["has_answer"][:]))
            if not len(kept):
                raise DataError(f"data.{split}: no row's answer begins within task.max_length={limit}")
            if len(kept) < len(cut):
                self.notes.append(
                    f"{split}: {len(cut) - len(kept)} of {len(cut)} rows left out: the prompt alone has "
                    f"{limit} tokens or more (task.max_length)"
                )
                cut = cut.select(kept)
            if n := sum(cut["was_cut"][:]):
                self.notes.append(f"{split}: {n} of {len(cut)} rows cut to {limit} tokens (task.max_length)")
            if n := sum(cut["answer_was_cut"][:]):
                room = f"{self._answer_room} tokens, the positions that the decoder has"
                self.notes.append(f"{split}: {n} of {len(cut)} answers cut to {room}")
            self.places[split] = kept.tolist()
            ready[split] = cut.remove_columns(["has_answer", "was_cut", "answer_was_cut"])
        return DatasetDict(ready)

    def ask(self, spec: DataSpec) -> tuple[int, Dataset, list[int]]:
        """Rows to be answered, with an answer or not: how many there are, those that ask, and their places."""
        from datasets import Dataset

        self.missing = spec.missing
        _, source, raw = next(spec.tables())
        table = self.questions(raw, source)
        found = table["messages"]
        places = [i for i, turns in enumerate(found) if isinstance(turns, list)]
        if not places:
            raise DataError(f"{source}: no row has a prompt")
        kept = {name: [values[i] for i in places] for name, values in table.items()}
        kept["messages"] = [self._complete(turns) for turns in kept["messages"]]
        return len(found), Dataset.from_dict(kept), places

    def questions(self, table: Columns, source: str) -> Columns:
        """As `conversations`, of rows that need not have an answer; a message stands in for it."""
        raise DataError(f"task {self.name!r}: has no predictions of a file yet")

    def selection_rows(self, ready: DatasetDict) -> Dataset:
        """Without the end token, so that the last token is the answer's own, not the same in every row."""
        train = ready["train"]
        if self.is_encoder_decoder:
            return train  # the decoder reads the labels
        ends = self._ends

        def shorten(row: dict[str, Any]) -> dict[str, Any]:
            n = len(row["input_ids"])
            while n > 1 and row["input_ids"][n - 1] in ends:
                n -= 1
            return {key: value[:n] if isinstance(value, list) else value for key, value in row.items()}

        return train.remove_columns("labels").map(shorten, keep_in_memory=True)

    def collator(self, tokenizer: Any) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        return Padder(self._text_tokenizer(tokenizer).pad_token_id)

    def eval_splits(self, ready: DatasetDict) -> list[str]:
        return [split for split in ("test", "validation") if split in ready]

    def preprocess_logits_for_metrics(self, logits: Any, labels: Any) -> Any:
        logits = logits[0] if isinstance(logits, (tuple, list)) else logits
        return answer_sums(logits, labels, shifted=not self.is_encoder_decoder)

    def compute_metrics(self, eval_pred: Any) -> dict[str, float]:
        return answer_scores(kept_sums(eval_pred))

    def row_scores(self, eval_pred: Any) -> dict[str, Any]:
        loss, tokens, right = kept_sums(eval_pred).T.tolist()
        return {"answer_loss": loss, "tokens": tokens, "right": right}

    def evaluate(
        self,
        model: Any,
        tokenizer: Any,
        rows: DatasetDict,
        split: str,
        *,
        folder: str | Path | None = None,
        make_bar: MakeBar | None = None,
    ) -> dict[str, float]:
        """Scores of generated answers.

        Args:
            folder: where answers and what each was given are written (``<split>_answers.jsonl``,
                ``<split>_scored.jsonl``); `generations` if not given, and nothing without either.
            make_bar: shows progress; a bar of our own on a terminal if not given.
        """
        part = rows[split]
        if not self.needs_generation(part):
            return {}
        place = folder or self.generations
        file = Path(place).expanduser() / f"{split}_answers.jsonl" if place else None
        scores, scored = self.score(part, self.answers(model, tokenizer, part, split, file=file, make_bar=make_bar))
        if file is not None and is_main():
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in scored)
            file.with_name(f"{split}_scored.jsonl").write_text(text, encoding="utf-8", newline="\n")
        return scores

    def answers(
        self,
        model: Any,
        tokenizer: Any,
        rows: Dataset,
        split: str,
        *,
        file: Path | None = None,
        make_bar: MakeBar | None = None,
    ) -> list[list[str]]:
        """What the model answers to each row, `generation.samples` times."""
        self.meet(tokenizer, model)
        room = self._room(tokenizer, model)
        questions, cut = [], 0
        for i, row in enumerate(rows):
            columns = self.question_columns(row, tokenizer, f"{split} row {i + 1}")
            ids = columns["input_ids"]
            if room is not None and len(ids) > room:
                if "pixel_values" in columns:
                    raise DataError(
                        f"{split} row {i + 1}: its prompt has {len(ids)} tokens with the image's; at most "
                        f"{room} leave room for task.generation.max_new_tokens"
                    )
                cut += 1
                if self.is_encoder_decoder:  # as in training
                    columns = self.cut_source(columns, room)
                else:  # the end of a prompt says what is asked
                    columns = {k: value[-room:] if _is_per_token(value, ids) else value for k, value in columns.items()}
            questions.append(Question(f"{split}/{i}", columns))
        if cut:
            where = "" if self.is_encoder_decoder else "on the left "
            self.notes.append(f"{split}: {cut} of {len(rows)} prompts cut {where}to {room} tokens")
        side = "right" if self.is_encoder_decoder else "left"
        collate = self.collator(tokenizer)
        written = generate(
            model,
            tokenizer,
            questions,
            self.decoding_for(rows),
            lambda batch: collate(batch, side=side),  # type: ignore[call-arg]
            ends=self.ends(tokenizer, model),
            file=file,
            make_bar=make_bar,
        )
        leads = [self._lead_as_written(row, tokenizer, f"{split} row {i + 1}") for i, row in enumerate(rows)]
        return [[text.removeprefix(lead) for text in samples] for lead, samples in zip(leads, written)]

    def _lead_as_written(self, row: Mapping[str, Any], tokenizer: Any, where: str) -> str:
        """What a generated answer begins with that is none of its words."""
        if self.is_encoder_decoder:
            return ""
        text, lead = self._text_tokenizer(tokenizer), self.lead(row["messages"], tokenizer, where)
        return text_of(ids_of(text, lead), text) if lead else ""

    # Rows.

    def _hub_tables(self) -> Iterator[tuple[str, str, Table]]:
        """The task's own rows from the hub, by split, where the recipe names none."""
        from datasets import load_dataset

        for split, (repository, configuration, name) in self.hub_sources.items():
            try:
                part = load_dataset(repository, configuration, split=name)
            except (OSError, ValueError) as error:
                raise DataError(
                    f"task.name={self.name!r}: {repository} cannot be fetched from the hub "
                    f"({str(error).splitlines()[0]}); give local files: data.train and data.validation"
                ) from error
            yield split, f"{split} from {repository}", from_dataset(part)

    def _with_messages(self, split: str, table: Columns, source: str) -> Columns:
        """Without the rows that have no answer, and with the system message where one is set."""
        messages = table["messages"]
        keep = [i for i, conversation in enumerate(messages) if isinstance(conversation, list) and conversation]
        lacks = Counter(m if isinstance(m, str) else NO_ANSWER for m in messages if not isinstance(m, list) or not m)
        if not keep:
            needed = " and ".join(lack.replace("no a", "an a").replace("no ", "a ") for lack in lacks)
            raise DataError(f"{source}: no row has {needed}")
        for lack, n in lacks.items():
            self.notes.append(f"{split}: {n} of {len(messages)} rows have {lack} and were left out")
        table = {name: [values[i] for i in keep] for name, values in table.items()}
        table["messages"] = [self._complete(conversation) for conversation in table["messages"]]
        return table

    def _complete(self, conversation: list[Message]) -> list[Message]:
        """All messages with the same keys, as a dataset needs them."""
        first, *others = conversation
        if self.system and first["role"] != "system":
            tools = {"tools": first.get("tools", "")}
            conversation = [{"role": "system", "content": self.system, **tools}, {**first, "tools": ""}, *others]
        return [{**_BLANK, **{key: value for key, value in m.items() if value is not None}} for m in conversation]

    def _with_held_out(self, rows: dict[str, Dataset], spec: DataSpec) -> dict[str, Dataset]:
        """A tenth of the training rows, at most 500, for validation where no other split can be scored.

        They depend on the rows alone, not on the run's seed.
        """
        if "train" not in rows or "validation" in rows or "test" in rows:
            spec.refuse_split_settings()
            return rows
        if spec.stratify is True:
            raise ConfigError("data.stratify", True, "there are no classes here; name a column")
        train = rows["train"]
        n = len(train)
        strata = None
        if _STRATA in train.column_names:
            strata, train = train[_STRATA][:], train.remove_columns(_STRATA)
        held = spec.held_out(n, strata, most=500)
        self.notes.append(f"{NO_VALIDATION} {len(held)} of {n} training rows were split off for it")
        return {**rows, "train": train.select(sorted(set(range(n)) - set(held))), "validation": train.select(held)}


def _what_tells_apart(rows: Dataset) -> list[Any]:
    """Each row's words, and its image if it has one."""
    images = rows["image"][:] if "image" in rows.column_names else [None] * len(rows)
    said = [tuple((m["content"], m["input"]) for m in turns) for turns in rows["messages"][:]]
    return [(words, hash(image)) for words, image in zip(said, images)]


def _is_per_token(value: Any, ids: Sequence[int]) -> bool:
    return isinstance(value, list) and len(value) == len(ids)


def _kept(table: Table, spec: DataSpec, split: str, notes: list[str]) -> Table:
    n = len(next(iter(table.values())))
    kept = spec.kept(split, n)
    if kept is None:
        return table
    how = "first" if spec.sample_seed == "first" else "drawn"
    notes.append(f"{split}: {len(kept)} of {n} rows kept, {how} (data.max_samples)")
    return table.rows(kept)


def check_choice(key: str, value: Any, known: Iterable[str]) -> None:
    """Raises `ConfigError` for a value that is none of those known, naming the nearest."""
    known = list(known)
    if value not in known:
        raise ConfigError(key, value, f"not known.{did_you_mean(str(value), known)} There is {', '.join(known)}")


def mean_of(values: Iterable[float]) -> float:
    """The arithmetic mean; NaN of nothing."""
    values = list(values)
    return sum(values) / len(values) if values else math.nan
