"""Where a recipe's words lead: YAML text, files, folders of installed packages, other libraries' settings.

All of it without importing those libraries: `transformers` and `peft` take seconds, a misspelt key should
be refused in a fraction of one.
"""

from __future__ import annotations

import ast
import dataclasses
import glob
import importlib.util
import re
from collections.abc import Iterable
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml

from ..errors import ConfigError, did_you_mean

PACKAGE_PREFIX = "package:"
# Set by Trimtab from other parts of the recipe.
ELSEWHERE = {
    "train": {
        "output_dir": "output_dir",
        "seed": "seed",
        "data_seed": "seed",
        "resume_from_checkpoint": "--resume, on the command line",
    },
    "adapter": dict.fromkeys(("exclude_modules", "layers_to_transform", "layers_pattern", "where"), "where"),
}


def parse_yaml(text: str, what: str) -> Any:
    """YAML with floats as people write them: ``1e-3`` is a number, not a string (as in YAML 1.2)."""
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ConfigError(
            what,
            text if mark is None or "\n" not in text else "…",
            f"not YAML: {place}{getattr(error, 'problem', error)}",
        ) from None


class _Loader(yaml.SafeLoader):
    """YAML 1.2's idea of a number: ``1e-3`` is one, ``0110`` is text (a layer mask, not an octal). No key stands twice,
    where plain YAML would take the last one and say nothing."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[Any, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.value == "<<":
                continue
            if key.value in seen:
                problem = f"{key.value!r} stands twice, in line {seen[key.value]} and here; keep one of them"
                raise yaml.constructor.ConstructorError(problem=problem, problem_mark=key.start_mark)
            seen[key.value] = key.start_mark.line + 1
        return super().construct_mapping(node, deep)


_NUMBERS = {
    "tag:yaml.org,2002:int": r"[-+]?(?:0|[1-9][0-9]*)$",
    "tag:yaml.org,2002:float": r"[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?$"
    r"|[-+]?\.(?:inf|Inf|INF)$|\.(?:nan|NaN|NAN)$",
}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, regex) for tag, regex in resolvers if tag not in _NUMBERS]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, _regex in _NUMBERS.items():
    _Loader.add_implicit_resolver(_tag, re.compile(_regex), list("-+.0123456789"))


@cache
def _source(module: str) -> list[ast.stmt] | None:
    """What stands in a module's file: importing transformers or peft takes seconds, reading one file milliseconds.
    None if there is no source."""
    package, *rest = module.split(".")
    spec = importlib.util.find_spec(package)  # the top package only: this imports nothing
    places = list(spec.submodule_search_locations or ()) if spec else []
    if not places:
        raise ConfigError(package, None, f"the package {package!r} is not installed")
    path = Path(places[0], *rest).with_suffix(".py")
    return ast.parse(path.read_text(encoding="utf-8")).body if path.is_file() else None


@cache
def enum_values(module: str, name: str) -> tuple[str, ...]:
    """The words of an enumeration, read from source."""
    body = _source(module)
    if body is None:
        return tuple(member.value for member in getattr(import_module(module), name))
    [found] = (node for node in body if isinstance(node, ast.ClassDef) and node.name == name)
    values = (node.value for node in found.body if isinstance(node, ast.Assign))
    return tuple(value.value for value in values if isinstance(value, ast.Constant) and isinstance(value.value, str))


@cache
def dict_keys(module: str, name: str) -> tuple[str, ...]:
    """The keys of a dict that a module defines, read from source."""
    for node in _source(module) or ():
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name and isinstance(node.value, ast.Dict):
            return tuple(str(key.value) for key in node.value.keys if isinstance(key, ast.Constant))
    return tuple(getattr(import_module(module), name))


@cache
def dataclass_fields(module: str, name: str) -> dict[str, str]:
    """Field names and annotations of a dataclass and its bases, read from source."""
    body = _source(module)
    if body is None:
        found = getattr(import_module(module), name)
        return {field.name: str(field.type) for field in dataclasses.fields(found) if field.init}
    classes = {node.name: node for node in body if isinstance(node, ast.ClassDef)}
    fields: dict[str, str] = {}
    for base in classes[name].bases:
        if isinstance(base, ast.Name) and base.id in classes:
            fields |= dataclass_fields(module, base.id)
    for node in classes[name].body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            kind = ast.unparse(node.annotation)
            if "ClassVar" not in kind and not _is_not_init(node.value):
                fields[node.target.id] = kind
    return fields


def _is_not_init(value: ast.expr | None) -> bool:
    return isinstance(value, ast.Call) and any(
        keyword.arg == "init" and isinstance(keyword.value, ast.Constant) and keyword.value.value is False
        for keyword in value.keywords
    )


def refuse_if_elsewhere(section: str, key: str, value: Any) -> None:
    """Raises `ConfigError` for a key that Trimtab sets, naming the recipe's own."""
    place = ELSEWHERE[section].get(key)
    if place:
        where = "give" if place.startswith("--") else "the recipe's own key is"
        raise ConfigError(f"{section}.{key}", value, f"Trimtab sets this; {where} {place}")


