"""Questions about images, for models that read images and write text (LLaVA and its kin).

Rows of ScienceQA (question, choices, answer, hint, image; Lu et al. 2022) ask for an option's letter; other
rows (question, answer; VQA's ten answers) for a word or two; NLVR's (sentence, label) for true or false; chats
(LLaVA-Instruct's ``<image>``, lists of parts) for whatever they say. `images.py` says how an image may be given.

Images stay encoded until a batch is made: the column ``pixel_values`` of prepared rows holds PNG or JPEG
data, which the collator turns into pixels. Only the processor of the model's own checkpoint touches them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ...errors import ConfigError, DataError, ModelError
from ..model_facts import forward_names
from .answering import Answering, check_choice, mean_of
from .cells import loads, whole
from .chats import NO_ANSWER, NO_PROMPT, Conversation, Reader
from .data import Columns, DataSpec, is_missing, text_of
from .encoding import Padder
from .forms import BESIDE, CHATS, CHOICES, FORMS, PAIRS
from .images import ENCODED, PICTURES, SHARED, image_of, pixels_of, read_images
from .messages import Message

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

NEEDS = "images need the package Pillow: pip install 'trimtab[vqa]'"
LETTERS = "ABCDEFGHIJ"
# LLaVA-1.5's own words (Liu et al. 2023, table 8).
OPTION_WORDS = "Answer with the option's letter from the given choices directly."
SHORT_WORDS = "Answer the question using a single word or phrase."
TRUE_WORDS = "Is this true of the image? Answer true or false."

LLAVA = (
    "{%- for m in messages -%}"
    "{%- if m.role == 'user' -%}{{ 'USER: ' }}{%- elif m.role == 'assistant' -%}{{ ' ASSISTANT: ' }}{%- endif -%}"
    "{%- for part in m.content -%}{{ 'IMAGE\n' if part.type == 'image' else part.text }}{%- endfor -%}"
    "{%- if m.role == 'assistant' -%}{{ eos_token }}{%- elif m.role == 'system' -%}{{ ' ' }}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ ' ASSISTANT:' }}{%- endif -%}"
)
"""LLaVA-1.5's prompt, for a processor without a template of its own; the image's token stands for IMAGE."""


@dataclass(kw_only=True)
class Vqa(Answering):
    """Visual question answering, scored by the share of right options or answers."""

    name: str = "vqa"
    images: str | dict[str, str] | None = None
    """Folder of image files, or a file with ``image_id`` and ``png_base64`` (by split, if there are several);
    without it, the file ``<rows>_images.<suffix>`` beside the rows."""
    text_rows: bool = False
    """Keep rows without an image (about half of ScienceQA)."""

    auto_class = "AutoModelForImageTextToText"
    tokenizer_class = "AutoProcessor"
    metric = "accuracy"
    greater_is_better = True
    decoding_defaults: ClassVar[Mapping[str, Any]] = {"max_new_tokens": 16}
    unasked: ClassVar[str] = "no image, or no question"
    """Why a row of a file that is to be predicted has no answer."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if find_spec("PIL") is None:
            raise ConfigError("task.name", self.name, NEEDS)
        if not str(self.template).endswith(".jinja"):
            check_choice("task.template", self.template, ("auto", "own", "*.jinja"))
        if self.images is not None and not isinstance(self.images, (str, dict)):
            raise ConfigError("task.images", self.images, "a path, or a path for each split")
        self._dtype: Any = None
        self._takes: set[str] | None = None
        self._files: dict[str, list[Path]] = {}
        self._made: set[str] | None = None
        self._type = 0
        """Token type of an answer."""

    @property
    def hub_sources(self) -> Mapping[str, tuple[str, str | None, str]]:
        return {split: ("derek-thomas/ScienceQA", None, split) for split in ("train", "validation", "test")}

    def adjust_to(self, config: Any) -> None:
        """One class for all; what an image token looks like comes from the processor.

        Raises:
            ConfigError: the model's encoder would read the answer that its decoder is to learn.
        """
        parts = (config, getattr(config, "text_config", None))
        if any(getattr(part, "is_encoder_decoder", False) for part in parts):
            raise ConfigError(
                "task.name", self.name, f"needs a decoder that reads images; {config.model_type} is an encoder-decoder"
            )

    def load_data(self, data: Mapping[str, Any] | None = None) -> DatasetDict:
        self._files = DataSpec.read(data, ("train", "validation", "test")).files
        return super().load_data(data)

    # Rows.

    def conversations(self, split: str, table: Columns, source: str) -> Columns:
        table, found, column = self._read(split, table, source, asking=False)
        images = found["image"]
        n = len(images)
        kept = [i for i in range(n) if images[i] is not None or self.text_rows]
        if not kept:
            raise DataError(
                f"{source}: no row has an image; give it in a column {', '.join((*ENCODED, *PICTURES))}, or {SHARED} "
                f"and task.images. It has {', '.join(table)}"
            )
        if len(kept) < n:
            self.notes.append(f"{split}: {n - len(kept)} of {n} rows have no image and were left out (task.text_rows)")
        if any(found["accepted"]):
            self.notes.append(f"{split}: of several answers the most frequent is learned; any is right, as in VQA")
        self.say_unread(split, table, {*self._reader.read, column or ""})
        return {name: [values[i] for i in kept] for name, values in found.items()}

    def questions(self, table: Columns, source: str) -> Columns:
        _, found, _ = self._read("test", table, source, asking=True)
        lacks = [image is None and not self.text_rows for image in found["image"]]
        return {**found, "messages": ["no image" if lack else m for lack, m in zip(lacks, found["messages"])]}

    def _read(self, split: str, table: Columns, source: str, asking: bool) -> tuple[Columns, Columns, str | None]:
        """The table with our names, conversations with what scoring needs, and the column of images."""
        self._reader = reader = Reader(missing=self.missing, asking=asking)
        table = reader.renamed(table, source, _KNOWN)
        place = self.images.get(split) if isinstance(self.images, dict) else self.images
        files = self._files.get(split, [])
        column, images = read_images(table, split, source, place, files)
        wheres = [f"{source}: row {i}" for i in range(1, len(images) + 1)]
        rows = _questions(table, reader, wheres)
        if rows is None:
            needs = 1 if asking else 2
            form = next((form for form, names in FORMS.items() if set(names[:needs]) <= set(table)), None)
            if form is None or form == "instances":
                raise DataError(
                    f"{source}: its columns {', '.join(table)} are in none of the forms known (question, choices and "
                    f"answer; question and answer or answers; sentence and label; {', '.join(CHATS)}; a prompt and "
                    "its answer)"
                )
            if form in CHATS:
                inside: list[Any]
                table[form], inside = zip(*map(_with_marks, table[form]))  # type: ignore[assignment]
                table[form] = list(table[form])
                if column is None and any(inside):
                    folders = list(dict.fromkeys(file.parent for file in files)) if place is None else [Path(place)]
                    images = [
                        image_of(values, [f.expanduser() for f in folders] or [Path()], where)
                        for values, where in zip(inside, wheres)
                    ]
            found = reader.conversations(table, source, form)
            rows = [_Row(conversation) for conversation in found]
        placed = [_placed(row.said, image is not None, w) for row, image, w in zip(rows, images, wheres)]
        return (
            table,
            {
                "messages": placed,
                "gold": [said[-1]["content"] if isinstance(said, list) else "" for said in placed],
                "options": [row.options for row in rows],
                "accepted": [row.accepted for row in rows],
                "image": images,
            },
            column,
        )

    def ask(self, spec: DataSpec) -> Any:
        self._files = spec.files
        return super().ask(spec)

    # Prompts.

    def meet(self, tokenizer: Any, model: Any) -> None:
        if not hasattr(tokenizer, "image_processor"):
            raise ModelError(
                f"model: {type(tokenizer).__name__} reads no images; task vqa needs a model with a "
                "processor (LLaVA and its kin)"
            )
        super().meet(tokenizer, model)
        self._takes = forward_names(model) if model is not None else None
        self._dtype = getattr(model, "dtype", None)

    def template_text(self, tokenizer: Any) -> str:
        image = getattr(tokenizer, "image_token", None)
        if image is None:
            raise ConfigError(
                "task.template",
                self.template,
                f"{type(tokenizer).__name__} has no chat template and no token for images; name a *.jinja file",
            )
        # BLIP-2's is no text: its processor puts the image's tokens before the text itself.
        return LLAVA.replace("IMAGE\n", f"{image}\n" if isinstance(image, str) else "")

    def shown(self, message: Message, template: str) -> dict[str, Any]:
        parts = [{"type": "image"}] if message.get("input") else []
        return {"role": message["role"], "content": [*parts, {"type": "text", "text": message["content"]}]}

    def example_columns(self, row: Mapping[str, Any], tokenizer: Any, where: str) -> dict[str, Any]:
        (done, _), *others = self.segments(row["messages"], tokenizer, where)  # the image is in the first question
        columns = self._processed(done, row["image"], tokenizer, where)
        labels = [-100] * len(columns["input_ids"])
        text = tokenizer.tokenizer
        known = text(done, add_special_tokens=False)["input_ids"]
        for piece, is_answer in others:
            done += piece
            together = text(done, add_special_tokens=False)["input_ids"]
            is_whole = together[: len(known)] == known
            new = together[len(known) :] if is_whole else text(piece, add_special_tokens=False)["input_ids"]
            known = known + new
            labels += new if is_answer else [-100] * len(new)
        new = known[len(known) - len(labels) + len(columns["input_ids"]) :]
        if (image := _image_id(tokenizer)) in new:
            raise DataError(f"{where}: its text holds {text.convert_ids_to_tokens(image)}, which stands for an image")
        fills = {"input_ids": new, "attention_mask": [1] * len(new), "token_type_ids": [self._type] * len(new)}
        for name, values in columns.items():
            blank = values[-1] if isinstance(values[-1], list) else 0  # the answer looks at what its question does
            columns[name] = values + fills.get(name, [blank] * len(new))
        return {**columns, "labels": labels, "pixel_values": row["image"]}

    def question_columns(self, row: Mapping[str, Any], tokenizer: Any, where: str) -> dict[str, Any]:
        text = self.question_text(row, tokenizer, where)
        return {**self._processed(text, row["image"], tokenizer, where), "pixel_values": row["image"]}

    def _processed(self, text: str, image: bytes | None, tokenizer: Any, where: str) -> dict[str, list[Any]]:
        """What the model takes for each token of the text, each image's token written out as often as it needs."""
        begins = tokenizer.tokenizer.bos_token
        pixels = None if image is None else pixels_of(image, where)
        try:
            out = tokenizer(
                text=[text],
                return_tensors="pt",
                add_special_tokens=not (begins and text.startswith(begins)),
                **({} if pixels is None else {"images": [pixels]}),
            )
        except (ValueError, TypeError, RuntimeError, IndexError) as error:
            told = " ".join(str(error).split())[:300]
            raise DataError(f"{where}: the model's processor refuses it: {told}") from error
        size = out["input_ids"].shape
        taken = {
            name: value
            for name, value in out.items()
            if hasattr(value, "shape") and (self._takes is None or name in self._takes)
        }
        # A processor that tells what is learned by token types gives the answer, which the prompt may not see, a 1.
        self._type = int("labels" in out and "token_type_ids" in out)
        columns = {
            name: value[0].tolist()
            for name, value in taken.items()
            if value.shape[:2] == size and name not in ("labels", *self._of_images(pixels, tokenizer))
        }
        left = set(taken) - set(columns) - {"labels"} - self._of_images(pixels, tokenizer)
        if left and self._takes is not None:
            raise ModelError(
                f"model: {type(tokenizer).__name__} makes {', '.join(sorted(left))}, which task vqa does not hand on; "
                "take a model that reads its question once, such as LLaVA or Qwen2-VL"
            )
        end = tokenizer.tokenizer.eos_token
        if columns["input_ids"][-1] == tokenizer.tokenizer.eos_token_id and not text.endswith(end):
            columns = {name: value[:-1] for name, value in columns.items()}  # some tokenizers end every text
        return columns

    def _of_images(self, pixels: Any, tokenizer: Any) -> set[str]:
        """Names of what the processor makes of images alone."""
        if self._made is None and pixels is not None:
            self._made = set(tokenizer.image_processor([pixels], return_tensors="pt"))
        return self._made or set()

    def collator(self, tokenizer: Any) -> Callable[..., dict[str, Any]]:
        takes, dtype = self._takes, self._dtype

        def pixels(images: list[bytes]) -> dict[str, Any]:
            if not images:
                return {}
            made = tokenizer.image_processor([pixels_of(image, "image") for image in images], return_tensors="pt")
            return {
                name: value.to(dtype) if dtype is not None and value.is_floating_point() else value
                for name, value in made.items()
                if takes is None or name in takes
            }

        return Padder(tokenizer.tokenizer.pad_token_id, pixels)

    # Scores.

    def needs_generation(self, rows: Dataset) -> bool:
        return True

    def score(self, rows: Dataset, answers: list[list[str]]) -> tuple[dict[str, float], list[dict[str, Any]]]:
        scored = []
        columns = (rows[name] for name in ("gold", "options", "accepted"))
        for i, (gold, options, accepted, samples) in enumerate(zip(*columns, answers)):
            given = [option_of(text, options) if options else short_answer(text) for text in samples]
            right = [
                one == gold if options else agreement(one, accepted) if accepted else one == short_answer(gold)
                for one in given
            ]
            scored.append({"row": i, "gold": gold, "given": given, "right": right})
        most = Counter(row["gold"] for row in scored).most_common(1)[0][1]
        return {
            "accuracy": mean_of(mean_of(row["right"]) for row in scored),
            "majority_accuracy": most / len(scored),
        }, scored


