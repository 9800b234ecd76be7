"""Writes the table in docs/published_runs.md: parameters as planned beside those that the papers print.

    python recipes/published.py

Run it after adding a recipe; a test compares the page with it.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import trimtab

RECIPES = Path(__file__).resolve().parent
PAGE = RECIPES.parent / "docs" / "published_runs.md"
MARK = "<!-- Below this line: python recipes/published.py -->"
HEADER = ("recipes", "at the start", "at the end", "mean over the run", "published", "what is published")

# Beginning of a recipe's name -> what its paper prints, and which of the planned figures that is. The longest
# beginning counts.
PUBLISHED: dict[str, tuple[str, str]] = {
    "adalora_": (
        ".32M",
        "its smaller budget, near mean rank 2 (331,920); the released settings, followed here, go on to mean rank 1",
    ),
    "aflora_deberta": (".14M", "mean over the run, one figure for all tasks"),
    "aflora_llama": ("17.8M", "mean over the run: 3.15 times fewer than LoRA's 56.1M"),
    "cka_": ("up to 50 % fewer", "than LoRA on all layers, which trains {all_layers}"),
    "cka-pissa_": ("up to 50 % fewer", "than PiSSA on all layers, which trains {all_layers}"),
    "houlsby_": (
        "2.1 %",
        "of BERT-large's 335 million, at width 64 for all tasks; the plan, LayerNorms of the layers included, is 1.9 %",
    ),
    "llama-adapter_": ("1.2M", "with a gate for each head, 1,229,760; PEFT has one for a layer"),
    "sora_": (
        ".47M",
        "at the end, in AFLoRA's paper, as rank 4; where gates end is not foreseen, so the plan is that of the start",
    ),
}


def main() -> None:
    text = PAGE.read_text("utf-8").partition(MARK)[0] + MARK + "\n\n" + table()
    PAGE.write_text(text, encoding="utf-8")


def table() -> str:
    """The table as Markdown: one row for the recipes of a paper and model that start and end alike."""
    rows: dict[tuple[str, ...], list[tuple[str, float]]] = {}
    for path in paths():
        head, _, task = path.stem.rpartition("_")
        made = trimtab.plan(path)
        key = (head, _count(made.params["initial"]), _count(made.params["final"]), *printed(path))
        rows.setdefault(key, []).append((task, made.params["average"]))
    lines = [HEADER, ("---", "---:", "---:", "---:", "---:", "---")]
    for (head, initial, final, published, remark), found in rows.items():
        means = dict.fromkeys(_count(mean) for _, mean in sorted(found, key=lambda pair: pair[1]))
        mean = " to ".join(list(means)[:: max(1, len(means) - 1)])
        lines.append((f"`{head}_` {', '.join(task for task, _ in found)}", initial, final, mean, published, remark))
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def paths() -> list[Path]:
    """The recipes of published runs; those named quick_ are ours."""
    return sorted(path for path in RECIPES.glob("*.yaml") if not path.stem.startswith("quick_"))


def printed(path: Path) -> tuple[str, str]:
    """What a recipe's paper prints, and what that is."""
    known = [beginning for beginning in PUBLISHED if path.stem.startswith(beginning)]
    published, remark = PUBLISHED[max(known, key=len)] if known else ("", "no count at hand")
    if "{all_layers}" in remark:
        remark = remark.format(all_layers=_on_all_layers(path.stem.rpartition("_")[0]))
    return published, remark


@cache
def _on_all_layers(head: str) -> str:
    path = next(RECIPES.glob(f"{head}_*.yaml"))
    return _count(trimtab.plan(path, overrides=["where=null"]).params["initial"])


def _count(params: float) -> str:
    return f"{round(params):,}"


if __name__ == "__main__":
    main()
