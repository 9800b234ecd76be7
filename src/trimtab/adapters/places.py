"""Where a bottleneck adapter sits in a block of any transformer, read off the block's own modules.

A block is a row of *sublayers*: attention, perhaps cross-attention, feed-forward. Each adds its output f to what
entered it, x. An adapter has to stand between f and that sum, so for each sublayer we look for its *tail*: the
last module that f comes out of. From the sublayer's output projection on, that is

    its dropout                BERT, RoBERTa, DeBERTa, T5 (in the module that also adds and norms), GPT-2
    a second norm of its own   Gemma 2 and 3, which norm f once more before they add it
    the projection itself      Llama, Mistral, Gemma, Qwen, BART

No family is named, except for one question that a module's children cannot answer (see `_POST_NORM_BLOCKS`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from ..errors import ModelError
from ..host.sites import (
    Stack,
    bare,
    base_of,
    check_where,
    features,
    find_stacks,
    is_chosen,
    is_linear,
    outside_adapters,
)
from ..plans import Where

Variant = Literal["houlsby", "pfeiffer", "parallel"]

# Blocks that hold their sublayers and norms side by side look alike whether they norm before or after: these norm
# the sum (post-LN), all others what enters the sublayer. It matters to `pfeiffer` alone.
_POST_NORM_BLOCKS = ("bart", "blenderbot-small", "distilbert", "marian")


@dataclass(frozen=True)
class Place:
    """One module that a bottleneck method wraps."""

    name: str
    """Full name of the module in the base model."""
    size: int
    """Width d of the hidden states."""
    how: Literal["after", "around", "beside"] | None
    """`after`: f + a(f). `around` the norm of the sum u: z = norm(u), norm(u + a(z)). `beside`: f + s·a(x).
    None: no adapter here, only a norm that trains."""
    trains_norm: bool
    beside: str | None
    """The linear that x enters, for `beside`."""
    projection: str
    """The sublayer's output projection, whose device the adapter shares (a dropout has none); the norm itself
    where only a norm trains."""
    stack: str
    block: int
    kind: str
    """Name inside the block."""

    def params(self, width: int, norm_params: int) -> int:
        """Trained numbers: 2·m·d + d + m for an adapter of width m, and those of the norm if it trains.

        >>> Place("f", 768, "after", False, None, "f", "layers", 0, "f").params(64, 0)
        99136
        """
        adapter = 0 if self.how is None else 2 * width * self.size + self.size + width
        return adapter + (norm_params if self.trains_norm else 0)


def find_places(
    model: nn.Module,
    variant: Variant,
    train_norms: bool,
    where: Where | None = None,
    layers: tuple[int, ...] | None = None,
) -> dict[str, Place]:
    """Every place of a variant in a model, by module name, in the order of the model. A meta-device model will do.

    Args:
        train_norms: the norms of adapted blocks train as well.
        where: adapters and trained norms only in the chosen blocks.
        layers: the same by block index, in every stack.
    Raises:
        ModelError: a block without attention or without feed-forward (mixtures of experts, state-space blocks).
        ConfigError: ``where`` belongs to another model.
    """
    base = base_of(model)
    stacks = find_stacks(base)
    if where is not None:
        check_where(where, find_stacks(base, include_vision=True))
    config = getattr(base, "config", None)
    is_post_norm = getattr(config, "model_type", "") in _POST_NORM_BLOCKS
    found: dict[str, Place] = {}
    for path, stack in stacks.items():
        for index, block in enumerate(stack.blocks):
            if where is not None and not is_chosen(where, path, index):
                continue
            if layers is not None and index not in layers:
                continue
            for place in _in_block(stack, index, block, variant, train_norms, is_post_norm):
                found[place.name] = place
    if not found:
        raise ModelError(
            "bottleneck: no layer is left for adapters; where (or layers_to_transform) leaves out all "
            f"of {', '.join(stacks)}"
        )
    return found


def norm_params(norm: nn.Module) -> int:
    return sum(p.numel() for p in bare(norm).parameters())


# ---------------------------------------------------------------------------------------- inside one block


@dataclass(frozen=True)
class _Sublayer:
    """Names inside the block; ``""`` is the block itself."""

    is_attention: bool
    first: str
    """The first linear that the sublayer's input enters."""
    projection: str
    """Its last linear, back to the hidden width."""
    home: str
    """The nearest module around the projection that has a norm: the one that adds f to x."""
    tail: str


