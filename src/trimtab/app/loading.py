"""How a run's adapter is loaded without Trimtab: the class names beside it, and the lines that do it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ..errors import DataError
from .planning import model_spec

if TYPE_CHECKING:
    from .job import Job
    from .runfolder import RunFolder

LABELS = "labels.json"
"""Beside the adapter. Not config.json: transformers would take the folder for a whole model."""


ORIGIN = "trimtab.json"
"""Beside what was exported."""


def save_labels(task: Any, folder: Path) -> None:
    """The class names in the words of a model's config: ``id2label`` and ``label2id``."""
    found = task.model_kwargs()
    if "id2label" in found:
        words = {"id2label": found["id2label"], "label2id": found["label2id"]}
        (folder / LABELS).write_text(json.dumps(words, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def saved_labels(folder: Path) -> list[str] | None:
    """The class names in the order of their ids; None where the folder has none.

    Raises:
        DataError: the file is damaged.
    """
    file = folder / LABELS
    if not file.is_file():
        return None
    try:
        ids = json.loads(file.read_text(encoding="utf-8"))["label2id"]
        return sorted(ids, key=ids.__getitem__)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        text = f"{type(error).__name__}: {error}"
        raise DataError(f"{file}: damaged ({text}); put back label2id, each class's name with its number") from None


def save_origin(place: Path, run: RunFolder, form: str, steps: Mapping[str, int]) -> None:
    """By which an export is known again: its form, its run, and how far the training had come."""
    facts = {"format": form, "run": run.path.resolve().name, "folder": _place_of(run), **steps}
    (place / ORIGIN).write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _place_of(run: RunFolder) -> str:
    """By which a run is told from others, without saying where it lies."""
    return hashlib.sha256(str(run.path.resolve()).encode()).hexdigest()[:16]


def origin(place: Path) -> dict[str, Any]:
    """What `save_origin` wrote; empty where there is none that can be read, as in an earlier version's folder."""
    try:
        found = json.loads((place / ORIGIN).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def is_export(place: Path, run: RunFolder, form: str) -> bool:
    """Whether a folder holds this run's export of this form."""
    return {"format": form, "folder": _place_of(run)}.items() <= origin(place).items()


def lines(job: Job, folder: RunFolder, steps: Mapping[str, int]) -> str:
    """Python that loads the run's model as it is after these steps; empty where the base has no checkpoint, or nothing
    of these steps was exported."""
    auto, settings = job.task.auto_class, job.recipe.model
    reader = "AutoProcessor" if job.task.tokenizer_class == "AutoProcessor" else "AutoTokenizer"

    def is_there(place: Path) -> bool:  # an export is of the steps that the run had come to then
        return place.is_dir() and origin(place).get("step") == steps.get("step")

    if is_there(folder.merged):
        where = repr(str(folder.merged.resolve()))
        return "\n".join(
            (
                "import transformers",
                f"model = transformers.{auto}.from_pretrained({where})",
                f"tokenizer = transformers.{reader}.from_pretrained({where})",
            )
        )
    if settings.name_or_path is None or not is_there(folder.adapter):
        return ""
    return adapter_lines(job, None, str(folder.adapter.resolve()))


def adapter_lines(job: Job, base: str | None, adapter: str) -> str:
    """The same for an adapter that may lie elsewhere; empty where the base has no checkpoint.

    Args:
        base: what to load the base model from; None is where this machine has it.
        adapter: where the adapter lies; with a ``base`` it may not be here, so class names are written out.
    """
    from .models import overrides_of, source_of

    auto, settings = job.task.auto_class, job.recipe.model
    if settings.name_or_path is None:
        return ""
    reader = "AutoProcessor" if job.task.tokenizer_class == "AutoProcessor" else "AutoTokenizer"
    source, kwargs = source_of(model_spec(job.recipe))
    if not settings.trust_remote_code:
        del kwargs["trust_remote_code"]
    if settings.dtype:
        kwargs["dtype"] = settings.dtype
    labels = job.task.model_kwargs()
    kwargs |= {key: value for key, value in overrides_of(model_spec(job.recipe)).items() if key not in labels}
    if job.has_other_head:
        kwargs["ignore_mismatched_sizes"] = True
    given = [repr(base or source), *(f"{key}={value!r}" for key, value in kwargs.items())]
    if settings.quantization is not None:  # as it was trained: with the new head in full precision
        left_whole = cast(Any, job.model).config.quantization_config.llm_int8_skip_modules
        packing = settings.quantization | {"llm_int8_skip_modules": left_whole}
        packed = ", ".join(f"{key}={value!r}" for key, value in packing.items())
        given.append(f"quantization_config=transformers.BitsAndBytesConfig({packed})")
    where = repr(adapter)
    needs_trimtab = job.recipe.adapter.type == "bottleneck"
    out = ["import json, peft, transformers"]
    if "id2label" in labels:
        ids = f"json.load(open({str(Path(adapter) / LABELS)!r}))['label2id']" if base is None else labels["label2id"]
        out.append(f"labels = {ids}")
        given += ["label2id=labels", "id2label={i: name for name, i in labels.items()}"]
    else:
        given += [f"{key}={value!r}" for key, value in labels.items()]
    if needs_trimtab:
        out.append("from trimtab import BottleneckConfig  # PEFT then knows this kind of adapter")
    out += [
        f"base = transformers.{auto}.from_pretrained({', '.join(given)})",
        f"model = peft.PeftModel.from_pretrained(base, {where})",
        f"tokenizer = transformers.{reader}.from_pretrained({where})",
    ]
    if "json.load" not in "".join(out[1:]):
        out[0] = out[0].replace("json, ", "")
    return "\n".join(out)
