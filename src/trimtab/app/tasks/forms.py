"""The forms that instructions and chats are published in, by the names of their columns."""

from __future__ import annotations

CHATS = ("messages", "conversations", "conversation")
"""Columns of lists of messages: OpenAI's ``{role, content}``, ShareGPT's ``{from, value}``."""
# Prompt, answer, and what the prompt is about.
PAIRS: dict[str, tuple[str, str, str | None]] = {
    "alpaca": ("instruction", "output", "input"),
    "dolly": ("instruction", "response", "context"),
    "completion": ("prompt", "completion", None),
    "prompt": ("prompt", "response", None),
    "response": ("query", "response", None),  # MetaMathQA
    "query": ("query", "answer", None),  # Code-Feedback
    "question": ("question", "answer", None),  # GSM8K
    "orca": ("question", "response", None),
    "targets": ("inputs", "targets", None),
    "problem": ("problem", "solution", None),  # MATH
    "input": ("input", "output", None),
}
PROMPTS = ("instruction", "prompt", "question", "problem", "query", "input", "inputs")
ANSWERS = ("output", "response", "completion", "solution", "answer", "targets")
_KNOWN = {names[:2] for names in PAIRS.values()}
PAIRS |= {f"{p} {a}": (p, a, None) for p in PROMPTS for a in ANSWERS if (p, a) not in _KNOWN}
ABOUT = ("input", "context", "passage", "document", "article")
"""Columns that hold what a prompt is about, beside any pair."""
CHOICES = ("choices", "options")
LETTERS = "ABCDEFGHIJ"
"""Of choices; columns that hold one each are called so."""
FORMS: dict[str, tuple[str, ...]] = {
    **{name: (name,) for name in CHATS},
    "instances": ("instruction", "instances"),  # Self-Instruct: several inputs to one instruction
    **{form: names[:2] for form, names in PAIRS.items()},
}
"""Form -> the columns by which it is known; the first that fits."""
SYSTEMS = ("system", "system_prompt", "system_message", "system_instruction", "systemInstruction")
BESIDE = (*SYSTEMS, "history", "tools")
"""Columns that go with any form."""
COLUMNS = tuple(
    dict.fromkeys(
        (*BESIDE, *(name for names in (*FORMS.values(), *PAIRS.values()) for name in names if name), *ABOUT, *CHOICES)
    )
)
"""All of them."""
