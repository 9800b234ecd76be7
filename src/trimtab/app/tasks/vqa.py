"""Questions about images, for models that read images and write text (LLaVA and its kin).

Rows of ScienceQA (question, choices, answer, hint, image; Lu et al. 2022) ask for an option's letter; other
rows (question, answer) for a word or two; NLVR's (sentence, label) for true or false. An image is PNG or JPEG
data in the row (``png_base64``, or the hub's ``image``), a file (``image``), or shared by several rows
(``image_id``), and then in a file of its own beside the rows (``train.jsonl``, ``train_images.jsonl``).

Images stay encoded until a batch is made: the column ``pixel_values`` of prepared rows holds PNG or JPEG
data, which the collator turns into pixels. Only the processor of the model's own checkpoint touches them.
"""

from __future__ import annotations

import base64
import binascii
import io
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ...errors import ConfigError, DataError, ModelError
from ..model_facts import forward_names
from .answering import Answering, check_choice, mean_of
from .chats import Message
from .data import Columns, DataSpec, column, existing_file, read_file, texts
from .encoding import Padder

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

    @property
    def hub_sources(self) -> Mapping[str, tuple[str, str | None, str]]:
        return {split: ("derek-thomas/ScienceQA", None, split) for split in ("train", "validation", "test")}

    def adjust_to(self, config: Any) -> None:
        """One class for all; what an image token looks like comes from the processor."""

    def load_data(self, data: Mapping[str, Any] | None = None) -> DatasetDict:
        self._files = DataSpec.read(data, ("train", "validation", "test")).files
        return super().load_data(data)

    # Rows.

    def conversations(self, split: str, table: Columns, source: str) -> Columns:
        if {"question", "choices", "answer"} <= set(table):
            asked, answers, options = _options(table, source)
        elif {"sentence", "label"} <= set(table):
            asked, answers, options = _true_or_false(table, source)
        elif {"question", "answer"} <= set(table):
            asked = [f"{text}\n{SHORT_WORDS}" for text in texts(table["question"], "question", source)]
            answers, options = texts(table["answer"], "answer", source), [[] for _ in asked]
        else:
            raise DataError(
                f"{source}: its columns {', '.join(table)} are in none of the forms known (question, "
                "choices and answer; question and answer; sentence and label)"
            )
        images = self._images(split, table, source)
        n = len(asked)
        kept = [i for i in range(n) if images[i] is not None or self.text_rows]
        if not kept:
            raise DataError(f"{source}: no row has an image; give it in png_base64, image, or image_id and task.images")
        if len(kept) < n:
            self.notes.append(f"{split}: {n - len(kept)} of {n} rows have no image and were left out (task.text_rows)")
        # A message's `input` only says that there is an image.
        return {
            "messages": [
                [
                    {"role": "user", "content": asked[i], "input": "image" if images[i] is not None else ""},
                    {"role": "assistant", "content": answers[i]},
                ]
                for i in kept
            ],
            "gold": [answers[i] for i in kept],
            "options": [options[i] for i in kept],
            "image": [images[i] for i in kept],
        }

    def _images(self, split: str, table: Columns, source: str) -> list[bytes | None]:
        """Each row's image as PNG or JPEG data."""
        n = len(next(iter(table.values())))
        for name in ("png_base64", "image_base64"):
            if name in table:
                return [
                    None if value is None else _decoded(value, f"{source}: row {i}")
                    for i, value in enumerate(table[name], 1)
                ]
        place = self.images.get(split) if isinstance(self.images, dict) else self.images
        if "image_id" in table:
            shared = self._shared(split, place, source)
            missing = next(
                (i for i, key in enumerate(table["image_id"]) if key is not None and str(key) not in shared), None
            )
            if missing is not None:
                raise DataError(
                    f"{source}: row {missing + 1} names image {table['image_id'][missing]!r}, which the "
                    "file of images does not have"
                )
            return [None if key is None else shared[str(key)] for key in table["image_id"]]
        if "image" not in table:
            return [None] * n
        folder = Path(place).expanduser() if place else self._files[split][0].parent if split in self._files else Path()
        return [_image(value, folder, f"{source}: row {i}") for i, value in enumerate(table["image"], 1)]

    def _shared(self, split: str, place: str | None, source: str) -> dict[str, bytes]:
        """Images by their id."""
        if place is None:
            if split not in self._files:
                raise DataError(f"{source}: has image_id; name the file of images in task.images")
            rows = self._files[split][0]
            place = str(rows.with_name(f"{rows.stem}_images{rows.suffix}"))
        file = existing_file("task.images", place)
        where = f"task.images={str(place)!r}"
        table = read_file("task.images", file)
        keys, values = (column(table, name, where, where) for name in ("image_id", "png_base64"))
        return {str(key): _decoded(value, f"{where}: row {i}") for i, (key, value) in enumerate(zip(keys, values), 1)}

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
        return LLAVA.replace("IMAGE", tokenizer.image_token)

    def shown(self, message: Message, template: str) -> dict[str, Any]:
        parts = [{"type": "image"}] if message.get("input") else []
        return {"role": message["role"], "content": [*parts, {"type": "text", "text": message["content"]}]}

    def example_columns(self, row: Mapping[str, Any], tokenizer: Any, where: str) -> dict[str, Any]:
        *_, (prompt, _), (answer, _) = self.segments(row["messages"], tokenizer, where)
        columns = self._processed(prompt, row["image"], tokenizer, where)
        text = tokenizer.tokenizer
        asked, both = (text(part, add_special_tokens=False)["input_ids"] for part in (prompt, prompt + answer))
        new = both[len(asked) :] if both[: len(asked)] == asked else text(answer, add_special_tokens=False)["input_ids"]
        n = len(columns["input_ids"])
        fill = {"input_ids": new, "attention_mask": [1] * len(new)}
        columns = {name: value + fill.get(name, [0] * len(new)) for name, value in columns.items()}
        return {**columns, "labels": [-100] * n + new, "pixel_values": row["image"]}

    def question_columns(self, row: Mapping[str, Any], tokenizer: Any, where: str) -> dict[str, Any]:
        text = self.question_text(row, tokenizer, where)
        return {**self._processed(text, row["image"], tokenizer, where), "pixel_values": row["image"]}

    def _processed(self, text: str, image: bytes | None, tokenizer: Any, where: str) -> dict[str, list[int]]:
        """What the model takes for each token of the text, each image's token written out as often as it needs."""
        begins = tokenizer.tokenizer.bos_token
        out = tokenizer(
            text=[text],
            return_tensors="pt",
            add_special_tokens=not (begins and text.startswith(begins)),
            **({} if image is None else {"images": [_pixels(image, where)]}),
        )
        size = out["input_ids"].shape
        columns = {
            name: value[0].tolist()
            for name, value in out.items()
            if getattr(value, "shape", None) == size and (self._takes is None or name in self._takes)
        }
        end = tokenizer.tokenizer.eos_token
        if columns["input_ids"][-1] == tokenizer.tokenizer.eos_token_id and not text.endswith(end):
            columns = {name: value[:-1] for name, value in columns.items()}  # some tokenizers end every text
        return columns

    def collator(self, tokenizer: Any) -> Callable[..., dict[str, Any]]:
        takes, dtype = self._takes, self._dtype

        def pixels(images: list[bytes]) -> dict[str, Any]:
            if not images:
                return {}
            made = tokenizer.image_processor([_pixels(image, "image") for image in images], return_tensors="pt")
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
        for i, (gold, options, samples) in enumerate(zip(rows["gold"], rows["options"], answers)):
            given = [option_of(text, options) if options else short_answer(text) for text in samples]
            right = [one == (gold if options else short_answer(gold)) for one in given]
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


