"""Writes recipe_reference.md, every key of a recipe from the classes that read it, and the settings in methods/*.md.

    python docs/recipe_reference.py

Types, bounds and defaults are those of the schema; what a key means is the docstring below its field.
"""

from __future__ import annotations

import dataclasses
import re
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel, TypeAdapter
from pydantic.fields import FieldInfo
from sphinx.pycode import ModuleAnalyzer

from trimtab import BottleneckConfig, freeze, rank
from trimtab.app import recipe
from trimtab.app.catalogue import catalogue
from trimtab.app.tasks import TASKS
from trimtab.app.tasks.answering import Answering
from trimtab.registry import imported

PAGE = Path(__file__).with_name("recipe_reference.md")
METHODS = sorted(Path(__file__).with_name("methods").glob("*.md"))
SETTINGS = re.compile(r"(<!-- settings: (\w+) (\w+) -->\n).*?(<!-- end of settings -->)", re.DOTALL)
HEAD = """\
# Every key

Made from the code by `python docs/recipe_reference.py`. [Recipes](recipes.md) says how the keys go together, \
[Methods](methods.md) what the methods do, [Tasks](tasks.md) which rows a task reads.

A dash means that nothing is set: the key's own text says what happens then.
"""
_NEEDED = dataclasses.MISSING


def meaning(cls: type, key: str) -> str:
    """The docstring below a field, of the nearest class that has one."""
    for owner in cls.__mro__:
        if owner.__module__.startswith("trimtab"):
            found = ModuleAnalyzer.for_module(owner.__module__).find_attr_docs()
            if lines := found.get((owner.__name__, key)):
                return " ".join(" ".join(lines).split()).replace("``", "`")
    return ""


def kind(schema: dict[str, Any]) -> str:
    """A type in words, from its JSON schema."""
    if not schema:
        return "section"
    if "anyOf" in schema:
        parts = dict.fromkeys(kind(one) for one in schema["anyOf"] if one.get("type") != "null")
        return " or ".join(parts)
    if "enum" in schema or "const" in schema:
        return ", ".join(f"`{value}`" for value in schema.get("enum", [schema.get("const")]))
    name = {"string": "text", "integer": "whole number", "number": "number", "boolean": "true or false"}
    if schema.get("type") == "array":
        return f"list of {kind(schema['items'])}" if schema.get("items") else "list"
    if schema.get("type") == "object":
        return "keys and values"
    bounds = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
    limits = [f"{word} {schema[key]:g}" for key, word in bounds.items() if key in schema and abs(schema[key]) < 1e6]
    return " ".join([name.get(schema.get("type", ""), "any value"), *(", ".join(limits).split())])


def shown(value: Any) -> str:
    if value is _NEEDED:
        return "needed"
    if value is None or value in ((), [], {}, ""):
        return "—"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def row(key: str, schema: dict[str, Any], default: Any, text: str) -> str:
    cells = [f"`{key}`", kind(schema), shown(default), text]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def table(rows: Iterator[str]) -> str:
    return "\n".join(["| key | takes | default | means |", "|---|---|---|---|", *rows]) + "\n"


def section_rows(cls: type[BaseModel]) -> Iterator[str]:
    properties = cls.model_json_schema(mode="validation")["properties"]
    for key, field in cls.model_fields.items():
        default = _NEEDED if field.is_required() else field.get_default(call_default_factory=True)
        if section_class(field):
            yield row(key, {}, _NEEDED if default is _NEEDED else None, meaning(cls, key))
        else:
            yield row(key, properties[key], default, meaning(cls, key))


def setting_rows(cls: type, besides: type | None = None) -> Iterator[str]:
    """Of a method or a task, whose settings are the fields of a dataclass; those of another class are left out."""
    hints = typing.get_type_hints(cls)
    known = {field.name: field.default for field in dataclasses.fields(besides)} if besides else {}
    for field in dataclasses.fields(cls):
        if not field.init or field.name == "name" or (field.name in known and known[field.name] == field.default):
            continue
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        try:
            schema = TypeAdapter(hints[field.name]).json_schema()
        except Exception:  # a type of ours without a schema, such as a `Where`
            schema = {}
        yield row(field.name, schema, default, meaning(cls, field.name))


def section_class(field: FieldInfo) -> type[BaseModel] | None:
    choices = [field.annotation, *typing.get_args(field.annotation)]
    return next((c for c in choices if isinstance(c, type) and issubclass(c, BaseModel)), None)


