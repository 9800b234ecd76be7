"""How many parameters a config trains: at each site, beside the sites, and in a new head."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..plans import Site
from ..train.rates import ROLES

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import nn


def adapted_sites(model: nn.Module, config: PeftConfig) -> tuple[list[Site], dict[str, int], dict[str, int] | None]:
    """Sites, their ranks (or widths, or prompt tokens), and their parameters where these are no matter of a rank."""
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if kind == "ADAPTION_PROMPT":
        from ..adapters.prompts import prompt_sites

        sites, tokens = prompt_sites(model, config), int(config.adapter_len)  # type: ignore[attr-defined]
        return sites, {s.name: tokens for s in sites}, {s.name: tokens * s.in_features + 1 for s in sites}
    if kind == "TRIMTAB_BOTTLENECK":
        from ..adapters.places import norm_params

        places = config.places(model).values()  # type: ignore[attr-defined]
        widths = {p.name: config.width(p.size) if p.how else 0 for p in places}  # type: ignore[attr-defined]
        costs = {p.name: p.params(widths[p.name], norm_params(model.get_submodule(p.name))) for p in places}
        return [Site(p.name, p.size, p.size, p.stack, p.block, p.kind) for p in places], widths, costs
    from ..host.adapted import site_rank
    from ..host.sites import find_sites

    sites = find_sites(model, config, getattr(config, "where", None))
    return sites, {site.name: site_rank(site, config) for site in sites}, None


def site_params(site: Site, r: int, config: PeftConfig, **methods: Any) -> int:
    """Adapter parameters that train at a site in the first step: projections, the diagonals that are at work, and
    LoRA's own vectors.

    Args:
        methods: ``rank`` and ``freeze``, where a budget has settled other ones than the config's.
    """
    rank, freeze = (methods.get(axis, getattr(config, axis, None)) for axis in ("rank", "freeze"))
    is_frozen = freeze is not None and freeze.initially_frozen(site.name)
    has_b = freeze is not None and freeze.needs_output_diagonal and (is_frozen or not freeze.rests)
    has_e = (rank is not None and rank.has_e) or has_b
    projections = 0 if is_frozen else r * (site.in_features + site.out_features)
    return projections + r * has_e + site.out_features * (has_b + vectors_of(config))


def head_params(model: nn.Module, config: PeftConfig) -> int:
    """Of a new head and the other modules that are trained whole; one that two names share counts once."""
    from ..host.sites import HEADS

    task_type = str(getattr(config.task_type, "value", config.task_type))
    wanted = {*(getattr(config, "modules_to_save", None) or ()), *HEADS.get(task_type, ())}
    inside = [module for name, module in model.named_modules() if name in wanted or name.rpartition(".")[2] in wanted]
    return sum(p.numel() for p in {id(p): p for module in inside for p in module.parameters()}.values())


def bias_params(model: nn.Module, config: PeftConfig, sites: list[Site]) -> int:
    """Biases of the base that train, as PEFT's ``bias`` says; they are no part of an adapter's own numbers."""
    kind, of_sites = getattr(config, "bias", "none"), {f"{site.name}.bias" for site in sites}
    trains = {"all": lambda name: "bias" in name, "lora_only": of_sites.__contains__}.get(kind)
    return sum(p.numel() for name, p in model.named_parameters() if trains(name)) if trains else 0


def vectors_of(config: PeftConfig) -> int:
    """How many of ``out`` each train at every site beside its ranks."""
    return sum(bool(getattr(config, name, False)) for name in ("use_dora", "lora_bias"))


def token_params(model: nn.Module, config: PeftConfig) -> int:
    """What trains of embeddings, row by row."""
    tokens = getattr(config, "trainable_token_indices", None) or {}
    if not isinstance(tokens, dict):
        return len(tokens) * model.get_input_embeddings().weight.shape[1]  # type: ignore[operator, union-attr]
    return sum(
        len(rows) * module.weight.shape[1]  # type: ignore[union-attr, index]
        for key, rows in tokens.items()
        for name, module in model.named_modules()
        if f".{name}".endswith(f".{key}")
    )


def roles_of(model: nn.Module, config: PeftConfig) -> set[str]:
    """Roles that may train under a config. The model with its adapter says which do, once it is made."""
    found = {
        "VERA": {"vectors"}, "ADAPTION_PROMPT": {"vectors"}, "TRIMTAB_BOTTLENECK": {"A", "B"}, "LORA": {"A", "B"},
    }.get(str(getattr(config.peft_type, "value", config.peft_type)), set(ROLES))  # fmt: skip
    rank, freeze = getattr(config, "rank", None), getattr(config, "freeze", None)
    with_vectors = ("use_dora", "trainable_token_indices", "monteclora_config", "kasa_config")
    own = (rank is not None and rank.has_e) or (freeze is not None and freeze.needs_output_diagonal)
    if own or any(getattr(config, key, None) for key in with_vectors):
        found = found | {"vectors"}
    return found | {"head"} if head_params(model, config) else found - {"head"}