def _in_block(
    stack: Stack, index: int, block: nn.Module, variant: Variant, train_norms: bool, is_post_norm: bool
) -> Iterator[Place]:
    prefix = f"{stack.name}.{index}."
    d = stack.hidden_size
    modules: dict[str, nn.Module] = {"": block, **dict(outside_adapters(block))}
    sublayers = _sublayers(modules, d, f"{stack.path}.{index}")
    adapters: dict[str, tuple[Any, str | None, str]] = {}
    for sub in sublayers:
        if variant == "houlsby":
            adapters[sub.tail] = "after", None, sub.projection
        elif sub.is_attention:
            continue
        elif variant == "parallel":
            adapters[sub.tail] = "beside", prefix + sub.first, sub.projection
        else:
            # A home that does not hold the sublayer's first linear cannot norm what enters it: it norms the sum.
            norms_sum = is_post_norm if _is_inside(sub.first, sub.home) else True
            last_norm = _norms(modules, sub.home, d)[-1]
            how = "around" if norms_sum else "after"
            adapters[last_norm if norms_sum else sub.tail] = how, None, sub.projection
    norms = [n for n in modules if n and _is_norm(modules[n], d) and not _of_queries(n)] if train_norms else []
    for name in modules:
        if name in adapters or name in norms:
            how, beside, projection = adapters.get(name, (None, None, name))
            yield Place(prefix + name, d, how, name in norms, beside, prefix + projection, stack.path, index, name)


def _sublayers(modules: dict[str, nn.Module], d: int, block: str) -> list[_Sublayer]:
    """The block's sublayers, attention first, in the order in which they are written down."""
    linears = {name: features(module) for name, module in modules.items() if name and is_linear(module)}
    groups: dict[str, list[str]] = {}
    for name in linears:
        groups.setdefault(_attention_of(name), []).append(name)
    found = []
    for group, names in groups.items():
        back = [n for n in names if linears[n][1] == d]
        into = [n for n in names if linears[n][0] == d]
        if not back or not into:
            what = "attention" if group else "feed-forward"
            raise ModelError(
                f"bottleneck: the {what} of {block} has no linear {'back to' if into else 'from'} the "
                f"hidden width {d} (it has {', '.join(names)}); use adapter.type=lora on this model"
            )
        projection = back[-1]
        home = _home(projection, into[0] if group else None, modules, d)
        found.append((bool(group), into[0], projection, home))
    for is_attention, what in ((True, "attention"), (False, "feed-forward")):
        if not any(sub[0] is is_attention for sub in found):
            raise ModelError(
                f"bottleneck: {block} has no {what} made of linears (a mixture of experts, or another "
                "kind of block); use adapter.type=lora on this model"
            )
    found.sort(key=lambda sub: not sub[0])
    homes = [home for *_, home in found]
    tails = [_tail(*sub, homes[:i].count(sub[-1]), homes.count(sub[-1]), modules, d) for i, sub in enumerate(found)]
    return [_Sublayer(*sub, tail) for sub, tail in zip(found, tails)]


def _tail(
    is_attention: bool,
    first: str,
    projection: str,
    home: str,
    place: int,
    shared_by: int,
    modules: dict[str, nn.Module],
    d: int,
) -> str:
    """The last module that the sublayer's output comes out of, before it is added to its input."""
    parent = projection.rpartition(".")[0]
    if shared_by == 1 and (dropouts := _dropouts(modules, home)):
        return dropouts[-1]
    if parent != home:
        children = _children(modules, parent)
        dropouts = _dropouts(modules, parent)
        later = [name for name in dropouts if children.index(name) > children.index(projection)]
        # Beside the queries a lone dropout is that of the attention's weights; a second one is the output's.
        if later and (len(dropouts) > 1 or not (is_attention and _is_inside(first, parent))):
            return later[-1]
    norms = _norms(modules, home, d)
    if len(norms) == 2 * shared_by:  # one norm before and one after each sublayer
        return norms[2 * place + 1]
    return projection


def _attention_of(name: str) -> str:
    """The attention module that a linear belongs to (``crossattention``, ``layer.0.SelfAttention``), or ``""``."""
    parts = name.split(".")
    for i, part in enumerate(parts):
        if "attn" in part.lower() or "attention" in part.lower():
            return ".".join(parts[: i + 1])
    return ""


def _home(projection: str, query: str | None, modules: dict[str, nn.Module], d: int) -> str:
    """``query`` is an attention's first linear: norms right beside it and the projection are not of the sum."""
    parent = projection.rpartition(".")[0]
    while parent:
        children = _children(modules, parent)
        if _norms(modules, parent, d) and not (query in children and projection in children):
            break
        parent = parent.rpartition(".")[0]
    return parent


def _children(modules: dict[str, nn.Module], parent: str) -> list[str]:
    return [name for name in modules if name and name.rpartition(".")[0] == parent]


def _norms(modules: dict[str, nn.Module], parent: str, d: int) -> list[str]:
    return [name for name in _children(modules, parent) if _is_norm(modules[name], d) and not _of_queries(name)]


def _dropouts(modules: dict[str, nn.Module], parent: str) -> list[str]:
    return [n for n in _children(modules, parent) if "dropout" in type(bare(modules[n])).__name__.lower()]


def _is_norm(module: nn.Module, d: int) -> bool:
    """A norm over the hidden width; norms of single heads are not."""
    module = bare(module)
    weight = getattr(module, "weight", None)
    return "norm" in type(module).__name__.lower() and isinstance(weight, Tensor) and tuple(weight.shape) == (d,)


def _of_queries(norm: str) -> bool:
    return norm.rpartition(".")[2].startswith(("q_", "k_"))


def _is_inside(name: str, parent: str) -> bool:
    return not parent or name.startswith(f"{parent}.")
