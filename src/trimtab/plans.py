"""What is decided, as plain data: the chosen layers, the sites, the budget, the plan.

No torch here, so that reports and the command line can read run folders instantly. Everything is
frozen and goes to JSON and back.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field
from typing import Any

from .errors import ConfigError


@dataclass(frozen=True)
class Where:
    """Which blocks of a model are adapted.

    ``stacks`` maps a stack's path below the backbone (``"encoder.layer"``, ``"language_model.layers"``)
    to a 0/1 string, block 0 first. An encoder-decoder has two stacks; everything outside the named
    stacks (a vision tower, a pooler, a head) is left alone.

    >>> Where("mask", {"encoder.layer": "0110"}).layers
    (1, 2)
    """

    method: str
    stacks: dict[str, str]
    scores: dict[str, Any] | None = None
    """`LayerScores.to_json()` of the scores the choice was made from, if any."""

    def __post_init__(self) -> None:
        if not self.stacks:
            raise ConfigError("where", self.stacks, "at least one stack of layers is needed")
        for path, mask in self.stacks.items():
            if not mask or set(mask) - {"0", "1"}:
                raise ConfigError(f"where.mask[{path}]", mask, "one character per layer, each 0 or 1")
        if not any("1" in mask for mask in self.stacks.values()):
            raise ConfigError(
                "where.mask",
                self.mask if len(self.stacks) == 1 else self.stacks,
                "at least one layer must be chosen (a '1')",
            )

    @property
    def mask(self) -> str:
        """The 0/1 string of the only stack. Raises `ConfigError` when there are several."""
        if len(self.stacks) > 1:
            raise ConfigError("where.mask", list(self.stacks), "several stacks; use .stacks[path]")
        return next(iter(self.stacks.values()))

    @property
    def layers(self) -> tuple[int, ...]:
        """Indices of the chosen blocks of the only stack. Raises `ConfigError` when there are several."""
        return tuple(i for i, c in enumerate(self.mask) if c == "1")

    @property
    def layer_scores(self) -> dict[str, list[float | None]]:
        """What each layer was chosen by, for each stack; None where it is undefined, and no stack without a measure."""
        stacks = (self.scores or {}).get("stacks") or {}
        return {path: list(found.get("importance", found.get("cka", ()))) for path, found in stacks.items()}

    @property
    def measure(self) -> str:
        """What those numbers are called: CKA, or as the method; empty where there are none."""
        return "" if not self.layer_scores else "CKA" if self.method == "cka" else self.method

    @property
    def outside(self) -> str:
        """A regex that full-matches every module name outside the chosen blocks (a chosen block itself is inside).

        Goes into PEFT's ``exclude_modules``, which every PEFT version that Trimtab supports applies
        before any kind of ``target_modules`` (list, regex, ``"all-linear"``, or PEFT's own default).
        """
        chosen = []
        for path, mask in self.stacks.items():
            indices = "|".join(str(i) for i, c in enumerate(mask) if c == "1")
            if indices:
                chosen.append(rf"{re.escape(path)}\.(?:{indices})(?:\.|$)")
        return rf"(?!(?:.*\.)?(?:{'|'.join(chosen)})).*"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Where:
        return cls(data["method"], dict(data["stacks"]), data.get("scores"))


@dataclass(frozen=True)
class Site:
    """One linear that can carry an adapter.

    ``name`` is the module's full name in the base model; ``stack`` and ``block`` say which repeated
    block it sits in (``None`` outside of one); ``kind`` is its name inside the block
    (``attention.self.query``).
    """

    name: str
    in_features: int
    out_features: int
    stack: str | None = None
    block: int | None = None
    kind: str = ""


@dataclass(frozen=True)
class Budget:
    """A limit on trainable adapter parameters (heads and `modules_to_save` excluded)."""

    final_params: int | None = None
    average_params: int | None = None


@dataclass(frozen=True)
class SitePlan:
    """A site with what is decided for it. ``trainable_params`` counts at the start of training."""

    site: Site
    r: int
    trainable_params: int
    final_r: int | None = None

    @property
    def rank_left(self) -> int:
        """The rank at the end, or at the start where that is all that is known."""
        return self.r if self.final_r is None else self.final_r


@dataclass(frozen=True)
class Plan:
    """Everything that is decided, before training (predicted) or after it (final).

    ``params`` holds ``initial``, ``final`` and ``average`` trainable adapter parameters; ``schedule``
    rows are ``{"step": …, "event": …, …}`` in real optimizer steps.
    """

    model: str
    sites: tuple[SitePlan, ...]
    params: dict[str, float]
    where: Where | None = None
    schedule: tuple[dict[str, Any], ...] = ()
    optimizer_bytes: int = 0
    notes: tuple[str, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Plan:
        data = dict(data)
        data["sites"] = tuple(SitePlan(**{**s, "site": Site(**s["site"])}) for s in data["sites"])
        data["where"] = Where.from_json(data["where"]) if data.get("where") else None
        data["schedule"] = tuple(data.get("schedule", ()))
        data["notes"] = tuple(data.get("notes", ()))
        return cls(**data)
