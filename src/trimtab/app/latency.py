"""What an adapter costs in a forward pass of the user's own model.

LoRA's paper claims that adapters add latency and that merged LoRA adds none (arXiv 2106.09685, table 1). Here the
model alone, LoRA merged and unmerged, a bottleneck adapter and LLaMA-Adapter take turns, round after round, so that
whatever else the machine does meets all of them alike; each round gives one ratio to the model alone.

Weights are random, since values do not change the time: nothing is downloaded, and a recipe with a config is enough.
All models share the base's weights, but for the copy that merged LoRA has of the adapted ones.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from ..errors import ConfigError, ModelError, TrimtabError
from ..plans import Where
from . import model_facts, models
from . import recipe as recipes
from .peft_config import adapter_config, choose_without_data, layers_to_choose_from, reads_rows
from .planning import auto_class_of, model_spec
from .recipe import Adapter, Recipe
from .report.words import plural

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import nn

BATCHES, TOKENS, ROUNDS, WARMUP = (1, 32), 128, 20, 2
BASE = "base"
ALWAYS = ("merged LoRA", "unmerged LoRA")
"""What every model can have; where one of them fails, the recipe is wrong."""
PROMPT_TOKENS, PROMPT_LAYERS = 10, 30  # LLaMA-Adapter's own, arXiv 2303.16199


@dataclass(frozen=True)
class Timing:
    """Forward passes of one model at one batch size."""

    name: str
    batch: int
    seconds: tuple[float, ...]
    """One a round."""
    ratios: tuple[float, ...]
    """To the base's in the same round."""

    @property
    def median_ms(self) -> float:
        return 1000 * statistics.median(self.seconds)

    @property
    def spread(self) -> tuple[float, float, float]:
        """Lower quartile, median and upper quartile of the ratios.

        >>> Timing("x", 1, (1.0,) * 5, (1.0, 1.1, 1.2, 1.3, 9.0)).spread
        (1.1, 1.2, 1.3)
        """
        if len(self.ratios) < 2:
            return (self.ratios[0],) * 3
        low, middle, high = statistics.quantiles(self.ratios, n=4, method="inclusive")
        return low, middle, high

    def to_json(self) -> dict[str, Any]:
        low, middle, high = self.spread
        return {
            "name": self.name,
            "batch": self.batch,
            "median_ms": self.median_ms,
            "ratio": middle,
            "ratio_quartiles": [low, high],
            "seconds": list(self.seconds),
        }


@dataclass(frozen=True)
class Latency:
    """The outcome of `measure`."""

    model: str
    device: str
    dtype: str
    tokens: int
    timings: list[Timing]
    parameters: dict[str, int]
    """What each adapter adds, merged or not."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Adapter -> why this model cannot have it."""

    def to_json(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "device": self.device,
            "dtype": self.dtype,
            "tokens": self.tokens,
            "timings": [timing.to_json() for timing in self.timings],
            "parameters": self.parameters,
            "left_out": self.left_out,
        }


def measure(
    recipe: Recipe,
    *,
    batches: Sequence[int] = BATCHES,
    tokens: int = TOKENS,
    rounds: int = ROUNDS,
    device: str | None = None,
    on_round: Callable[[], None] = lambda: None,
) -> Latency:
    """Times one forward pass of the recipe's model with each kind of adapter.

    Args:
        batches: rows in a pass.
        tokens: tokens in a row.
        rounds: timed passes of each model, after two that are not.
        device: ``cpu``, ``cuda``, …; the accelerator if there is one.
        on_round: called after every round, `rounds` + 2 times a batch size.
    Raises:
        ConfigError: a quantised base, rows longer than the model can take, or a device that is not there.
    """
    place = _device(device)
    base = make_model(recipe, place)
    _check_length(base, tokens)
    contenders: dict[str, nn.Module] = {BASE: base}
    parameters, left_out = {BASE: 0}, {}
    for name, build in _builders(recipe, base).items():
        try:
            contenders[name], parameters[name] = build()
        except (TrimtabError, ValueError, NotImplementedError) as error:
            if name in ALWAYS:
                raise
            left_out[name] = " ".join(str(error).split())
    timings: list[Timing] = []
    for batch in batches:
        inputs = make_inputs(base, batch, tokens)
        seconds = _take_turns(contenders, inputs, rounds, place, on_round)
        timings += [
            Timing(name, batch, tuple(taken), tuple(mine / bases for mine, bases in zip(taken, seconds[BASE])))
            for name, taken in seconds.items()
        ]
    name = recipe.model.name_or_path or base.config.model_type
    dtype = str(next(base.parameters()).dtype).removeprefix("torch.")
    return Latency(name, _device_name(place), dtype, tokens, timings, parameters, left_out)


