"""Answers from a model: in batches, greedy unless told otherwise, and resumable.

Finished answers go to a JSONL file, one object a line: ``id``, ``sample``, ``key``, ``text``. The key is a
hash of the prompt, the decoding settings and the model's weights, so that a file left by another model or
another setting is never taken for this one's. Batches are fixed before the first answer and written whole:
a run that was interrupted and started again gives what an unbroken run gives, when sampling too.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ...errors import ConfigError, did_you_mean
from ..runfolder import is_main

if TYPE_CHECKING:
    from torch import nn


_READ_PADDING = ("rwkv", "xlstm")
"""Kinds of models that take no mask, and so are given prompts of one length together."""
_TAKEN = {
    "num_return_sequences": "samples says how many answers there are",
    "max_length": "max_new_tokens says how long an answer may be",
    "stop_strings": "stop names the texts that end an answer",
    **dict.fromkeys(("eos_token_id", "pad_token_id"), "tokenizer and model say which it is; stop ends an answer, too"),
    **dict.fromkeys(("use_cache", "return_dict_in_generate"), "changes no answer; leave it out"),
}
"""Fields of `GenerationConfig` that are settled here, with what to set instead."""


_OF_DRAWS = {"temperature": 1.0, "top_p": 1.0, "top_k": 50, "min_p": 0.0, "typical_p": 1.0}
"""Fields that say nothing where the likeliest token is taken, with what they are when not set."""


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How answers are decoded: the recipe's ``task.generation``, checked."""

    max_new_tokens: int = 256
    batch_size: int = 8
    """Prompts (times samples) that are continued at once."""
    samples: int = 1
    """Answers to each prompt; more than one are drawn at random."""
    seed: int = 0
    """Of the draws."""
    stop: tuple[str, ...] = ()
    """Texts that end an answer; they are cut off."""
    others: Mapping[str, Any] = field(default_factory=dict)
    """Fields of transformers' `GenerationConfig` (``num_beams``, ``temperature``, …)."""

    @classmethod
    def read(cls, settings: Any, **defaults: Any) -> Decoding:
        """The user's settings over a task's defaults.

        Raises:
            ConfigError: for an unknown name, or a number that cannot be.
        """
        if not isinstance(settings, Mapping):
            raise ConfigError("task.generation", settings, "a mapping, such as {max_new_tokens: 128}")
        own = {"max_new_tokens": 1, "batch_size": 1, "samples": 1, "seed": 0}
        values = {**defaults, **settings}
        for key, least in own.items():
            value = values.get(key, least)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ConfigError(f"task.generation.{key}", value, f"a whole number, at least {least}")
        stop = values.pop("stop", ())
        stop = (stop,) if isinstance(stop, str) else stop
        if not isinstance(stop, (list, tuple)) or not all(isinstance(text, str) and text for text in stop):
            raise ConfigError("task.generation.stop", stop, "a text, or a list of texts")
        others = {key: values.pop(key) for key in list(values) if key not in own}
        if others:
            from transformers import GenerationConfig

            known = [*own, "stop", *(key for key in GenerationConfig().to_dict() if not key.startswith("_"))]
            for key in others:
                if key in _TAKEN:
                    raise ConfigError(f"task.generation.{key}", others[key], _TAKEN[key])
                if key not in known:
                    raise ConfigError(
                        f"task.generation.{key}",
                        others[key],
                        f"no such setting.{did_you_mean(str(key), known)} There is {', '.join(own)}, stop, "
                        "and every field of transformers' GenerationConfig",
                    )
        beams, heat = others.get("num_beams", 1), others.get("temperature", 1.0)
        if not isinstance(beams, int) or isinstance(beams, bool) or beams < 1:
            raise ConfigError("task.generation.num_beams", beams, "a whole number, at least 1")
        draws = others.get("do_sample", values.get("samples", 1) > 1)
        if not isinstance(draws, bool):
            raise ConfigError("task.generation.do_sample", draws, "true or false")
        if not isinstance(heat, (int, float)) or heat < 0 or (draws and heat == 0):
            cure = "a number above 0; answers that are not drawn (samples: 1, do_sample: false) have none"
            raise ConfigError("task.generation.temperature", heat, cure)
        for key in _OF_DRAWS if not draws else ():
            if key in others and others[key] not in (None, _OF_DRAWS[key], 0):
                cure = "says how answers are drawn, and none is: set do_sample: true, or samples above 1"
                raise ConfigError(f"task.generation.{key}", others[key], cure)
        share = others.get("top_p", 1.0)
        if not isinstance(share, (int, float)) or not 0 < share <= 1:
            raise ConfigError("task.generation.top_p", share, "above 0 and at most 1")
        return cls(**values, stop=tuple(stop), others=others)

    def config(self, ends: Sequence[int], pad: int) -> Any:
        """As `GenerationConfig`. What a checkpoint brings along of its own (a temperature, the 56 tokens that
        BART's for CNN writes at least) does not count, but the tokens that a model needs to begin with do.

        Args:
            ends: ids of the tokens that end an answer.
        """
        from transformers import GenerationConfig

        draws = self.samples > 1
        neutral = {
            "do_sample": draws,
            "num_beams": 1,
            "temperature": 1.0,
            "top_p": 1.0,
            "top_k": 0 if draws or self.others.get("do_sample") else 50,
            "min_p": 0.0,
            "typical_p": 1.0,
            "repetition_penalty": 1.0,
            "encoder_repetition_penalty": 1.0,
            "no_repeat_ngram_size": 0,
            "encoder_no_repeat_ngram_size": 0,
            "min_length": 0,
            "min_new_tokens": 0,
            "length_penalty": 1.0,
            "early_stopping": False,
        }
        return GenerationConfig(
            **{**neutral, **self.others},
            max_new_tokens=self.max_new_tokens,
            use_cache=True,
            eos_token_id=list(ends),
            pad_token_id=pad,
        )

    def try_out(self, ends: Sequence[int], pad: int, vocabulary: int) -> None:
        """Takes two steps with a tiny model, so that what `generate` refuses is refused before training.

        Raises:
            ConfigError: it refuses a field of `GenerationConfig`.
        """
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        if not self.others:
            return
        sizes = {"hidden_size": 4, "intermediate_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1}
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            model = LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, **sizes))  # type: ignore[arg-type]
            try:
                config = self.config(ends, pad)
                config.update(max_new_tokens=2, cache_implementation=None)  # that one hangs on the model
                model.generate(torch.zeros(min(2, self.batch_size), 2, dtype=torch.long), generation_config=config)
            except Exception as error:  # whatever it is made of
                text = " ".join(str(error).split())[:300]
                raise ConfigError("task.generation", dict(self.others), text) from error