def option_of(text: str, options: Sequence[str]) -> str | None:
    """The letter of the option that a generated text chooses.

    A letter that begins the text, else the one that "the answer is", else that of the option whose words the
    text is.

    >>> [option_of(t, ["red", "blue"]) for t in ("B", "(A) red", "The answer is B.", "Blue.", "A cat", "C")]
    ['B', 'A', 'B', 'B', None, None]
    """
    text = text.strip()
    letters = LETTERS[: len(options)]
    # A lone capital before a small word is an article, not a choice.
    for pattern in (rf"\(?([{letters}])(?:\)|[.:,]|\s*$|\n)", rf".*?[Aa]nswer is:? \(?([{letters}])(?![A-Za-z])"):
        if found := re.match(pattern, text, re.DOTALL):
            return found[1]
    words = [short_answer(option) for option in options]
    return letters[words.index(short_answer(text))] if short_answer(text) in words else None


def short_answer(text: str) -> str:
    """A word or two without case, punctuation and articles, from the text's first line.

    >>> short_answer(" The Circle.\\nYes")
    'circle'
    """
    line = text.strip().split("\n")[0].lower()
    return " ".join(word for word in re.sub(r"[^\w\s]", " ", line).split() if word not in ("a", "an", "the"))


def agreement(given: str | None, accepted: Sequence[str]) -> float:
    """How far an answer agrees with those that people gave, in [0, 1].

    Of ten or more: 1 where three gave it, in the mean over leaving one of them out (VQA, Antol et al. 2015). Of fewer:
    1 where one did.

    >>> agreement("red", ["red"] * 2 + ["blue"] * 8), agreement("red", ["Red.", "blue"])
    (0.6, 1.0)
    """
    same = [short_answer(one) == given for one in accepted]
    if len(same) < 10:
        return float(any(same))
    return round(mean_of(min(1.0, (sum(same) - one) / 3) for one in same), 10)