def _options(table: Columns, source: str) -> tuple[list[str], list[str], list[list[str]]]:
    asked, answers, options = [], [], []
    questions = texts(table["question"], "question", source)
    hints = table.get("hint", [None] * len(questions))
    for i, (question, hint, choices, answer) in enumerate(zip(questions, hints, table["choices"], table["answer"]), 1):
        if not isinstance(choices, list) or not 1 < len(choices) <= len(LETTERS):
            raise DataError(f"{source}: row {i} has no list of 2 to {len(LETTERS)} choices")
        if not isinstance(answer, int) or isinstance(answer, bool) or answer not in range(len(choices)):
            raise DataError(f"{source}: row {i} has answer {answer!r}, not the number of one of its choices, from 0")
        listed = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices)]
        asked.append("\n".join([*([hint] if hint else []), question, *listed, OPTION_WORDS]))
        answers.append(LETTERS[answer])
        options.append([str(choice) for choice in choices])
    return asked, answers, options


def _true_or_false(table: Columns, source: str) -> tuple[list[str], list[str], list[list[str]]]:
    known = {0: "false", 1: "true", "0": "false", "1": "true", "false": "false", "true": "true"}
    answers = []
    for i, label in enumerate(table["label"], 1):
        key = label.lower() if isinstance(label, str) else label
        if key not in known:
            raise DataError(f"{source}: row {i} has label {label!r}, not 0, 1, true or false")
        answers.append(known[key])
    asked = [f"{text}\n{TRUE_WORDS}" for text in texts(table["sentence"], "sentence", source)]
    return asked, answers, [[] for _ in asked]


def _image(value: Any, folder: Path, where: str) -> bytes | None:
    """Image data from the hub's ``{bytes, path}``, from data (base64, too), or from a file's name."""
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if value is None or isinstance(value, bytes):
        return value
    if not isinstance(value, str):
        raise DataError(f"{where} has a {type(value).__name__} for an image, where a file's name is needed")
    file = folder / value
    try:
        is_there = file.is_file()
    except (OSError, ValueError):  # too long for a name
        is_there = False
    if not is_there and re.fullmatch(r"data:[^,]*,.*|[A-Za-z0-9+/\s]{64,}=*\s*", value, re.DOTALL):
        return _decoded(re.sub(r"^data:[^,]*,", "", value), where)
    if not is_there:
        raise DataError(f"{where} names the image {str(file)!r}, which is not there; task.images names the folder")
    return file.read_bytes()


def _decoded(value: Any, where: str) -> bytes:
    try:
        return base64.b64decode(re.sub(r"\s", "", value), validate=True)
    except (binascii.Error, TypeError, ValueError) as error:
        raise DataError(f"{where}: its image is not base64: {error}") from error


def _pixels(image: bytes, where: str) -> Any:
    from PIL import Image, UnidentifiedImageError

    try:
        return Image.open(io.BytesIO(image)).convert("RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise DataError(f"{where}: its image cannot be read: {error}") from error