@dataclass(frozen=True)
class Question:
    """One prompt, ready for the model."""

    id: str
    """Unique among the questions of a run (``test/17``)."""
    columns: Mapping[str, Any]
    """``input_ids`` and whatever else the collator turns into the model's arguments."""


class Bar(Protocol):
    """Progress of a known amount of work."""

    def advance(self, steps: int = 1) -> None: ...

    def close(self) -> None: ...


MakeBar = Callable[[int, str], Bar]
"""From the amount of work and its name."""


def generate(
    model: nn.Module,
    tokenizer: Any,
    questions: Sequence[Question],
    decoding: Decoding,
    collate: Callable[[list[dict[str, Any]]], dict[str, Any]],
    *,
    ends: Sequence[int],
    file: Path | None = None,
    make_bar: MakeBar | None = None,
) -> list[list[str]]:
    """Each question's answers, as many as `decoding.samples`, without what comes after an end token or text.

    Args:
        model: any that has `generate`; put into eval mode meanwhile.
        tokenizer: turns ids into text.
        collate: makes the model's arguments from a list of `Question.columns`; pads decoders on the left.
        ends: ids of the tokens that end an answer.
        file: where finished answers are kept and looked for.
    """
    key = _settings_key(model, decoding, ends)
    keys = [_hash([key, question.id, _digestible(question.columns)]) for question in questions]
    found = _finished(file)
    units = [(i, sample) for i in range(len(questions)) for sample in range(decoding.samples)]
    lengths = [-len(question.columns["input_ids"]) for question in questions]
    units.sort(key=lambda unit: lengths[unit[0]])  # what may not fit in memory comes first
    parts = [units]
    if getattr(model.config, "model_type", None) in _READ_PADDING:
        parts = [list(part) for _, part in groupby(units, key=lambda unit: lengths[unit[0]])]
    size = decoding.batch_size
    batches = [part[i : i + size] for part in parts for i in range(0, len(part), size)]
    texts: dict[tuple[int, int], str] = {
        (i, sample): found[questions[i].id, sample, keys[i]]
        for i, sample in units
        if (questions[i].id, sample, keys[i]) in found
    }
    with _evaluating(model), _bar(make_bar, len(units), "answers") as bar:
        for batch in batches:
            if not all(unit in texts for unit in batch):
                new = _answer(
                    model,
                    tokenizer,
                    [questions[i] for i, _ in batch],
                    decoding,
                    collate,
                    ends,
                    seed=_hash([decoding.seed, [(questions[i].id, sample) for i, sample in batch]]),
                )
                texts.update(zip(batch, new))
                _keep(
                    file,
                    [
                        {"id": questions[i].id, "sample": sample, "key": keys[i], "text": texts[i, sample]}
                        for i, sample in batch
                    ],
                )
            bar.advance(len(batch))
    return [[texts[i, sample] for sample in range(decoding.samples)] for i in range(len(questions))]