@dataclass
class _Row:
    said: Conversation
    options: list[str] = field(default_factory=list)
    accepted: list[str] = field(default_factory=list)


MARK = "<image>"
"""Stands for the image in a text (LLaVA-Instruct)."""
_KNOWN = (*ENCODED, *PICTURES, SHARED, *CHATS, *BESIDE, *CHOICES, "question", "answer", "sentence", "label", "hint",
          *(name for pair in PAIRS.values() for name in pair[:2]))  # fmt: skip
_ANSWERS = ("answer", "multiple_choice_answer", "answers")


def _questions(table: Columns, reader: Reader, wheres: Sequence[str]) -> list[_Row] | None:
    """Questions with options, with short answers, or true of the image or not; None of rows of another form."""
    if {"sentence", "label"} <= set(table):
        asked, words = "sentence", TRUE_WORDS
    else:
        asked, words = "question", SHORT_WORDS
    held = next((name for name in CHOICES if any(_listed(v) is not None for v in table.get(name, ()))), None)
    answers = ["label"] if asked == "sentence" else [name for name in _ANSWERS if name in table]
    if asked not in table or (not answers and not reader.asking):
        return None
    reader.read |= {asked, *answers, *([held, "hint"] if held else [])}
    rows = []
    for i, where in enumerate(wheres):
        if is_missing(table[asked][i], reader.missing):
            rows.append(_Row(NO_PROMPT))
            continue
        text, said = text_of(table[asked][i], asked, where), "?"
        options: list[str] = []
        accepted: list[str] = []
        if held:
            choices = _listed(table[held][i])
            if choices is None or not 1 < len(choices) <= len(LETTERS):
                raise DataError(f"{where} has no list of 2 to {len(LETTERS)} choices")
            options = [str(choice) for choice in choices]
            hint = table["hint"][i] if "hint" in table else None
            listed = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, options)]
            text = "\n".join([*([hint] if hint else []), text, *listed, OPTION_WORDS])
        else:
            text = f"{text}\n{words}"
        if not reader.asking:
            value = next((v for name in answers if not is_missing(v := table[name][i], reader.missing)), None)
            if value is None or value == []:
                rows.append(_Row(NO_ANSWER))
                continue
            if asked == "sentence":
                said = _true_or_false(value, where)
            elif held:
                said = _letter(value, options, where)
            else:
                several = table["answers"][i] if "answers" in table else value
                if isinstance(several, list) and several:
                    accepted = [_answer(one, where) for one in several]
                    said = Counter(accepted).most_common(1)[0][0]
                if not isinstance(value, list):
                    said = text_of(value, "answer", where)
        turns = [{"role": "user", "content": text}, {"role": "assistant", "content": said}]
        rows.append(_Row(turns, options, accepted))
    return rows