def _device(name: str | None) -> torch.device:
    there = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if name is None:
        return there or torch.device("cpu")
    try:
        place = torch.device(name)
        torch.zeros(1, device=place).item()  # the meta device holds no numbers, and so takes no time
    except (RuntimeError, AssertionError) as error:
        usable = "cpu" if there is None else f"cpu or {there.type}"
        raise ConfigError("device", name, f"cannot be used here; {usable} can") from error
    return place


# -- the models ----------------------------------------------------------------------------------------


def make_model(recipe: Recipe, device: torch.device) -> Any:
    """The recipe's model with random weights, in evaluation."""
    import transformers

    if recipe.model.quantization is not None:
        raise ConfigError("model.quantization", recipe.model.quantization, "measured unquantised; drop it here")
    spec = model_spec(recipe)
    config, kind = _config_and_class(recipe, spec)
    wanted = recipe.model.dtype or ("bfloat16" if getattr(config, "dtype", None) == torch.bfloat16 else "float32")
    with torch.device(device):
        model = getattr(transformers, kind).from_config(config, dtype=getattr(torch, wanted))
    return model.eval().requires_grad_(False)


def _config_and_class(recipe: Recipe, spec: Any) -> tuple[Any, str]:
    """The model's config and its class: the task's, if there is one."""
    from .tasks import get_task

    if recipe.task is None:
        config = models.load_config(spec)
        return config, auto_class_of(config)
    task = get_task(recipe.task.model_dump())
    try:
        return models.load_config(spec, task), task.auto_class
    except ConfigError:  # labels that only the data tell; their number costs nothing here
        config = models.load_config(spec)
        return config, task.auto_class


def _builders(recipe: Recipe, base: nn.Module) -> dict[str, Callable[[], tuple[nn.Module, int]]]:
    own = recipe.adapter
    lora = own if own.type == "lora" else Adapter.model_validate({"type": "lora", "target_modules": "all-linear"})
    made = {
        ALWAYS[0]: lambda: _merged(recipe, lora, base),
        ALWAYS[1]: lambda: _adapted(base, _lora_config(recipe, lora, base)),
    }
    bottleneck = own if own.type == "bottleneck" else Adapter.model_validate({"type": "bottleneck"})
    made["bottleneck"] = lambda: _adapted(base, _config(recipe, bottleneck, base))
    made["LLaMA-Adapter"] = lambda: _adapted(base, _prompt_config(recipe, base))
    return made


def _adapted(base: nn.Module, config: PeftConfig) -> tuple[nn.Module, int]:
    """A twin of the base with an adapter in the base's dtype, and the adapter's parameters."""
    import peft

    model = peft.get_peft_model(twin(base), config, autocast_adapter_dtype=False)  # type: ignore[arg-type]
    added = sum(p.numel() for p in model.parameters() if p.requires_grad)
    like = next(base.parameters())
    return model.to(device=like.device, dtype=like.dtype).eval().requires_grad_(False), added


def _merged(recipe: Recipe, lora: Adapter, base: nn.Module) -> tuple[nn.Module, int]:
    """LoRA in the weights: the modules of the base again, on weights of its own where it adapts."""
    import peft

    from ..host.adapted import adapted_modules

    config = _lora_config(recipe, lora, base)
    probe, added = _adapted(base, config)
    adapted = [m.get_base_layer() for m in adapted_modules(probe)]
    own = twin(base, except_for=[p for m in adapted for p in m.parameters(recurse=False)])
    model = peft.get_peft_model(own, config, autocast_adapter_dtype=False)  # type: ignore[arg-type]
    return model.merge_and_unload().eval().requires_grad_(False), added  # type: ignore[operator]


