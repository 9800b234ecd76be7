"""Writing Python: trained on instruction rows, scored by running what it writes (pass@k).

Training rows are Code-Feedback's (query, answer), Code-Alpaca's (instruction, input, output) or any other
form that `instruct.py` reads. Rows of HumanEval (Chen et al. 2021) and MBPP (Austin et al. 2021) are known by
their columns, and scored: a program is what the model wrote, followed by the row's tests.

The model is asked in a message, and its answer begins with the opened code block (and, for HumanEval, the
function's head), up to the closing fence. With `continues_prompt` it continues the bare prompt instead.

Generated programs run only when `allow_code_execution` says so, in `sandbox.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

from ...errors import ConfigError, DataError
from .answering import check_choice, mean_of
from .data import Columns, column, texts
from .generation import Decoding
from .instruct import Instruct
from .messages import Message
from .sandbox import Limits, require_isolation, run_programs

if TYPE_CHECKING:
    from datasets import Dataset

FENCE = "```"
OPEN = "```python\n"
_NOT_RUN = "pass@k not scored: running generated code needs task.allow_code_execution=true"
# Where a bare continuation has left what was asked for: HumanEval as in Chen et al. 2021, section 2.1, MBPP as in
# bigcode-evaluation-harness; fences, decorators and assertions besides.
BARE_STOPS = {
    "humaneval": ("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint(", "\n@", "\nassert ", "\n```"),
    "mbpp": ("\nclass ", "\nassert", '\n"""', "\nprint", "\nif ", "\n```"),
}
BENCHMARKS: dict[str, tuple[str, str | None, str]] = {
    "humaneval": ("openai/openai_humaneval", None, "test"),
    "mbpp": ("google-research-datasets/mbpp", "full", "test"),
}


@dataclass(kw_only=True)
class Code(Instruct):
    """Instruction tuning on code, and pass@k of the programs that are written."""

    name: str = "code"
    benchmark: str = "humaneval"
    """What is fetched from the hub for scoring, where no files are given: humaneval or mbpp."""
    allow_code_execution: bool = False
    """Run generated programs, isolated from files, network and other processes."""
    force_code_execution: bool = False
    """Run them even where this machine cannot isolate them."""
    k: list[int] = field(default_factory=lambda: [1])
    """pass@k for each; needs at least as many `generation.samples`."""
    continues_prompt: bool = False
    """Ask by letting the model continue the bare prompt, as base models are scored."""
    cpu_seconds: int = Limits.cpu_seconds
    """Processor time that one program may take."""
    memory_bytes: int = Limits.memory_bytes
    """Address space that one program may take."""

    decoding_defaults: ClassVar[Mapping[str, Any]] = {"max_new_tokens": 512}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("task.benchmark", self.benchmark, BENCHMARKS)
        self.k = [self.k] if isinstance(self.k, int) else self.k
        if not isinstance(self.k, list) or not self.k or not all(isinstance(k, int) and k >= 1 for k in self.k):
            raise ConfigError("task.k", self.k, "whole numbers, at least 1")
        if max(self.k) > self.decoding.samples:
            raise ConfigError(
                "task.k", self.k, f"needs task.generation.samples={max(self.k)} or more; it is {self.decoding.samples}"
            )
        if self.decoding.samples > 1 and "temperature" not in self.decoding.others:
            raise ConfigError(
                "task.generation.temperature",
                None,
                "needed when several samples are drawn (0.2 for pass@1, 0.8 for pass@10 and more)",
            )
        for key in ("cpu_seconds", "memory_bytes"):
            value = getattr(self, key)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"task.{key}", value, "a whole number, at least 1")
        if self.allow_code_execution:
            require_isolation(self.force_code_execution)
            self.metric, self.greater_is_better = f"pass@{self.k[0]}", True

    @property
    def hub_sources(self) -> Mapping[str, tuple[str, str | None, str]]:
        return {"train": ("m-a-p/CodeFeedback-Filtered-Instruction", None, "train"), "test": BENCHMARKS[self.benchmark]}

    def conversations(self, split: str, table: Columns, source: str) -> Columns:
        return _benchmark(table, source) or super().conversations(split, table, source)

    def questions(self, table: Columns, source: str) -> Columns:
        return _benchmark(table, source) or super().questions(table, source)

    def needs_generation(self, rows: Dataset) -> bool:
        if "tests" not in rows.column_names:
            return False
        if self.allow_code_execution:
            require_isolation(self.force_code_execution)  # before hours of answers are written
        elif _NOT_RUN not in self.notes:
            self.notes.append(_NOT_RUN)
        return self.allow_code_execution

    def decoding_for(self, rows: Dataset) -> Decoding:
        """As set, with what ends a program beside the user's own ends."""
        if "benchmark" not in rows.column_names:
            return self.decoding
        ends = BARE_STOPS[rows[0]["benchmark"]] if self.continues_prompt else ("\n" + FENCE,)
        return replace(self.decoding, stop=(*self.decoding.stop, *ends))

    def question_text(self, row: Mapping[str, Any], tokenizer: Any, where: str) -> str:
        if "benchmark" not in row:
            return super().question_text(row, tokenizer, where)
        # Without its last line break: tokenizers join it with the indentation that comes next.
        if self.continues_prompt:
            text = self._text_tokenizer(tokenizer)
            begins = text.bos_token if text("a")["input_ids"][:1] == [text.bos_token_id] else ""
            return begins + row["bare_prompt"].rstrip("\n")
        asked = super().question_text(row, tokenizer, where) + self.lead(row["messages"], tokenizer, where)
        return asked + (OPEN + row["head"]).rstrip("\n")

    def _lead_as_written(self, row: Mapping[str, Any], tokenizer: Any, where: str) -> str:
        return "" if "benchmark" in row else super()._lead_as_written(row, tokenizer, where)

    def score(self, rows: Dataset, answers: list[list[str]]) -> tuple[dict[str, float], list[dict[str, Any]]]:
        programs = [self.program(row, answer) for row, samples in zip(rows, answers) for answer in samples]
        limits = Limits(cpu_seconds=self.cpu_seconds, memory_bytes=self.memory_bytes)
        verdicts = run_programs(programs, limits, force=self.force_code_execution)
        scored = []
        for row, samples in zip(rows, answers):
            own = [next(verdicts) for _ in samples]
            scored.append({"task": row["task"], "passed": [v.passed for v in own], "reasons": [v.reason for v in own]})
        counts = [(len(row["passed"]), sum(row["passed"])) for row in scored]
        return {f"pass@{k}": mean_of(pass_at_k(n, c, k) for n, c in counts) for k in self.k}, scored

    def program(self, row: Mapping[str, Any], answer: str) -> str:
        """The whole program: what was given, what the model wrote, and the row's tests."""
        if self.is_encoder_decoder:  # begins its answer by itself
            body = answer.split(OPEN)[-1].split(FENCE)[0]
        else:
            body = row["head"].rstrip("\n") + answer.split("\n" + FENCE)[0]
        return f"{body}\n{row['tests']}\n"