def _listed(value: Any) -> list[Any] | None:
    found = loads(value) if isinstance(value, str) else value
    return found if isinstance(found, list) else None


def _letter(value: Any, options: Sequence[str], where: str) -> str:
    """The letter of the right option, which a row gives by its place, its letter or its words."""
    if isinstance(value, int) and not isinstance(value, bool) and value in range(len(options)):
        return LETTERS[value]
    if isinstance(value, str) and options.count(value) == 1:
        return LETTERS[options.index(value)]
    if isinstance(value, str) and len(value) == 1 and value in LETTERS[: len(options)]:
        return value
    if (place := whole(value)) is not None and 0 <= place < len(options):  # as CSV has it
        return LETTERS[place]
    raise DataError(
        f"{where} has answer {value!r}, not the number of one of its choices, from 0, nor its letter or words"
    )


def _answer(value: Any, where: str) -> str:
    """One of several answers; VQA's are objects."""
    return text_of(value.get("answer") if isinstance(value, Mapping) else value, "answers", where)


def _true_or_false(label: Any, where: str) -> str:
    known = {0: "false", 1: "true", "0": "false", "1": "true", "false": "false", "true": "true"}
    key = label.lower() if isinstance(label, str) else label
    if key not in known:
        raise DataError(f"{where} has label {label!r}, not 0, 1, true or false")
    return known[key]


