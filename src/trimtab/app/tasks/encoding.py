"""A conversation as the tokens that a model reads: template, answers that are learned, lengths, padding.

Decoders read a conversation through the tokenizer's chat template and learn what the assistant says; encoder-decoders
read what comes before the last answer and learn that answer.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import ConfigError, DataError
from ..model_facts import positions
from . import Task
from .generation import Decoding
from .messages import Message, is_learned

if TYPE_CHECKING:
    import torch

ALPACA = (
    "{%- set system = messages[0].content if messages[0].role == 'system' else '' -%}"
    "{%- for m in messages -%}"
    "{%- if loop.index0 == (1 if system else 0) -%}"
    "{{ system or ('Below is an instruction that describes a task'"
    " + (', paired with an input that provides further context' if m.input else '')"
    " + '. Write a response that appropriately completes the request.') }}{{ '\n\n' }}"
    "{%- endif -%}"
    "{%- if m.role == 'system' and not loop.first -%}{{ m.content + '\n\n' }}"
    "{%- elif m.role == 'tool' -%}{{ '### Input:\n' + m.content + '\n\n' }}"
    "{%- elif m.role == 'user' -%}{{ '### Instruction:\n' + m.content + '\n\n' }}"
    "{%- if m.input -%}{{ '### Input:\n' + m.input + '\n\n' }}{%- endif -%}"
    "{%- elif m.role == 'assistant' -%}{{ '### Response:\n' + m.content + eos_token + '\n\n' }}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '### Response:\n' }}{%- endif -%}"
)
"""Stanford Alpaca's prompt (Taori et al. 2023), as a chat template; a line break ends ``### Response:``."""

PLAIN = (
    "{%- for m in messages -%}{{ m.content }}{%- if m.role == 'assistant' -%}{{ eos_token }}{%- endif -%}{%- endfor -%}"
)
"""Prompt and answer one after the other, with nothing between them."""

TEMPLATES = {"alpaca": ALPACA, "plain": PLAIN}
_WORDS = "\N{PILCROW SIGN}"
"""Stands for an answer's words."""