def page() -> str:
    parts = [HEAD, "## The recipe\n"]
    sections = {name: section_class(field) for name, field in recipe.Recipe.model_fields.items()}
    parts.append(
        "Sections: "
        + ", ".join(f"[`{name}`](#{name})" for name in [*(n for n, c in sections.items() if c), "train", "rates"])
        + ".\n"
    )
    parts.append(table(section_rows(recipe.Recipe)))
    ours = {axis: [e for e in catalogue() if e.axis == axis and not e.summary.startswith("from ")] for axis in
            ("task", "adapter", "where", "rank", "freeze", "rates")}  # fmt: skip
    for name, cls in sections.items():
        if cls is None:
            continue
        parts.append(f"## {name}\n")
        if cls.__doc__ and "bare word" not in cls.__doc__ and cls.__doc__ != BaseModel.__doc__:
            parts.append(" ".join(cls.__doc__.split()).replace("``", "`") + "\n")
        if cls.main_key:
            parts.append(f"A bare value stands for `{cls.main_key}`.\n")
        parts.append(table(section_rows(cls)))
        if name == "adapter":
            parts.append(adapter_words())
        if name == "where":
            own = {e.name: ", ".join(f"`{key}`" for key in e.defaults) or "—" for e in ours["where"]}
            parts.append("| method | reads, beside `ratio`, `count` and `seed` |\n|---|---|")
            parts.append("\n".join(f"| `{method}` | {keys} |" for method, keys in own.items()) + "\n")
        if name in ("rank", "freeze"):
            axis = {"rank": rank, "freeze": freeze}[name]
            for entry in ours[name]:
                parts.append(f"### {name}: {entry.name}\n\n{entry.summary}. {entry.paper}.\n")
                parts.append(table(setting_rows(axis.load(entry.name))))
        if name == "task":
            seen: dict[type, list[str]] = {}
            for task, target in TASKS.items():
                seen.setdefault(imported("task.name", task, target), []).append(task)
            for maker, names in seen.items():
                writes = issubclass(maker, Answering)
                keys = table(setting_rows(maker, Answering if writes else None))
                more = "Beside what all tasks that write have:\n\n" if writes else ""
                parts.append(f"### task: {', '.join(names)}\n\n{more}{keys}")
            parts.append(f"### What all tasks that write have\n\n{table(setting_rows(Answering))}")
    parts.append("## train\n\nAny field of transformers' `TrainingArguments`, by its own name.\n")
    parts.append("## rates\n\nA multiple of `train.learning_rate` for each role.\n\n| role | holds |\n|---|---|")
    parts.append("\n".join(f"| `{e.name}` | {e.summary} |" for e in ours["rates"]) + "\n")
    return re.sub(r"\n{3,}", "\n\n", "\n".join(parts))


def adapter_words() -> str:
    lines = ["| type | PEFT's config | keys of ours that it takes |", "|---|---|---|"]
    for name, (_module, config, words) in recipe.ADAPTERS.items():
        lines.append(f"| `{name}` | `{config}` | {', '.join(f'`{word}`' for word in words) or '—'} |")
    return "\n".join(lines) + "\n\nAny other field of that config goes by its own name.\n"


def method_page(text: str) -> str:
    """A page of a method, with the tables between its marks made anew."""
    return SETTINGS.sub(lambda found: f"{found[1]}\n{method_settings(found[2], found[3])}\n{found[4]}", text)


def method_settings(axis: str, name: str) -> str:
    if axis in ("rank", "freeze"):
        return table(setting_rows({"rank": rank, "freeze": freeze}[axis].load(name)))
    if axis == "where":
        keys = ["ratio", "count", *next(e for e in catalogue() if (e.axis, e.name) == (axis, name)).defaults, "seed"]
        return table(line for line in section_rows(recipe.Where) if line.split("`")[1] in keys)
    if name == "lora":
        return table(line for line in section_rows(recipe.Adapter) if line.split("`")[1] != "type")
    hints = typing.get_type_hints(BottleneckConfig)
    own = [f for f in dataclasses.fields(BottleneckConfig) if f.name in vars(BottleneckConfig)["__annotations__"]]
    keys = [f for f in own if f.name not in ("target_modules", "exclude_modules", "layers_to_transform", "where")]
    schemas = {f.name: TypeAdapter(hints[f.name]).json_schema() for f in keys}
    return table(row(f.name, schemas[f.name], f.default, f"{f.metadata['help']}.") for f in keys)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    for one in METHODS:
        one.write_text(method_page(one.read_text("utf-8")), encoding="utf-8")
    sys.stdout.write(f"{PAGE}\n")
