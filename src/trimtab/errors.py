"""Every error that a user can cause, in one tree.

TrimtabError                  one line: key, value found, what would work
├── ConfigError               a setting is wrong, alone or together with another
│   ├── BudgetError           no setting within the limits meets the budget
│   └── RecipeError           several settings that are wrong each by itself, one line each
├── DataError                 a file, a column or a value in the data is wrong
├── ModelError                the model has no such module, or cannot carry what was asked
├── SelectionError            scores of layers or of ranks cannot be computed or ranked
├── CheckpointError           a checkpoint is incomplete, damaged, or belongs to another run
├── ExportError               an adapter has no such form
├── MissingExtraError         what was asked for needs packages that an extra of Trimtab brings
├── StaleAdapterError         tensors were replaced under a running controller
└── DisagreementError         processes reached different decisions
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class TrimtabError(Exception):
    """Base of all errors a user can cause; the command line prints it as one line and exits with 2."""


class ConfigError(TrimtabError, ValueError):
    """A setting that cannot work.

    Args:
        key: dotted name of the setting, as in the recipe (``rank.target_r``).
        value: what was found.
        cure: what would work.
    """

    def __init__(self, key: str, value: object = None, cure: str = "") -> None:
        self.key, self.value, self.cure = key, value, cure
        super().__init__(f"{key}={value!r}: {cure}" if cure else key)

    def __reduce__(self) -> tuple:  # keeps the three parts when the error crosses a process boundary
        return type(self), (self.key, self.value, self.cure)


class BudgetError(ConfigError):
    """No setting within the recipe's limits meets the budget; the message names the smallest that does."""


class RecipeError(ConfigError):
    """Several settings that are wrong each by itself; the message has a line for each."""

    def __init__(self, errors: Sequence[ConfigError]) -> None:
        super().__init__(errors[0].key, errors[0].value, errors[0].cure)
        self.errors = tuple(errors)
        self.args = ("\n".join(map(str, errors)),)

    def __reduce__(self) -> tuple:
        return type(self), (self.errors,)


class DataError(TrimtabError, ValueError):
    """A data file, column or value is wrong."""


class ModelError(TrimtabError, ValueError):
    """The model lacks what was asked for, or cannot carry it."""


class SelectionError(TrimtabError, ValueError):
    """Scores of layers or of ranks cannot be computed or compared."""


class CheckpointError(TrimtabError, RuntimeError):
    """A checkpoint is incomplete, damaged, or belongs to another run."""


class ExportError(TrimtabError, ValueError):
    """An adapter cannot take the asked form; the message says why."""


class MissingExtraError(TrimtabError, ImportError):
    """What was asked for needs packages that an extra of Trimtab brings; the message is the line that installs them."""


class StaleAdapterError(TrimtabError, RuntimeError):
    """Tensors were replaced under a running controller, so its state no longer describes them."""


class DisagreementError(TrimtabError, RuntimeError):
    """Processes reached different decisions; both plans are in the message."""


APP = ("click", "datasets", "jinja2", "plotly", "pydantic", "rich", "scipy", "sklearn", "yaml")
"""What `trimtab[app]` brings, by the names that are imported; nothing outside `trimtab.app` needs them."""


def missing_extra(wanted: str, error: ModuleNotFoundError) -> MissingExtraError | None:
    """The error to raise instead, if the module that was not found is one that `trimtab[app]` brings.

    Args:
        wanted: what needed it, as the message's first words.
    """
    package = (error.name or "").split(".")[0]
    if package not in APP:
        return None
    return MissingExtraError(f"{wanted} needs the package {package}: pip install 'trimtab[app]'")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """``" Did you mean 'query'?"`` for the nearest known name, or an empty string.

    >>> did_you_mean("qurey", ["query", "key", "value"])
    " Did you mean 'query'?"
    """
    spelt = {one.lower(): one for one in known}
    near = difflib.get_close_matches(name.lower(), list(spelt), n=1)
    return f" Did you mean {spelt[near[0]]!r}?" if near else ""
