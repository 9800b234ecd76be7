"""What a recipe will train, before anything is loaded: sites, parameters, memory, schedule.

The model is built on the meta device from its config alone, so a 7B plan takes seconds on a laptop.
Parameters are those of adapters; a new head, which every method trains alike, is reported apart.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..budget import figures, solve
from ..errors import BudgetError, ConfigError
from ..plans import Plan, Site, SitePlan, Where
from ..train.rates import check_roles
from . import about
from . import recipe as recipes
from .parameters import adapted_sites, bias_params, head_params, roles_of, site_params, token_params, vectors_of
from .peft_config import (
    adapter_config,
    budget_of,
    choose_without_data,
    free_settings,
    layers_to_choose_from,
    reads_rows,
    settings_of,
)
from .recipe import Recipe
from .report.words import count
from .rows import load_rows, rows_known, rows_on_the_hub

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import nn

    from .tasks import Task

# Bytes of optimizer state per trained parameter. Adapters train in float32 whatever the model's dtype is.
_STATE_BYTES = {"sgd": 0, "8bit": 2, "adafactor": 0, "rmsprop": 4, "adagrad": 4}
_ADAM_STATE_BYTES = 8


@dataclass(frozen=True)
class Horizon:
    """Length of a run in optimizer steps."""

    total_steps: int
    steps_per_epoch: int


def plan(
    source: Recipe | Mapping[str, Any] | str | Path | nn.Module,
    config: PeftConfig | None = None,
    overrides: Iterable[str] = (),
    *,
    total_steps: int | None = None,
    steps_per_epoch: int | None = None,
) -> Plan:
    """Dry run of a recipe, or of a model with the config that `peft.get_peft_model` would get.

    Args:
        source: a recipe (file, run folder, dict or `Recipe`), or a base model, on any device.
        config: the PEFT config, with a model.
        overrides: ``key=value`` texts, with a recipe.
        total_steps, steps_per_epoch: length of the run, where it does not follow from the recipe.
    Raises:
        TrimtabError: whatever would stop the run, as far as it shows without weights.
    """
    given = Horizon(total_steps, steps_per_epoch or total_steps) if total_steps else None
    if config is not None:
        return plan_model(source, config, given)  # type: ignore[arg-type]
    if not isinstance(source, (Recipe, Mapping, str, Path)):
        raise ConfigError("config", None, "with a model goes the config that peft.get_peft_model would get")
    chosen = source if isinstance(source, Recipe) else recipes.load(source, overrides)  # type: ignore[arg-type]
    return plan_recipe(chosen, given)


def plan_recipe(
    recipe: Recipe,
    horizon: Horizon | None = None,
    task: Task | None = None,
    *,
    with_memory: bool = False,
    processes: int = 1,
    strategy: str = "ddp",
) -> Plan:
    """The plan of a recipe.

    Args:
        horizon: length of the run; else it is counted from local rows.
        task: the recipe's task, if it has been made (and has seen its data).
        with_memory: forecast the memory of a step, too: ``settings["memory"]``.
        processes, strategy: with several, the run's length, and what each holds and sends: ``settings["processes"]``;
            see `memory.over_processes`.
    """
    from ..host.sites import HEADS
    from . import models
    from .tasks import get_task

    rows = None
    if task is None and recipe.task is not None:
        task = get_task(recipe.task.model_dump())
        rows = rows_on_the_hub(recipe, task)
        if recipe.data.has_own:  # some tasks learn their labels here
            rows = rows_known(task, load_rows(recipe, task))
    notes: list[str] = []
    horizon = horizon or horizon_of(recipe, rows, processes if processes > 1 else None)
    is_packed = horizon is None and recipe.data.has_own and not getattr(task, "counts_rows", True)
    if horizon is None and task is not None:
        cure = "texts are cut into rows with the tokenizer at hand" if is_packed else "give data.train"
        notes.append(
            "the number of training rows is not known here, so the schedule has no steps yet "
            f"({cure}, or train.max_steps)"
        )
    model_config = models.load_config(model_spec(recipe), task)
    auto_class = task.auto_class if task else auto_class_of(model_config)
    model = models.meta_model(model_config, auto_class, recipe.model.trust_remote_code)
    task_type = task.task_type if task else None
    # A pretrained language model has no head for these tasks: without its weights, all outside the backbone is new.
    head = _outside_backbone(model) if task_type in HEADS else ()
    if not is_packed or not (recipe.rank or recipe.freeze):  # else the budget is met once the rows are cut
        recipe = with_layer_ratio(recipe, model, horizon, task_type, head)
    choice = _where_without_data(recipe, model, notes, task_type, head)
    peft_config = adapter_config(recipe, model, where=choice, task_type=task_type, modules_to_save=head)
    made = plan_of_run(recipe, model, peft_config, horizon, rows)
    if recipe.where is not None and reads_rows(recipe.where):
        made = replace(made, where=None, settings={**made.settings, "layers_undecided": True})
    if with_memory or processes > 1:
        found = _memory(recipe, model, peft_config, task, processes, strategy)
        made = replace(made, settings={**made.settings, **found})
        if not found:
            notes.append("the memory of a step is not forecast for this kind of model")
    return replace(made, notes=(*notes, *made.notes))


_USUAL_TOKENS = 512
"""Of a row where neither the recipe nor the model says fewer."""


def _memory(
    recipe: Recipe, model: Any, config: PeftConfig, task: Task | None, processes: int, strategy: str
) -> dict[str, Any]:
    """What the plan says of memory, of one process and of several; nothing where it is not forecast."""
    import torch

    from .memory import forecast, over_processes

    positions = getattr(model.config, "max_position_embeddings", None) or _USUAL_TOKENS
    tokens = getattr(task, "max_length", None) or min(positions, _USUAL_TOKENS)
    loaded = recipe.model.dtype or str(getattr(model.config, "dtype", None) or "float32").removeprefix("torch.")
    if recipe.model.dtype is None and loaded == "float16":
        loaded = "float32"  # as `models.load_model` does
    uses_cpu = bool(recipe.train.get("use_cpu")) or not torch.cuda.is_available()
    found = forecast(
        model,
        config,
        batch=int(recipe.train.get("per_device_train_batch_size", 8)),
        tokens=int(tokens),
        state_bytes=_state_bytes(str(recipe.train.get("optim", "adamw"))),
        dtype=getattr(torch, loaded, torch.float32),
        quantization=recipe.model.quantization,
        is_checkpointing=bool(recipe.train.get("gradient_checkpointing")),
        device="cpu" if uses_cpu else "cuda",
    )
    if found is None:
        return {}
    micro_batches = int(recipe.train.get("gradient_accumulation_steps") or 1)
    several = {"processes": over_processes(found, processes, strategy, micro_batches)} if processes > 1 else {}
    return {"memory": found.to_json(), **several}


def with_layer_ratio(
    recipe: Recipe,
    model: nn.Module,
    horizon: Horizon | None,
    task_type: str | None = None,
    modules_to_save: tuple[str, ...] = (),
) -> Recipe:
    """The recipe with the share of layers that its budget allows, where the budget may choose it.

    Raises:
        ConfigError: a budget whose figure needs the length of the run, and it is not known.
        BudgetError: no choice meets the budget; the smallest number that can be met is in the message.
    """
    from ..host.adapted import site_rank
    from ..host.sites import find_sites

    budget = budget_of(recipe)
    if budget is None or recipe.adapter.type != "lora":
        return recipe
    if horizon is None and recipe.rank is None and recipe.freeze is None:
        horizon = Horizon(1, 1)  # nothing changes over the run
    if horizon is None:
        cure = "needs the length of the run: give data.train, or train.max_steps"
        raise ConfigError("budget", recipe.budget.model_dump(exclude_none=True) if recipe.budget else None, cure)
    free = free_settings(recipe)
    if "where.ratio" not in free or recipe.where is None:
        return recipe
    config = adapter_config(recipe, model, task_type=task_type, modules_to_save=modules_to_save)
    sites = find_sites(model, config)
    blocks = _blocks(sites)
    least = 1 / max(map(len, blocks.values()))
    shares = {n / len(layers) for layers in blocks.values() for n in range(1, len(layers) + 1)}
    free_of = {path: len(layers - _excluded(recipe.where, path)) for path, layers in blocks.items()}
    fit = [s for s in shares if all(math.floor(s * len(blocks[p]) + 1e-9) <= n for p, n in free_of.items())]
    choice = solve(
        budget,
        sites,
        {site.name: site_rank(site, config) for site in sites},
        **settings_of(recipe),
        ratio=(least, max(fit, default=least)),
        total_steps=horizon.total_steps,
        steps_per_epoch=horizon.steps_per_epoch,
        free=free,
        vectors=vectors_of(config),
        beside=token_params(model, config),
    )
    return recipe.model_copy(update={"where": recipe.where.model_copy(update={"ratio": choice.ratio})})


def _excluded(where: recipes.Where, path: str) -> set[int]:
    """Layers of a stack that are not to be chosen. CKA may have to leave out a first one, too, that sees the same
    vector in every row."""
    given = where.exclude
    own = set() if given == "auto" else set(given.get(path, ()) if isinstance(given, dict) else given)
    return own | {0} if where.method == "cka" else own


def _blocks(sites: list[Site]) -> dict[str, set[int]]:
    found: dict[str, set[int]] = {}
    for site in sites:
        if site.stack is not None and site.block is not None:
            found.setdefault(site.stack, set()).add(site.block)
    return found


def plan_of_run(
    recipe: Recipe, model: nn.Module, config: PeftConfig, horizon: Horizon | None, rows: int | None = None
) -> Plan:
    """The plan of a recipe whose model and config are made.

    Raises:
        BudgetError: the recipe's budget is not met.
    """
    check_roles(recipe.rates or {}, roles_of(model, config))
    made = plan_model(model, config, horizon, optim=str(recipe.train.get("optim", "adamw")))
    kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    settings = {"recipe": recipe.model_dump(mode="json", exclude_none=True), "rows": rows, **made.settings}
    notes = (*made.notes, *_rates_in_words(recipe))
    made = replace(made, model=recipe.model.name_or_path or kind, settings=settings, notes=notes)
    _check_budget(recipe, made)
    return made


def plan_model(model: nn.Module, config: PeftConfig, horizon: Horizon | None = None, optim: str = "adamw") -> Plan:
    """The plan for a base model and a PEFT config.

    Raises:
        ModelError: the config's targets match nothing in the model.
    """
    from ..host.sites import base_of
    from ..rank.base import starter_of

    where = getattr(config, "where", None)
    sites, ranks, own_costs = adapted_sites(model, config)
    notes: list[str] = []
    if own_costs is not None:
        costs = own_costs
        params, schedule = _constant(sum(costs.values())), tuple[dict[str, Any], ...]()
    elif config.peft_type == "VERA":  # one frozen pair shared by all sites: only two vectors train at each
        costs = {site.name: ranks[site.name] + site.out_features for site in sites}
        params, schedule = _constant(sum(costs.values())), tuple[dict[str, Any], ...]()
    else:
        methods: dict[str, Any] = {axis: getattr(config, axis, None) for axis in ("rank", "freeze")}
        more: dict[str, Any] = {"vectors": vectors_of(config), "beside": token_params(model, config)}
        budget, rank_params = getattr(config, "budget", None), None
        if budget is not None and horizon is not None:
            choice = solve(
                budget,
                sites,
                ranks,
                **methods,
                ratio=None,
                total_steps=horizon.total_steps,
                steps_per_epoch=horizon.steps_per_epoch,
                free=config.budget_frees,  # type: ignore[attr-defined]
                **more,
            )
            methods, rank_params = {"rank": choice.rank, "freeze": choice.freeze}, choice.rank_params
            notes.extend(choice.explanation)
        costs = {site.name: site_params(site, ranks[site.name], config, **methods) for site in sites}
        initial = sum(costs.values()) + more["beside"]
        params, schedule = _predicted(sites, ranks, initial, horizon, **methods, rank_params=rank_params, **more)
    adapts = getattr(config, "is_adaptive", False)
    if hasattr(config, "idle_layers") and (idle := config.idle_layers(base_of(model))):
        notes.append(idle)
    if (starter := starter_of(config)) is not None:
        notes.append(f"{_RANKS_OF} {starter.method} to say, from training rows; counted here: those of adapter.r")
    head = head_params(model, config)
    if head:
        notes.append(f"the head (modules_to_save) trains {count(head)} parameters more, in every method alike")
    if biases := bias_params(model, config, sites):
        notes.append(f"bias={config.bias} trains {count(biases)} of the base's own parameters, too")  # type: ignore[attr-defined]
    if adapts and horizon is None:
        notes.append("final and average parameters need the length of the run: they are those of the start here")
    rows = [SitePlan(site, ranks[site.name], costs[site.name], None if adapts else ranks[site.name]) for site in sites]
    return Plan(
        model=getattr(getattr(model, "config", None), "name_or_path", "") or type(model).__name__,
        sites=tuple(rows),
        params=params,
        where=where,
        schedule=schedule,
        optimizer_bytes=(int(params["initial"]) + head) * _state_bytes(optim),
        notes=tuple(notes),
        settings={"total_steps": horizon.total_steps, "steps_per_epoch": horizon.steps_per_epoch} if horizon else {},
    )


_RANKS_OF = "which ranks is for"


def with_initial_ranks(planned: Plan, started: Mapping[str, Any], config: PeftConfig, horizon: Horizon | None) -> Plan:
    """The plan with the ranks that a probe chose, once it has; ``settings["start"]`` keeps them, and how.

    Args:
        planned: that of the ranks in the config.
        started: `trimtab.train.initialize.Started` as JSON.
    """
    ranks = started["ranks"]
    sites = [
        replace(p, r=ranks[p.site.name], trainable_params=site_params(p.site, ranks[p.site.name], config))
        for p in planned.sites
    ]
    notes = (started["told"], *(note for note in planned.notes if not note.startswith(_RANKS_OF)))
    if getattr(config, "budget", None) is None:
        beside = int(planned.params["initial"]) - sum(p.trainable_params for p in planned.sites)
        initial = sum(p.trainable_params for p in sites) + beside
        more: dict[str, Any] = {axis: getattr(config, axis, None) for axis in ("rank", "freeze")}
        more |= {"vectors": vectors_of(config), "beside": beside}
        params, schedule = _predicted([p.site for p in sites], ranks, initial, horizon, **more)
        planned = replace(planned, params=params, schedule=schedule)
    return replace(planned, sites=tuple(sites), notes=notes, settings={**planned.settings, "start": dict(started)})


def _predicted(
    sites: list[Site],
    ranks: dict[str, int],
    initial: int,
    horizon: Horizon | None,
    rank: Any,
    freeze: Any,
    rank_params: int | None = None,
    **more: Any,
) -> tuple[dict[str, float], tuple[dict[str, Any], ...]]:
    """Parameters and schedule of a run; those of its start where its length is not known."""
    if horizon is None:
        return _constant(initial), ()
    length = horizon.total_steps, horizon.steps_per_epoch
    found = figures(sites, ranks, rank, freeze, *length, rank_params, **more)
    params = {
        "initial": found.initial,
        "final": round(found.final),
        "average": round(found.average, 1),
        "held": found.size,
    }
    if freeze is not None and found.average_closed_form is not None:
        params["average_closed_form"] = round(found.average_closed_form, 1)
    total = sum(ranks.values())
    budgets = dict(rank.budget_curve(*length, total, len(sites))) if rank is not None else {}
    shares = dict(freeze.trainable_curve(*length)) if freeze is not None else {}
    trainable = dict(found.curve)
    now: dict[str, Any] = {"trainable": found.initial, "total_rank": total, "training_ratio": 1.0}
    rows = []
    for step in sorted({0, *trainable, *budgets, *shares}):
        now = {
            "trainable": round(trainable.get(step, now["trainable"])),
            "total_rank": budgets.get(step, now["total_rank"]),
            "training_ratio": round(shares.get(step, now["training_ratio"]), 6),
        }
        event = "start" if step == 0 else "rank" if step in budgets else "freeze"
        rows.append({"step": step, "event": event, **now})
    return params, (*rows, {"step": horizon.total_steps, "event": "end"})


def _constant(trainable: int) -> dict[str, float]:
    return {"initial": trainable, "final": trainable, "average": float(trainable), "held": trainable}


def model_spec(recipe: Recipe) -> Any:
    """`models.ModelSpec` for the recipe's ``model:``, with ``package:`` resolved to a folder."""
    from .lookup import PACKAGE_PREFIX, package_folder
    from .models import ModelSpec

    values = recipe.model.model_dump()
    name = values["name_or_path"]
    if name and name.startswith(PACKAGE_PREFIX):
        values["name_or_path"] = str(package_folder(name))
    return ModelSpec(**values)