def unknown_key(key: str, value: Any, known: Iterable[str]) -> ConfigError:
    """The error for a key nobody knows: names the nearest one, or lists them when few."""
    known = sorted(known)
    name = key.rpartition(".")[2]
    placed = [k for k in known if k.rpartition(".")[2] == name]
    near = f" Did you mean {' or '.join(map(repr, placed))}?" if placed else did_you_mean(name, known)
    listed = "" if near or len(known) > 20 else f" Known here: {', '.join(known)}."
    return ConfigError(key, value, f"no such key.{near}{listed}")


def find_file(key: str, text: str, folder: Path | None = None) -> str:
    """Absolute path of a file named in a recipe.

    Raises:
        ConfigError: it is neither below the current directory nor below the recipe's folder.
    """
    places = [Path(), *([folder] if folder else [])]
    for place in places:
        path = (place / Path(text).expanduser()).resolve()
        if path.is_file():
            return str(path)
    wanted = Path(text).expanduser()
    folders = [(place / wanted).parent for place in places]
    siblings = [file.name for folder in folders if folder.is_dir() for file in folder.iterdir()]
    raise ConfigError(key, text, f"no such file.{did_you_mean(wanted.name, siblings)}")


def find_rows(key: str, text: str, folder: Path | None = None) -> str:
    """Absolute path of a file, a folder or a pattern (``part-*.jsonl``) of a user's rows.

    Raises:
        ConfigError: as `find_file`, and for a pattern that fits no file.
    """
    if "://" in text:
        raise ConfigError(key, text, "is an address; download the file, or name a hub dataset in data.hub")
    for place in (Path(), *([folder] if folder else [])):
        path = place / Path(text).expanduser()
        if path.is_dir() or (glob.has_magic(text) and glob.glob(str(path), recursive=True)):
            return str(path.resolve())
    if glob.has_magic(text) and not Path(text).exists():
        raise ConfigError(key, text, "no file fits this pattern")
    return find_file(key, text, folder)


def find_model(text: str, folder: Path | None = None) -> str:
    """Absolute path of a model's folder or file; a hub id and a package's folder stay as they are.

    Raises:
        ConfigError: it reads as a path, and is not there.
    """
    if text.startswith(PACKAGE_PREFIX):
        return text
    looks_local = text.startswith((".", "/", "~")) or text.endswith(".gguf")
    for place in (Path(), *([folder] if folder else [])):
        path = place / Path(text).expanduser()
        if path.exists():
            return str(path.resolve())
    if looks_local:
        raise ConfigError("model.name_or_path", text, "no such file or folder")
    return text


def package_folder(text: str) -> Path:
    """``package:NAME/FOLDER`` -> the folder inside the installed package.

    Raises:
        ConfigError: the package is not installed, or holds no such folder.
    """
    package, _, inside = text.removeprefix(PACKAGE_PREFIX).partition("/")
    try:
        spec = importlib.util.find_spec(package)  # does not import it: what it depends on may not be there
    except (ImportError, ValueError):  # the package around it is missing, or there is no name at all
        spec = None
    if spec is None or not spec.submodule_search_locations:
        cure = f"the package is not installed: pip install {package.replace('_', '-')}"
        raise ConfigError("model.name_or_path", text, cure)
    root = Path(spec.submodule_search_locations[0])
    if not (root / inside).exists():
        raise ConfigError("model.name_or_path", text, f"the package {package!r} holds no {inside!r}")
    return root / inside
