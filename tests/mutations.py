"""Faults put into the core by hand, each of which the reduced suite must see: ``python tests/mutations.py [WORD …]``.

Each fault is a text of a source file and what stands in its place, tried in a copy of the repository, and the test file
that is to fail of it. It counts as caught if a test of that file fails with the fault and passes without. With words,
only faults whose file or text has one of them are tried.

One process imports torch, transformers and PEFT, and each try is a fork of it: what takes seconds is done once.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent
CORE = "src/trimtab"


class Fault(NamedTuple):
    file: str
    """Below `CORE`."""
    old: str
    new: str
    seen_by: str
    """Below ``tests``."""


FAULTS = [
    # -- rank: scores ----------------------------------------------------------------------------------
    Fault("rank/influence.py", "z.sub_(z.mean(dim=1, keepdim=True))", "z.sub_(0)", "rank/test_influence.py"),
    Fault(
        "rank/influence.py",
        "if beta * sizes[right - 1] < gamma * sizes[start]:",
        "if False:",
        "rank/test_influence.py",
    ),
    Fault(
        "rank/influence.py",
        "torch.where(linked, flow - length.log(), 0.0)",
        "torch.where(linked, flow, 0.0)",
        "rank/test_influence.py",
    ),
    Fault("rank/influence.py", "math.nextafter(beta, 0.0)", "0.5 * beta", "rank/test_influence.py"),
    Fault("rank/salientlora.py", "g = orth.sum() / orth", "g = orth / orth.sum()", "rank/test_salientlora.py"),
    Fault(
        "rank/salientlora.py",
        "magnitude_weight * share + (1 - magnitude_weight) * influence",
        "(1 - magnitude_weight) * share + magnitude_weight * influence",
        "rank/test_salientlora.py",
    ),
    Fault("rank/salientlora.py", "series.double().abs() @ g", "series.double() @ g", "rank/test_salientlora.py"),
    Fault(
        "rank/adalora.py", "torch._foreach_mul_(spread, b2)", "torch._foreach_mul_(spread, b1)", "rank/test_adalora.py"
    ),
    Fault(
        "rank/adalora.py",
        "torch._foreach_sub_(seen, mean)",
        "torch._foreach_sub_(seen, spread)",
        "rank/test_adalora.py",
    ),
    Fault(
        "rank/adalora.py",
        "score_A.mean(dim=1) + score_B.mean(dim=0)",
        "score_A.sum(dim=1) + score_B.sum(dim=0)",
        "rank/test_adalora.py",
    ),
    Fault("rank/sora.py", "torch._foreach_clamp_min_(sizes, 0.0)", "pass", "rank/test_sora.py"),
    Fault("rank/orthogonality.py", "diagonal.sub_(size)", "diagonal.sub_(0)", "rank/test_adalora.py"),
    Fault("rank/orthogonality.py", ").sub_(along)", ")", "promises/test_drop_in.py"),
    Fault("rank/adalora.py", 'found[f"{site.name}.e"] = product.sum(dim=along)', "pass", "promises/test_drop_in.py"),
    Fault("rank/base.py", "device) * e.abs()", "device) * e", "promises/test_drop_in.py"),
    Fault("adapters/fused.py", "grad_base = grad if need_base", "grad_base = 2 * grad if need_base", "test_fused.py"),
    Fault("adapters/fused.py", "grad_base = grad if ctx", "grad_base = 2 * grad if ctx", "test_fused.py"),
    # -- rank: schedules, order and masks --------------------------------------------------------------
    Fault("rank/adalora.py", "* left**3 + self.final_total", "* left**2 + self.final_total", "rank/test_adalora.py"),
    Fault("rank/adalora.py", "self.warmup < step < self.end", "self.warmup <= step < self.end", "rank/test_adalora.py"),
    Fault("rank/salientlora.py", "* (1 - u) ** 3)", "* (1 - u) ** 2)", "rank/test_salientlora.py"),
    Fault(
        "rank/salientlora.py",
        "step += self.window(step)",
        "step += self.window(step) + 1",
        "rank/test_salientlora.py",
    ),
    Fault("rank/topk.py", "descending=True, stable=True", "descending=False, stable=True", "rank/test_topk.py"),
    Fault("rank/topk.py", "price[rest].cumsum(0) <= left", "price[rest] <= left", "rank/test_topk.py"),
    Fault("rank/base.py", "alive[self.alive] = kept", "alive[: len(kept)] = kept", "rank/test_allocators.py"),
    Fault("rank/base.py", "        self._select(kept)\n        alive =", "        alive =", "rank/test_allocators.py"),
    Fault(
        "rank/sora.py",
        "gate.mul_(is_open.to(gate.device))",
        "pass",
        "rank/test_sora.py",
    ),
    Fault("schedule.py", "number / 100 * total_steps", "number * total_steps", "rank/test_phase_lengths.py"),
    # -- freeze ----------------------------------------------------------------------------------------
    Fault(
        "freeze/aflora.py", "self._mean[name] * self._uncertainty[name]", "self._mean[name]", "freeze/test_aflora.py"
    ),
    Fault(
        "freeze/aflora.py",
        "torch._foreach_sub(window, mean)",
        "torch._foreach_sub(window, window)",
        "freeze/test_aflora.py",
    ),
    Fault("freeze/aflora.py", "pool.kthvalue(k)", "pool.kthvalue(len(pool) - k)", "freeze/test_aflora.py"),
    Fault("freeze/aflora.py", "torch._foreach_mul_(window, self._n_in_window)", "pass", "freeze/test_aflora.py"),
    Fault(
        "freeze/grades.py", "left[name] < self.settings.tau", "left[name] > self.settings.tau", "freeze/test_grades.py"
    ),
    Fault(
        "freeze/grades.py",
        "moved = {name: now[name] - before[name]",
        "moved = {name: now[name]",
        "freeze/test_grades.py",
    ),
    Fault("freeze/base.py", "remaining -= self.numels[name]", "remaining -= 1", "test_budget.py"),
    Fault("freeze/base.py", "A[kept.to(A.device)]", "A[: int(kept.sum())]", "freeze/test_aflora.py"),
    # -- where -----------------------------------------------------------------------------------------
    Fault("where/moments.py", "out = x - x.mean(0)", "out = x", "where/test_linear_cka.py"),
    Fault(
        "where/moments.py",
        "self.products[a, b] - n * torch.outer(mean[a], mean[b])",
        "self.products[a, b] - torch.outer(mean[a], mean[b])",
        "where/test_linear_cka.py",
    ),
    Fault("where/cka.py", "key=lambda i: stack.cka[i])", "key=lambda i: -stack.cka[i])", "where/test_selecting.py"),
    Fault("where/importance.py", "key=lambda i: -values[i])", "key=lambda i: values[i])", "where/test_importance.py"),
    Fault("plans.py", r"""\.(?:{indices})(?:\.|$)""", r"""\.(?:{indices})""", "where/test_restrict.py"),
    # -- the layer -------------------------------------------------------------------------------------
    Fault("adapters/fused.py", "overlap @ _as(b, wide)", "overlap.sum(1)", "test_fused.py"),
    Fault("adapters/fused.py", "grad_x.addmm_(gh.t(), a, alpha=scale)", "grad_x.addmm_(gh.t(), a)", "test_fused.py"),
    Fault("adapters/fused.py", "gh = gh * wide_e.unsqueeze(1)", "gh = gh * 1", "test_fused.py"),
    Fault("adapters/gated.py", "of_gate = grad.mul_(self.up)", "of_gate = grad", "test_fused.py"),
    Fault("adapters/gated.py", "_hooks_for_saved(True) is not None", "False", "test_fused.py"),
    Fault("adapters/gated.py", "edge == (tensor.grad_fn, tensor.output_nr)", "True", "test_fused.py"),
    Fault(
        "adapters/lowrank.py",
        "A * e.unsqueeze(1)",
        "A * e.abs().unsqueeze(1)",
        "promises/test_every_checkpoint_is_plain_lora.py",
    ),
    Fault("adapters/dropout.py", "return min(max(round(p", "return 1 - min(max(round(p", "test_fused.py"),
    Fault(
        "adapters/vera.py",
        "b.double()[:, None] * B.double() * d.double()",
        "B.double() * d.double()",
        "freeze/test_vera.py",
    ),
    # -- pruned and frozen -----------------------------------------------------------------------------
    Fault(
        "train/prune.py",
        "state[key] = value.index_select(dim, keep)",
        "state[key] = torch.zeros_like(value.index_select(dim, keep))",
        "promises/test_pruned_and_frozen_means_gone.py",
    ),
    Fault(
        "train/prune.py",
        "parameter.grad = gradient.index_select(dim, keep)",
        "pass",
        "promises/test_pruned_and_frozen_means_gone.py",
    ),
    Fault(
        "train/prune.py",
        "cut_parameter(B, indices, 1, optimizer)",
        "cut_parameter(B, indices.flip(0), 1, optimizer)",
        "promises/test_pruned_and_frozen_means_gone.py",
    ),
    Fault(
        "train/prune.py",
        "optimizer.state.pop(parameter, {})",
        "optimizer.state.get(parameter, {})",
        "promises/test_pruned_and_frozen_means_gone.py",
    ),
    Fault("host/layers.py", "        parameter.requires_grad_(False)\n", "", "promises/test_contract.py"),
    # -- the controller --------------------------------------------------------------------------------
    Fault("train/controller.py", "g = g * loss_scale", "g = g", "test_bare_loops.py"),
    Fault(
        "train/controller.py",
        "            self._undo_decay_of_e()\n",
        "",
        "promises/test_pruned_and_frozen_means_gone.py",
    ),
    Fault(
        "train/parallel.py",
        "p.grad = (piece / world)",
        "p.grad = (piece * 1)",
        "promises/test_n_processes_decide_as_one.py",
    ),
    Fault("train/controller.py", "if not has_penalty:", "if True:", "test_bare_loops.py"),
    Fault("train/steps.py", "found.fill_(1.0)", "pass", "promises/test_n_processes_decide_as_one.py"),
    Fault(
        "train/callback.py",
        "torch.set_rng_state(of_process_0(torch.get_rng_state()))",
        "pass",
        "promises/test_n_processes_decide_as_one.py",
    ),
    # -- save, load, resume, export --------------------------------------------------------------------
    Fault(
        "train/controller.py",
        'tensors.update({f"{part}/{key}": value',
        '({f"{part}/{key}": value',
        "test_checkpoint.py",
    ),
    Fault(
        "freeze/aflora.py",
        "self._n_in_window, self._last_observed = meta",
        "_, self._last_observed = meta",
        "promises/test_contract.py",
    ),
    Fault(
        "rank/salientlora.py",
        'self.series[: self.filled] = tensors["series"]',
        "self.series.fill_(1)",
        "rank/test_allocators.py",
    ),
    Fault("train/callback.py", "torch.set_rng_state(self._draws)", "pass", "promises/test_resume_is_exact.py"),
    Fault("train/checkpoint.py", "if _checksum(path) != checksum:", "if False:", "test_checkpoint.py"),
    Fault("train/checkpoint.py", "key=lambda p: -int(", "key=lambda p: int(", "test_checkpoint.py"),
    Fault(
        "host/config.py",
        "for n, (k, _) in sorted(kept.items()) if k != r}",
        "for n, (k, _) in sorted(kept.items()) if k > r}",
        "promises/test_every_checkpoint_is_plain_lora.py",
    ),
    Fault(
        "host/layers.py",
        "        hosted.is_stale = not is_start or bool(new_b.any())\n",
        "",
        "promises/test_every_checkpoint_is_plain_lora.py",
    ),
    Fault(
        "exporting/formats.py",
        "own[up] = own[up] * layer.scaling[name]",
        "own[up] = own[up]",
        "promises/test_contract.py",
    ),
    Fault(
        "exporting/formats.py",
        "torch.cat([own[up], -B0 * layer",
        "torch.cat([own[up], B0 * layer",
        "promises/test_every_tensor_is_accounted_for.py",
    ),
    Fault(
        "exporting/formats.py",
        'fields["lora_alpha"] = fields["r"]',
        'fields["lora_alpha"] = 2 * fields["r"]',
        "promises/test_contract.py",
    ),
    Fault(
        "exporting/switching.py",
        "        self._restore()\n        if name is None",
        "        if name is None",
        "test_switching.py",
    ),
    # -- budget and rates ------------------------------------------------------------------------------
    Fault(
        "budget.py",
        "site.in_features + site.out_features + has_e",
        "site.in_features + site.out_features",
        "test_budget.py",
    ),
    Fault(
        "budget.py", "self.total - spent - diagonals * steps_left", "self.total - spent - diagonals", "test_budget.py"
    ),
    Fault("budget.py", "else (low, middle - 1)", "else (low, middle - 2)", "test_budget.py"),
    Fault(
        "budget.py",
        "key=lambda place: (-cost[place], place[1])",
        "key=lambda place: (cost[place], place[1])",
        "test_budget.py",
    ),
    Fault("train/rates.py", "learning_rate * multiples.get(role, 1.0)", "learning_rate", "test_rates.py"),
    Fault("train/rates.py", "weight_decay if is_decayed else 0.0", "weight_decay", "test_rates.py"),
    # -- a decoder's loss --------------------------------------------------------------------------------
    Fault("app/answer_head.py", "_taken(hidden[:, :-1], ", "_taken(hidden[:, 1:], ", "test_answer_head.py"),
    Fault("app/answer_head.py", "self.is_same and torch.equal(", "self.is_same or torch.equal(", "test_answer_head.py"),
    Fault("app/answer_head.py", "ctx.saved_tensors[0] * grad", "ctx.saved_tensors[0]", "test_answer_head.py"),
]


class _FirstFailure:
    """A pytest plug-in: the first test that fails, set-up included."""

    node = ""

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed and not self.node:
            self.node = report.nodeid

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed and not self.node:
            self.node = f"{report.nodeid} (cannot be imported)"


def _run(copy: Path, what: str, answer: Any) -> None:
    """In a process of its own: run a file or a test, and send the first test that failed, or ""."""
    output = os.open(copy / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(copy)
    sys.dont_write_bytecode = True
    sys.path[:0] = [str(copy / "src"), str(copy / "tests"), str(copy)]
    import pytest

    import trimtab

    assert trimtab.__file__ is not None and Path(trimtab.__file__).is_relative_to(copy)
    first = _FirstFailure()
    code = int(pytest.main(["-q", "-x", "-p", "no:cacheprovider", "--no-header", what], plugins=[first]))
    answer.send((code, first.node))
    sys.stdout.flush()
    os._exit(0)


def failing(copy: Path, what: str) -> str:
    """The first test of a file that fails; "" if all pass."""
    ours, theirs = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_run, args=(copy, what, theirs))
    process.start()
    theirs.close()
    try:
        code, node = ours.recv()
    except EOFError:
        raise SystemExit(f"{what}: pytest did not run\n{(copy / 'output.txt').read_text()[-2000:]}") from None
    finally:
        process.join()
    if code not in (0, 1, 2) or (code and not node):
        raise SystemExit(f"{what}: pytest ended with {code}\n{(copy / 'output.txt').read_text()[-2000:]}")
    return node


def is_caught(fault: Fault, copy: Path) -> bool:
    """Try one fault, say which test sees it, and take it back."""
    path = copy / CORE / fault.file
    whole = path.read_text("utf-8")
    name = f"{fault.file}: {' '.join(fault.old.split())[:60]}"
    if whole.count(fault.old) != 1:
        print(f"NOT FOUND  {name}: its text stands {whole.count(fault.old)} times in the file", flush=True)
        return False
    path.write_text(whole.replace(fault.old, fault.new), encoding="utf-8")
    try:
        node = failing(copy, f"tests/{fault.seen_by}")
    finally:
        path.write_text(whole, encoding="utf-8")
    if node and not node.endswith(")") and failing(copy, node):
        print(f"IN VAIN    {name}: {node} fails without the fault, too", flush=True)
        return False
    print(f"{'caught   ' if node else 'NOT CAUGHT'} {name}: {node or f'{fault.seen_by} passes'}", flush=True)
    return bool(node)


def main(words: list[str]) -> int:
    chosen = [f for f in FAULTS if not words or any(word in text for word in words for text in f)]
    os.environ["PYTHONDONTWRITEBYTECODE"] = os.environ["OMP_NUM_THREADS"] = "1"
    import peft
    import torch
    import transformers

    assert peft and transformers
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in ("src", "tests"):
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", copy)
        caught = sum([is_caught(fault, copy) for fault in chosen])
    print(f"{caught} of {len(chosen)} faults were caught")
    return int(caught < len(chosen))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