def _answer(
    model: Any,
    tokenizer: Any,
    questions: Sequence[Question],
    decoding: Decoding,
    collate: Callable[[list[dict[str, Any]]], dict[str, Any]],
    ends: Sequence[int],
    seed: str,
) -> list[str]:
    import torch
    from transformers import StoppingCriteriaList, StopStringCriteria

    device = next(model.parameters()).device
    inputs = {
        name: value.to(device) if hasattr(value, "to") else value
        for name, value in collate([dict(q.columns) for q in questions]).items()
    }
    skip = 0 if getattr(model.config, "is_encoder_decoder", False) else inputs["input_ids"].shape[1]
    inner = getattr(tokenizer, "tokenizer", tokenizer)
    config = decoding.config(ends, inner.pad_token_id)
    stops = [StopStringCriteria(inner, list(decoding.stop))] if decoding.stop else []
    with torch.no_grad(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(int(seed, 16) % 2**63)
        out = model.generate(**inputs, generation_config=config, stopping_criteria=StoppingCriteriaList(stops))
    return [_text(row, inner, set(ends), decoding.stop) for row in out[:, skip:].tolist()]


def _text(ids: list[int], tokenizer: Any, ends: set[int], stop: Sequence[str]) -> str:
    # An encoder-decoder's first token is often also its end token (BART): one is passed over at the start.
    begin = 1 if ids and ids[0] in ends and len(ids) > 1 and ids[1] not in {*ends, tokenizer.pad_token_id} else 0
    last = next((i for i in range(begin, len(ids)) if ids[i] in ends), len(ids))
    text = text_of(ids[begin:last], tokenizer)
    return text[: min((text.index(end) for end in stop if end in text), default=len(text))]


def text_of(ids: list[int], tokenizer: Any) -> str:
    """Generated tokens as text."""
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


# -- what was finished before --------------------------------------------------------------------------


def _finished(file: Path | None) -> dict[tuple[str, int, str], str]:
    """Answers by (id, sample, key). A line that a crash cut short is taken off the file's end."""
    if file is None or not file.is_file():
        return {}
    data = file.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if whole != data and is_main():
        with file.open("rb+") as out:
            out.truncate(len(whole))
    found = {}
    for line in whole.decode("utf-8", errors="replace").split("\n"):
        try:
            row = json.loads(line)
            found[str(row["id"]), int(row["sample"]), str(row["key"])] = str(row["text"])
        except (ValueError, KeyError, TypeError):
            continue  # not ours; answered again
    return found


def _keep(file: Path | None, rows: list[dict[str, Any]]) -> None:
    if file is not None and is_main():
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a", encoding="utf-8", newline="\n") as out:
            out.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _settings_key(model: nn.Module, decoding: Decoding, ends: Sequence[int]) -> str:
    settings = asdict(decoding)
    settings.pop("batch_size")  # does not change an answer
    return _hash([settings, sorted(ends), fingerprint(model)])


def fingerprint(model: nn.Module) -> str:
    """Tells two models apart: the same architecture after another step of training, or with its adapter off.

    Reads up to 32 values of every parameter, so it takes a moment for any size of model.
    """
    import torch

    sha = hashlib.sha256()
    for name, parameter in model.named_parameters():
        flat = parameter.detach().reshape(-1)
        some = flat[:: max(1, len(flat) // 32)][:32].to(torch.device("cpu"), torch.float32)
        sha.update(f"{name} {tuple(parameter.shape)}".encode() + some.numpy().tobytes())
    for name, module in model.named_modules():
        if hasattr(module, "disable_adapters"):  # a PEFT layer
            state = [
                getattr(module, key, None)
                for key in ("disable_adapters", "active_adapters", "merged_adapters", "scaling")
            ]
            sha.update(f"{name} {state}".encode())
    return sha.hexdigest()[:16]


def _digestible(value: Any) -> Any:
    """The value with bytes (images) replaced by their hash, for JSON."""
    if isinstance(value, bytes):
        return hashlib.sha256(value).hexdigest()
    if isinstance(value, Mapping):
        return {key: _digestible(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_digestible(inner) for inner in value] if value and not isinstance(value[0], int) else value
    return value


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


# -- mode and progress ---------------------------------------------------------------------------------


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    before = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in before.items():
            module.training = training


@contextmanager
def _bar(make: MakeBar | None, total: int, name: str) -> Iterator[Bar]:
    """The caller's bar, or one of our own on a terminal."""
    if make is not None:
        bar = make(total, name)
        try:
            yield bar
        finally:
            bar.close()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn(name), BarColumn(bar_width=24), MofNCompleteColumn(), TimeRemainingColumn(compact=True))
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        yield _RichBar(progress, progress.add_task(name, total=total))


@dataclass
class _RichBar:
    progress: Any
    task: Any

    def advance(self, steps: int = 1) -> None:
        self.progress.advance(self.task, steps)

    def close(self) -> None:
        pass