def pass_at_k(n: int, c: int, k: int) -> float:
    """Chance that one of k answers passes, from c of n that did: 1 − C(n−c, k) / C(n, k), without bias.

    Source: Chen et al. 2021, section 2.1.

    >>> round(pass_at_k(4, 1, 2), 6), pass_at_k(4, 0, 2), pass_at_k(4, 3, 2)
    (0.5, 0.0, 1.0)
    """
    if not 1 <= k <= n or not 0 <= c <= n:
        raise ValueError(f"n={n}, c={c}, k={k}: need 1 <= k <= n and 0 <= c <= n")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def _benchmark(table: Columns, source: str) -> Columns | None:
    """Rows that are scored by running programs; None of any others."""
    if {"entry_point", "canonical_solution", "test", "prompt"} <= set(table):
        return _humaneval(table, source)
    return _mbpp(table, source) if {"test_list", "code"} <= set(table) else None


def _humaneval(table: Columns, source: str) -> Columns:
    asked = "HumanEval rows"
    prompts, solutions, tests, names, ids = (
        texts(column(table, name, asked, source), name, source)
        for name in ("prompt", "canonical_solution", "test", "entry_point", "task_id")
    )
    ask = "Complete this Python function. Answer with the whole function.\n\n"
    return {
        "messages": [
            _turns(f"{ask}{OPEN}{prompt}{FENCE}", f"{prompt}{solution}") for prompt, solution in zip(prompts, solutions)
        ],
        "benchmark": ["humaneval"] * len(prompts),
        "task": ids,
        "bare_prompt": prompts,
        "head": prompts,
        "tests": [f"{test}\ncheck({name})" for test, name in zip(tests, names)],
    }


def _mbpp(table: Columns, source: str) -> Columns:
    asked = "MBPP rows"
    name = "text" if "text" in table else "prompt"  # the sanitised version calls it prompt
    problems, solutions, ids = (
        texts(column(table, column_name, asked, source), column_name, source)
        for column_name in (name, "code", "task_id")
    )
    lists = column(table, "test_list", asked, source)
    n = len(lists)
    setups = [
        "\n".join([*(imports or []), setup or ""])
        for imports, setup in zip(table.get("test_imports", [None] * n), table.get("test_setup_code", [None] * n))
    ]
    for i, tests in enumerate(lists, 1):
        if not isinstance(tests, list) or not tests or not all(isinstance(test, str) for test in tests):
            raise DataError(f"{source}: row {i} has no list of tests in column 'test_list'")
    solutions = [solution.replace("\r\n", "\n") for solution in solutions]
    return {
        "messages": [
            _turns(f"{problem}\n\nYour code should pass these tests:\n\n" + "\n".join(tests), solution)
            for problem, tests, solution in zip(problems, lists, solutions)
        ],
        "benchmark": ["mbpp"] * n,
        "task": ids,
        # As in bigcode-evaluation-harness, after InCoder (Fried et al. 2022): a docstring with one test.
        "bare_prompt": [f'"""\n{problem}\n{tests[0]}\n"""\n' for problem, tests in zip(problems, lists)],
        "head": [""] * n,
        "tests": ["\n".join([setup, *tests]) for setup, tests in zip(setups, lists)],
    }


def _turns(question: str, code: str) -> list[Message]:
    return [
        {"role": "user", "content": question},
        {"role": "assistant", "content": OPEN + code.rstrip() + "\n" + FENCE},
    ]