class Encoding(Task):
    """What becomes of a row on its way into the model; `Answering` adds where rows come from and how they score."""

    max_length: int | None
    max_target_length: int | None
    template: str
    fallback_template = "alpaca"
    decoding: Decoding
    is_encoder_decoder: bool
    _special: tuple[Any, tuple[str, ...]] | None
    _answer_room: int | None
    """Tokens that an encoder-decoder can write."""

    # Prompts.

    def question_text(self, row: Mapping[str, Any], tokenizer: Any, where: str) -> str:
        """What a decoder is given to continue for a raw row."""
        return self.render(row["messages"][:-1], tokenizer, True, where)

    @staticmethod
    def _text_tokenizer(tokenizer: Any) -> Any:
        return getattr(tokenizer, "tokenizer", tokenizer)

    def meet(self, tokenizer: Any, model: Any) -> None:
        """Settles what depends on the model, and puts the template into the tokenizer (or processor)."""
        config = getattr(model, "config", None)
        if config is not None:
            self.adjust_to(config)
        if not self.is_encoder_decoder:
            self.set_template(tokenizer)
        elif model is not None:
            self._answer_room = positions(model, "decoder")

    def set_template(self, tokenizer: Any) -> None:
        """Puts the chosen template into the tokenizer (or processor), to be saved with it."""
        text = self._text_tokenizer(tokenizer)
        own = getattr(tokenizer, "chat_template", None) or getattr(text, "chat_template", None)
        if self.template == "own" or (self.template == "auto" and own is not None):
            if own is None:
                raise ConfigError(
                    "task.template",
                    self.template,
                    f"the tokenizer has no chat template; use auto, {', '.join(TEMPLATES)}, or a *.jinja file",
                )
            tokenizer.chat_template = own
        elif self.template.endswith(".jinja"):
            try:
                tokenizer.chat_template = Path(self.template).expanduser().read_text(encoding="utf-8")
            except OSError as error:
                raise ConfigError("task.template", self.template, f"cannot be read: {error.strerror}") from error
        else:
            begins = text.bos_token is not None and text("a")["input_ids"][:1] == [text.bos_token_id]
            tokenizer.chat_template = ("{{ bos_token }}" if begins else "") + self.template_text(tokenizer)

    def template_text(self, tokenizer: Any) -> str:
        """The template of ours that is chosen."""
        return TEMPLATES[self.fallback_template if self.template == "auto" else self.template]

    def shown(self, message: Message, template: str) -> dict[str, Any]:
        """A message as the template takes it; only ours has a place for an input of its own, not all one for tools."""
        content, about, calls = message["content"], message.get("input") or "", message.get("tool_calls") or ""
        out = {"role": message["role"], **{key: message[key] for key in ("name", "tool_call_id") if message.get(key)}}
        if calls and "tool_calls" in template:
            return {**out, "content": content, "tool_calls": [_with_arguments(call) for call in json.loads(calls)]}
        if about and template.endswith(ALPACA):
            return {**out, "content": content, "input": about}
        return {**out, "content": "\n\n".join(text for text in (content, about, calls) if text)}

    def render(self, messages: Sequence[Message], tokenizer: Any, asks: bool, where: str = "row") -> str:
        """The conversation as text; with `asks`, up to where the assistant's words begin."""
        import jinja2

        template = str(tokenizer.chat_template)
        shown = [self.shown(m, template) for m in messages]
        tools = json.loads(messages[0].get("tools") or "null")
        if tools and not re.search(r"\btools\b", template):
            told = f"Tools that can be called:\n{json.dumps(tools, ensure_ascii=False)}"
            if shown[0]["role"] == "system":
                shown[0] = {**shown[0], "content": f"{shown[0]['content']}\n\n{told}"}
            else:
                shown.insert(0, {"role": "system", "content": told})
            tools = None
        try:
            return tokenizer.apply_chat_template(
                shown, tokenize=False, add_generation_prompt=asks, **({"tools": tools} if tools else {})
            )
        except (jinja2.TemplateError, TypeError) as error:
            raise DataError(f"{where}: the chat template refuses it: {error}") from error

    def lead(self, messages: Sequence[Message], tokenizer: Any, where: str = "row") -> str:
        """What the template writes between its prompt and the words of the last answer (Qwen3: an empty ``<think>``).

        It is learned with the answer, and so is written before one.
        """
        prompt = self.render(messages[:-1], tokenizer, True, where)
        whole = self.render([*messages[:-1], {"role": "assistant", "content": _WORDS}], tokenizer, False, where)
        return whole[len(prompt) :].partition(_WORDS)[0] if whole.startswith(prompt) else ""

    def segments(self, messages: Sequence[Message], tokenizer: Any, where: str = "row") -> list[tuple[str, bool]]:
        """The conversation's text in pieces, each with whether the assistant says it.

        Every answer counts where the template writes a conversation's beginning the same way whatever
        follows; where it does not (some leave out earlier reasoning), the last answer alone does.
        """
        asked = next((i for i, m in enumerate(messages) if m["role"] != "assistant" and m["role"] != "system"), 0)
        turns = [i for i, m in enumerate(messages) if i > asked and m["role"] == "assistant" and is_learned(m)]
        for chosen in (turns, turns[-1:]):
            pieces: list[tuple[str, bool]] = []
            done = ""
            for i in chosen:
                prompt = self.render(messages[:i], tokenizer, True, where)
                whole = self.render(messages[: i + 1], tokenizer, False, where).rstrip()
                if not whole.startswith(prompt):  # what generation would see after the prompt
                    whole = prompt + self.shown(messages[i], "")["content"]
                if not prompt.startswith(done):
                    break
                pieces += [(prompt[len(done) :], False), (whole[len(prompt) :], True)]
                done = whole
            else:
                break
        text = self._text_tokenizer(tokenizer)
        last = pieces[-1][0]
        if text.eos_token and not last.endswith(self._special_tokens(text)):
            pieces[-1] = (last + text.eos_token, True)
        return pieces

    def encode(self, messages: Sequence[Message], tokenizer: Any, where: str = "row") -> tuple[list[int], list[int]]:
        """Token ids and labels of a conversation, equally long; labels are -100 outside the answers."""
        text = self._text_tokenizer(tokenizer)
        ids: list[int] = []
        labels: list[int] = []
        done = ""
        for piece, is_answer in self.segments(messages, tokenizer, where):
            done += piece
            together = ids_of(text, done)
            # As one text, if that leaves the prompt's tokens as they will be when an answer is generated.
            new = together[len(ids) :] if together[: len(ids)] == ids else ids_of(text, piece)
            ids += new
            labels += new if is_answer else [-100] * len(new)
        return ids, labels

    def source_text(self, messages: Sequence[Message]) -> str:
        """What an encoder reads: everything before the last answer."""
        before = messages[:-1] if messages[-1]["role"] == "assistant" else messages
        return "\n\n".join(text for m in before for text in (m["content"], m.get("input") or "") if text)

    def question_columns(self, row: Mapping[str, Any], tokenizer: Any, where: str) -> dict[str, Any]:
        """The model's arguments for the question that a raw row asks."""
        text = self._text_tokenizer(tokenizer)
        if self.is_encoder_decoder:
            ids = text(self.source_text(row["messages"]))["input_ids"]
        else:
            ids = ids_of(text, self.question_text(row, tokenizer, where))
        return {"input_ids": ids, "attention_mask": [1] * len(ids)}

    def example_columns(self, row: Mapping[str, Any], tokenizer: Any, where: str) -> dict[str, Any]:
        """The model's arguments, and labels, for a raw row with its answer."""
        if not self.is_encoder_decoder:
            ids, labels = self.encode(row["messages"], tokenizer, where)
            return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}
        text = self._text_tokenizer(tokenizer)
        source = text(self.source_text(row["messages"]))
        answer = row["messages"][-1]["content"]
        room, asked = self._answer_room, self.max_target_length
        labels = text(text_target=answer, truncation=asked is not None, max_length=asked)["input_ids"]
        if answer_was_cut := room is not None and len(labels) > room:
            labels = text(text_target=answer, truncation=True, max_length=room)["input_ids"]
        return {
            "input_ids": source["input_ids"],
            "attention_mask": source["attention_mask"],
            "labels": labels,
            "answer_was_cut": answer_was_cut,
        }

    def _encoder(self, split: str, tokenizer: Any, limit: int | None) -> Callable[[dict[str, Any], int], Any]:
        def encode(row: dict[str, Any], i: int) -> dict[str, Any]:
            columns = self.example_columns(row, tokenizer, f"{split} row {i + 1}")
            n = len(columns["input_ids"])
            was_cut = limit is not None and n > limit
            if not was_cut or limit is None:
                pass
            elif self.is_encoder_decoder:
                columns |= self.cut_source(columns, limit)
            else:
                columns = {
                    key: value[:limit] if isinstance(value, list) and len(value) == n else value
                    for key, value in columns.items()
                }
            has_answer = any(label != -100 for label in columns["labels"])
            return {"answer_was_cut": False, **columns, "was_cut": was_cut, "has_answer": has_answer}

        return encode

    # Lengths and ends.

    @staticmethod
    def cut_source(columns: Mapping[str, Any], limit: int) -> dict[str, Any]:
        """What an encoder reads of a longer text: its beginning and its end token."""
        ids, mask = columns["input_ids"], columns["attention_mask"]
        return {"input_ids": ids[: limit - 1] + ids[-1:], "attention_mask": mask[:limit]}

    def length_limit(self, tokenizer: Any, model: Any) -> int | None:
        """Tokens a row is cut to: the setting, else what tokenizer and model can take, if they say."""
        most = context_length(tokenizer, model, "encoder" if self.is_encoder_decoder else None)
        if self.max_length is not None and most is not None and self.max_length > most:
            raise ConfigError("task.max_length", self.max_length, f"at most {most}, the positions that this model has")
        return self.max_length or most

    def _room(self, tokenizer: Any, model: Any) -> int | None:
        """Tokens that a prompt may have, so that the answer still fits."""
        if self.is_encoder_decoder:
            if self._answer_room is not None and self.decoding.max_new_tokens > self._answer_room:
                raise ConfigError(
                    "task.generation.max_new_tokens",
                    self.decoding.max_new_tokens,
                    f"at most {self._answer_room}, the positions that this model's decoder has",
                )
            return self.length_limit(tokenizer, model)
        most = context_length(tokenizer, model)
        if most is None:
            return None
        room = most - self.decoding.max_new_tokens
        if room < 1:
            raise ConfigError(
                "task.generation.max_new_tokens",
                self.decoding.max_new_tokens,
                f"fewer than {most}, the positions that this model has",
            )
        return room

    def ends(self, tokenizer: Any, model: Any = None) -> tuple[int, ...]:
        """Tokens that end an answer: the tokenizer's, the model's, and the one that the template ends a turn with."""
        text = self._text_tokenizer(tokenizer)
        found = {text.eos_token_id}
        own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
        found |= set(own) if isinstance(own, (list, tuple)) else {own}
        if not self.is_encoder_decoder:
            turn = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
            last = self.encode(turn, tokenizer, "a question and its answer")[0][-1]
            if text.convert_ids_to_tokens(last) in self._special_tokens(text):
                found.add(last)
        found.discard(None)
        if not found:
            raise ConfigError(
                "model.tokenizer",
                getattr(text, "name_or_path", ""),
                "has no end-of-text token, so an answer would have no end; name another tokenizer",
            )
        return tuple(sorted(found))

    def _special_tokens(self, text: Any) -> tuple[str, ...]:
        if self._special is None or self._special[0] is not text:  # slow to list, and asked for in every row
            added = getattr(text, "added_tokens_decoder", {}).values()
            names = {*text.all_special_tokens, *(str(token) for token in added if token.special)}
            self._special = (text, tuple(sorted(names)))
        return self._special[1]


