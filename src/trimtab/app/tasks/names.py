"""What columns are called: which names are those of texts, of labels, of pairs, of what is to be learned.

The names known here are in small letters; `in_small` makes a file's own so.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from .forms import ANSWERS

TEXTS = (
    "text", "sentence", "review", "content", "body", "comment", "message", "tweet", "post", "document", "article",
    "utterance", "headline", "description", "abstract", "question", "query", "prompt", "input", "title",
)  # fmt: skip
CLASSES = ("label", "labels", "class", "category")
LABELS = (
    *CLASSES, "target", "gold_label", "sentiment", "intent", "topic", "emotion", "stars", "queue", "rating", "score",
    "similarity", "relevance", "is_duplicate", "polarity", "tag", "y",
)  # fmt: skip
TEXT_PAIRS = (
    ("premise", "hypothesis"), ("text", "text_pair"), ("query", "passage"), ("query", "document"),
    ("question", "passage"), ("question", "sentence"), ("question", "context"),
)  # fmt: skip
OF_TEXTS = frozenset((*TEXTS, *(name for pair in TEXT_PAIRS for name in pair)))
LEARNED = (
    *ANSWERS, "answers", "canonical_solution", "summary", "highlights", "abstract", "tldr", "translation", "tags",
    "ner_tags", "chosen",
)  # fmt: skip
"""What is learned from another text, where it stands beside one."""
DOCUMENTS = ("document", "article", "dialogue", "text", "content", "body", "passage", "transcript")
HEADINGS = ("title", "headline")
"""Texts that stand above another."""
IMAGES = frozenset(("image", "images", "image_path", "png_base64", "image_id"))
_CHOICE = re.compile(
    "(choice|option|ending|alternative|candidate|distractor)(s|[_ ]?[0-9A-J])|(answer|sol)[_ ]?[0-9A-J]|op[A-E]", re.I
)
_OF_ROWS = re.compile(r"(.*[_ ])?(id|idx|index|guid|uid|uuid|key|row|date|time|timestamp|url|hash)|unnamed.*|", re.I)


def in_small(names: Iterable[str]) -> dict[str, str]:
    """Names in small letters and without blanks around them -> as they are; not where two become one.

    >>> in_small(["Question", "answer ", "a", "A"])
    {'question': 'Question', 'answer': 'answer '}
    """
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(name.strip().lower(), []).append(name)
    return {small: several[0] for small, several in found.items() if len(several) == 1}


def names_rows(name: str) -> bool:
    """Whether a column only tells its rows apart: ``id``, ``created date``, ``page_url``."""
    return bool(_OF_ROWS.fullmatch(name))


def names_choices(name: str) -> bool:
    """Whether a column is called as answers to choose from are: ``endings``, ``option1``, ``answerC``."""
    return bool(_CHOICE.fullmatch(name.strip()))


def is_sentence(name: str) -> bool:
    """Whether a name is too long for one: a row of texts stands where the names should."""
    return len(name.split()) > 3 and len(name) > 20


def are_numbered(one: str, other: str) -> bool:
    """Whether two names differ by 1 and 2 or A and B alone.

    >>> are_numbered("#1 String", "#2 String"), are_numbered("textA", "textB"), are_numbered("data", "datb")
    (True, True, False)
    """
    differ = [i for i, (a, b) in enumerate(zip(one, other)) if a != b]
    if len(one) != len(other) or len(differ) != 1:
        return False
    at = differ[0]
    marks, before, after = one[at] + other[at], one[at - 1 : at], one[at + 1 : at + 2]
    is_apart = not after.isalpha() and (not before.isalpha() or (marks == "AB" and before.islower()))
    return marks == "12" or (marks.upper() == "AB" and is_apart)


def stem(name: str) -> str:
    """A numbered name without its number, in small letters.

    >>> stem("Text_A"), stem("sentence2")
    ('text', 'sentence')
    """
    return re.sub(r"[_ -]?[12ABab]$", "", name.strip()).lower()
