"""What rests on what: plain data at the bottom, the four questions on it, the command on top of all."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "trimtab"
PLAIN = {"errors", "plans", "schedule", "registry"}
RESTS_ON = {
    "errors": set(),
    "plans": {"errors"},
    "schedule": {"errors"},
    "registry": {"errors"},
    "adapters": PLAIN | {"host"},
    "host": PLAIN | {"adapters", "where"},
    "where": PLAIN | {"host"},
    "rank": PLAIN | {"adapters"},
    "freeze": PLAIN,
    "budget": PLAIN | {"rank", "freeze"},
    "train": PLAIN | {"budget", "host", "adapters", "rank", "freeze"},
    "exporting": PLAIN | {"host", "adapters"},
    "app": PLAIN | {"budget", "host", "adapters", "where", "rank", "freeze", "train", "exporting", "__init__"},
    "__main__": {"app", "errors"},
    "__init__": {"errors"},
}
MODULES = {".".join(path.relative_to(SOURCE).with_suffix("").parts): path for path in sorted(SOURCE.rglob("*.py"))}


def for_types_only(tree: ast.Module) -> set[ast.AST]:
    blocks = (n for n in ast.walk(tree) if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING")
    return {child for block in blocks for child in ast.walk(block)}


@cache
def imports(module: str) -> set[str]:
    """The modules of ours that one imports, wherever in its text; for types alone does not count."""
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    package = module.split(".")[:-1]
    found, skipped = set(), for_types_only(tree)
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or node in skipped:
            continue
        if node.level:
            base = package[: len(package) - node.level + 1]
        elif (node.module or "").split(".")[0] == "trimtab":
            base = []
        else:
            continue
        path = [*base, *(node.module or "").removeprefix("trimtab" if not node.level else "").strip(".").split(".")]
        for name in node.names:
            for candidate in ([*path, name.name], [*path, name.name, "__init__"], path, [*path, "__init__"]):
                joined = ".".join(part for part in candidate if part)
                if joined in MODULES:
                    found.add(joined)
                    break
    return found - {module}


def of_peft(module: str) -> set[str]:
    """What a module imports of PEFT besides the names that `peft` itself exports."""
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    named = {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and not node.level}
    whole = {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    reached = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    return {name for name in named | whole if name.startswith("peft.")} | {
        name for name in reached if name.startswith(("peft.tuners.", "peft.utils.", "peft.mapping."))
    }


def room(module: str) -> str:
    return module.split(".")[0]


@pytest.mark.parametrize("name", sorted({room(module) for module in MODULES}))
def test_a_room_imports_only_what_it_rests_on(name):
    rooms = {room(other) for module in MODULES if room(module) == name for other in imports(module)}
    assert rooms - {name} <= RESTS_ON[name]


def test_no_module_comes_back_to_itself():
    def comes_back(module: str, path: tuple[str, ...]) -> tuple[str, ...] | None:
        if module in path:
            return (*path[path.index(module) :], module)
        if module in clean:
            return None
        circle = next((c for other in imports(module) if (c := comes_back(other, (*path, module)))), None)
        if circle is None:
            clean.add(module)
        return circle

    clean: set[str] = set()
    assert [circle for module in MODULES if (circle := comes_back(module, ()))] == []


def test_only_host_and_adapters_touch_what_peft_does_not_export():
    """`adapters` for the kinds that are PEFT's own (VeRA, prompts), and for making a new kind known to it."""
    rooms = {room(module) for module in MODULES if of_peft(module)}
    assert rooms == {"host", "adapters"}
    assert "peft.tuners.tuners_utils" in of_peft("adapters.bottleneck")


def test_the_check_sees_what_is_imported():
    assert "host.config" in imports("train.controller")
    assert "app.run" in imports("app.cli")