class Padder:
    """Pads a list of rows to the longest of them; labels with -100, masks with 0.

    ``side="left"`` is for continuing prompts with a decoder.
    """

    def __init__(self, pad_token_id: int, images: Callable[[list[Any]], dict[str, Any]] | None = None) -> None:
        self.pad_token_id, self.images = pad_token_id, images

    def __call__(self, rows: list[dict[str, Any]], side: str = "right") -> dict[str, torch.Tensor]:
        import torch

        out: dict[str, torch.Tensor] = {}
        for name in rows[0]:
            values = [row[name] for row in rows]
            if name == "pixel_values":
                if self.images is not None:
                    out |= self.images([value for value in values if value is not None])
                continue
            if any(value is None for value in values):
                raise DataError(
                    f"batch: a row without an image has no {name}, which this model needs of every row "
                    "(task.text_rows: false)"
                )
            blank = _blank(next((value[0] for value in values if len(value)), 0))
            fill = {"input_ids": self.pad_token_id, "labels": -100}.get(name, blank)
            longest = max(len(value) for value in values)
            gaps = [[fill] * (longest - len(value)) for value in values]
            out[name] = torch.tensor(
                [gap + list(value) if side == "left" else list(value) + gap for value, gap in zip(values, gaps)]
            )
        return out


def _blank(value: Any) -> Any:
    """What is put where a row has no token: 0, or zeros in the shape of a token's values."""
    return [_blank(one) for one in value] if isinstance(value, list) else 0


def context_length(tokenizer: Any, model: Any, side: str | None = None) -> int | None:
    """Tokens that tokenizer and model (or one side of it) can take, if they say."""
    text = getattr(tokenizer, "tokenizer", tokenizer)
    known = [text.model_max_length, positions(model, side) if model is not None else None]
    return min((n for n in known if n and n < 10**9), default=None)  # "unlimited" is 1e30


def ids_of(tokenizer: Any, text: str) -> list[int]:
    # The template has written every special token already.
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _with_arguments(call: dict[str, Any]) -> dict[str, Any]:
    """A call of a tool as templates take it: its arguments as an object, which OpenAI writes as text."""
    function = dict(call.get("function") or call)
    if isinstance(function.get("arguments"), str):
        with contextlib.suppress(ValueError):
            function["arguments"] = json.loads(function["arguments"])
    return {**call, "function": function}
