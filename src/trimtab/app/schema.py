"""A JSON schema of the recipe, for editors: what they complete, explain and underline.

Keys and their docstrings are `recipe.Recipe`'s own; values that are names come from the tables that a run reads. What
a schema cannot tell (a column, a layer, a file) is told by `trimtab plan`.
"""

from __future__ import annotations

from typing import Any

from .. import freeze, rank, where
from . import recipe as recipes
from . import trainer_settings
from .adapter_kinds import ADAPTERS
from .lookup import ELSEWHERE, dataclass_fields
from .tasks import known_tasks

DIALECT = "https://json-schema.org/draft/2020-12/schema"


def recipe_schema() -> dict[str, Any]:
    """The schema, as JSON data."""
    made = recipes.Recipe.model_json_schema()
    sections = made["$defs"]
    for section in (made, *sections.values()):
        _in_one_line(section)
    sections["Task"]["properties"]["name"].update(_names(known_tasks()))
    sections["Where"]["properties"]["method"].update(_names(where.available()))
    sections["Rank"]["properties"]["method"].update(_names(rank.available()))
    sections["Freeze"]["properties"]["method"].update(_names(freeze.available()))
    sections["Adapter"]["properties"]["type"].update(enum=list(ADAPTERS))
    known = sections["Adapter"]["properties"]
    sections["Adapter"]["additionalProperties"] = True  # fields of each type's config; those of LoRA are named
    words = ADAPTERS["lora"][2]
    for name, kind in dataclass_fields(*ADAPTERS["lora"][:2]).items():
        if name not in {*known, *words.values(), *ELSEWHERE["adapter"]}:
            known[name] = {"description": f"{kind} (of PEFT's LoraConfig)"}
    made["properties"]["train"].update(properties=dict(_training()), additionalProperties=False)
    for section, model in _sections().items():  # a bare word stands for a section's main key
        if section in sections and (model.main_key or model is recipes.EarlyStopping):
            bare = {"type": "integer"} if model is recipes.EarlyStopping else _bare(sections[section], model)
            whole = {key: value for key, value in sections[section].items() if key not in ("title", "description")}
            told = {key: sections[section][key] for key in ("title", "description") if key in sections[section]}
            sections[section] = {**told, "anyOf": [whole, bare]}
    return {"$schema": DIALECT, **made, "title": "Trimtab recipe"}


def _sections() -> dict[str, Any]:
    found = (one for one in vars(recipes).values() if isinstance(one, type) and issubclass(one, recipes.Section))
    return {one.__name__: one for one in found}


def _bare(section: dict[str, Any], model: Any) -> dict[str, Any]:
    main = section["properties"][model.main_key]
    return {key: value for key, value in main.items() if key not in ("default", "title")}


def _names(known: Any) -> dict[str, Any]:
    """Completed by editors, while ``module:function`` stays allowed."""
    return {"anyOf": [{"enum": list(known)}, {"type": "string", "pattern": ":"}]}


def _in_one_line(section: dict[str, Any]) -> None:
    """Sentences as an editor shows them."""
    for below in (section, *section["properties"].values()):
        if "description" in below:
            below["description"] = " ".join(below["description"].replace("``", "`").split())
    for below in section["properties"].values():
        below.pop("title", None)


def _training() -> Any:
    for name, kind in trainer_settings.fields().items():
        if name in ELSEWHERE["train"]:
            continue
        words = trainer_settings.words(name)
        yield name, {"enum": [*words, False] if "no" in words else list(words)} if words else {"description": kind}