def _with_marks(turns: Any) -> tuple[Any, list[Any]]:
    """A chat with a mark for each image among the parts of its messages, and what those parts hold."""
    held: list[Any] = []

    def of_part(part: Any) -> Any:
        if not isinstance(part, Mapping) or "image" not in str(part.get("type", "image" if "image" in part else "")):
            return part
        value = next((part[key] for key in ("image", "image_url", "path", "url", "base64") if part.get(key)), None)
        held.extend([] if value is None else [value])
        return {"type": "text", "text": MARK}

    def of_turn(turn: Any) -> Any:
        if not isinstance(turn, Mapping):
            return turn
        return {k: [of_part(part) for part in v] if isinstance(v, list) else v for k, v in turn.items()}

    read = loads(turns) if isinstance(turns, str) else turns
    return ([of_turn(turn) for turn in read], held) if isinstance(read, list) else (turns, held)


def _placed(said: Conversation, has_image: bool, where: str) -> Conversation:
    """The conversation with its image, if it has one, at the first question, before the words, as LLaVA puts it.

    A message's `input` only says that the image is there.
    """
    if not isinstance(said, list):
        return said
    first = next((i for i, m in enumerate(said) if m["role"] == "user"), None)
    marks = [(i, m["content"].count(MARK)) for i, m in enumerate(said)]
    n = sum(count for _, count in marks)
    if n > has_image:
        raise DataError(f"{where} has {n} {MARK} in its text, and {'one image' if has_image else 'no image'}")
    if first is None or any(count for i, count in marks if i != first):
        raise DataError(f"{where} has {MARK} elsewhere than in the first question, where its image is read")
    out = []
    for i, message in enumerate(said):
        about = message.get("input")
        content = "\n\n".join(text for text in (message["content"], about) if text)
        content = content.replace(MARK, "").strip() if n and i == first else content
        out.append({**message, "content": content, "input": "image" if has_image and i == first else ""})
    return out


def _image_id(tokenizer: Any) -> int | None:
    """Id of the token that stands for an image; None where the processor does not say."""
    token = getattr(tokenizer, "image_token", None)
    return None if token is None else tokenizer.tokenizer.convert_tokens_to_ids(str(token))