def auto_class_of(config: Any) -> str:
    """The class for a recipe without a task: with a language-model head where there is one."""
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    for auto in (AutoModelForSeq2SeqLM, AutoModelForCausalLM):
        if type(config) in auto._model_mapping:
            return auto.__name__
    return "AutoModel"


def horizon_of(recipe: Recipe, rows: int | None, processes: int | None = None) -> Horizon | None:
    """Steps as the Trainer counts them; None if rows are unknown and no steps are given.

    Args:
        processes: those that share the batches; None: as many as torchrun has started.
    """
    train = recipe.train
    steps = int(train.get("max_steps", -1))
    if rows is None:
        return Horizon(steps, steps) if steps > 0 else None
    batch = int(train.get("per_device_train_batch_size", 8)) * (processes or about.processes())
    batches = rows // batch if train.get("dataloader_drop_last") else math.ceil(rows / batch)
    per_epoch = max(1, math.ceil(batches / int(train.get("gradient_accumulation_steps", 1))))
    return Horizon(steps if steps > 0 else math.ceil(float(train.get("num_train_epochs", 3)) * per_epoch), per_epoch)


def _where_without_data(
    recipe: Recipe, model: nn.Module, notes: list[str], task_type: str | None, head: tuple[str, ...]
) -> Where | None:
    """The selection where it needs no data; for CKA one of the right size, and a note that says so."""
    if recipe.where is None:
        return None
    waits = reads_rows(recipe.where)
    stand_in = {"method": "first"} if waits else {}
    among = layers_to_choose_from(recipe, recipe.where, model, task_type, head)
    chosen = choose_without_data(model, recipe.where.model_copy(update=stand_in), recipe.seed, among)
    notes.extend(chosen_among(among, chosen))
    if waits:
        counted = ", ".join(f"{m.count('1')} of {len(m)} layers of {path}" for path, m in chosen.stacks.items())
        name = "CKA" if recipe.where.method == "cka" else recipe.where.method
        notes.append(f"which layers is for {name} to say, from data (`trimtab select`); counted here: {counted}")
    return chosen