def twin(model: nn.Module, except_for: Sequence[torch.Tensor] = ()) -> nn.Module:
    """The same modules again on the same weights; those ``except_for`` are copied."""
    apart = {id(tensor) for tensor in except_for}
    shared = {id(t): t for t in (*model.parameters(), *model.buffers()) if id(t) not in apart}
    return copy.deepcopy(model, shared)  # what is in the memo is taken as it is


def _lora_config(recipe: Recipe, lora: Adapter, base: nn.Module) -> PeftConfig:
    """Stock PEFT's LoRA of the recipe's size on its layers: what serves an adapter that Trimtab has trained."""
    import peft

    from ..host.restrict import restrict
    from ..host.sites import find_sites

    config = peft.LoraConfig(
        r=lora.r, lora_alpha=2 * lora.r, target_modules=lora.target_modules, init_lora_weights=False, **lora.options
    )
    where = _layers(recipe, base)
    find_sites(base, config, where)  # refuses targets that match nothing
    return config if where is None else restrict(config, where, base)


def _config(recipe: Recipe, adapter: Adapter, base: nn.Module) -> PeftConfig:
    plain = recipe.model_copy(
        update={"adapter": adapter, "rank": None, "freeze": None, "budget": None, "export": recipes.Export()}
    )
    return adapter_config(plain, base, where=_layers(recipe, base))


def _prompt_config(recipe: Recipe, base: Any) -> PeftConfig:
    import peft

    from ..adapters.prompts import model_types

    kind = base.config.model_type
    if kind not in model_types():
        raise ModelError(f"PEFT has it for {', '.join(model_types())}, not for {kind}")
    if recipe.adapter.type == "adaption_prompt":
        return peft.AdaptionPromptConfig(task_type="CAUSAL_LM", **recipe.adapter.options)
    layers = min(PROMPT_LAYERS, base.config.num_hidden_layers)
    return peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=PROMPT_TOKENS, adapter_layers=layers)


def _layers(recipe: Recipe, base: nn.Module) -> Where | None:
    """As many layers as the recipe adapts; which of them makes no difference to the time."""
    if recipe.where is None:
        return None
    waits = reads_rows(recipe.where)
    settings = recipe.where.model_copy(update={"method": "first"}) if waits else recipe.where
    return choose_without_data(base, settings, recipe.seed, layers_to_choose_from(recipe, recipe.where, base))


# -- the time ------------------------------------------------------------------------------------------


def make_inputs(model: Any, batch: int, tokens: int) -> dict[str, torch.Tensor]:
    """Random rows without padding; ids below any special image token."""
    device = next(model.parameters()).device
    most = min(1000, model.get_input_embeddings().num_embeddings)
    ids = torch.randint(0, most, (batch, tokens), generator=torch.Generator().manual_seed(0)).to(device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if getattr(model.config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids
    if "use_cache" in model_facts.forward_names(model):
        inputs["use_cache"] = False  # type: ignore[assignment]
    return inputs


def _take_turns(
    contenders: dict[str, nn.Module],
    inputs: dict[str, Any],
    rounds: int,
    device: torch.device,
    on_round: Callable[[], None],
) -> dict[str, list[float]]:
    """Seconds of each model's passes. The order turns by one each round: nobody always goes first."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    with torch.inference_mode():
        for i in range(-WARMUP, rounds):
            for name in _turned(list(contenders), i):
                _wait(device)
                began = time.perf_counter()
                contenders[name](**inputs)
                _wait(device)
                if i >= 0:
                    seconds[name].append(time.perf_counter() - began)
            on_round()
    return seconds


def _turned(names: list[str], by: int) -> Iterator[str]:
    yield from names[by % len(names) :]
    yield from names[: by % len(names)]


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _check_length(model: Any, tokens: int) -> None:
    most = model_facts.positions(model)
    if most and tokens > most:
        raise ConfigError("tokens", tokens, f"at most {most}, the positions that this model has")


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu, {plural(torch.get_num_threads(), 'thread')}" if device.type == "cpu" else device.type