def chosen_among(among: Mapping[str, Sequence[int]] | None, chosen: Where) -> list[str]:
    """Where not all layers hold a target: from how many the selection is, in words."""
    depths = {path: len(mask) for path, mask in chosen.stacks.items()}
    return [
        f"where: {len(layers)} of {depths[path]} layers of {path} hold one of target_modules "
        f"({', '.join(map(str, layers)) or 'none'}), and the choice is made among those"
        for path, layers in (among or {}).items()
        if len(layers) < depths.get(path, 0)
    ]


def _outside_backbone(model: nn.Module) -> tuple[str, ...]:
    from ..host.sites import backbone_of

    _, backbone = backbone_of(model)
    return tuple(name for name, child in model.named_children() if child is not backbone and list(child.parameters()))


def _rates_in_words(recipe: Recipe) -> list[str]:
    if not recipe.rates:
        return []
    run = recipe.train.get("learning_rate")
    told = [f"{role} at {rate:g} times" + (f" ({run * rate:g})" if run else "") for role, rate in recipe.rates.items()]
    return [f"{', '.join(told)} the run's learning rate" + (f" of {run:g}" if run else "")]


def _state_bytes(optim: str) -> int:
    return next((size for word, size in _STATE_BYTES.items() if word in optim), _ADAM_STATE_BYTES)


def _check_budget(recipe: Recipe, made: Plan) -> None:
    """What no method can change must fit as it is; what methods decide has been solved for already."""
    if recipe.budget is None or recipe.rank is not None or recipe.freeze is not None:
        return
    for kind, figure in (("final", "held"), ("average", "average")):
        limit = getattr(recipe.budget, f"{kind}_params")
        if limit is not None and made.params[figure] > limit:
            adapter = recipe.adapter
            takes_methods = adapter.type == "lora" and adapter.init is True and not adapter.options.get("use_dora")
            cure = f"this recipe needs {made.params[figure]:.0f}; lower adapter.r or where.ratio"
            cure += ", or set rank or freeze" if takes_methods else ""
            raise BudgetError(f"budget.{kind}_params", limit, cure)
