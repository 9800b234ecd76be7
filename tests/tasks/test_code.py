"""pass@k: the estimator, the programs that are run, and a whole evaluation by hand."""

import itertools
import json

import pytest

from tasks.stand_ins import Reciter, byte_model, byte_tokenizer, data_pack, write_jsonl
from trimtab.app.tasks import get_task, sandbox
from trimtab.app.tasks.code import pass_at_k
from trimtab.app.tasks.data import DataSpec
from trimtab.errors import ConfigError, DataError

isolated = pytest.mark.skipif(bool(sandbox.isolation().lacks), reason=f"no isolation: {sandbox.isolation().missing}")

HUMANEVAL = [
    {
        "task_id": "T/0",
        "prompt": 'def double(x):\n    """Twice x."""\n',
        "canonical_solution": "    return 2 * x\n",
        "test": "def check(candidate):\n    assert candidate(3) == 6\n",
        "entry_point": "double",
    },
    {
        "task_id": "T/1",
        "prompt": 'def half(x):\n    """x over two."""\n',
        "canonical_solution": "    return x / 2\n",
        "test": "def check(candidate):\n    assert candidate(3) == 1.5\n",
        "entry_point": "half",
    },
]
MBPP = [
    {
        "task_id": 7,
        "text": "Write a function to add one.",
        "code": "def one(x):\r\n    return x + 1",
        "test_list": ["assert one(1) == 2", "assert one(-1) == 0"],
        "test_setup_code": "import math",
        "challenge_test_list": [],
    }
]


def test_pass_at_k_is_the_share_of_choices_with_a_right_one():
    for n in range(1, 6):
        for c in range(n + 1):
            for k in range(1, n + 1):
                choices = list(itertools.combinations([True] * c + [False] * (n - c), k))
                assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, choices)) / len(choices))
    # Chen et al. 2021: 1 − C(n−c, k)/C(n, k); 200 samples of which 10 pass.
    assert pass_at_k(200, 10, 1) == pytest.approx(0.05)
    assert pass_at_k(200, 10, 100) == pytest.approx(0.9992, abs=1e-4)


@pytest.mark.parametrize("wrong", [(1, 1, 2), (2, 3, 1), (2, 1, 0), (2, -1, 1)])
def test_pass_at_k_of_impossible_counts_is_refused(wrong):
    with pytest.raises(ValueError, match="need 1 <= k <= n and 0 <= c <= n"):
        pass_at_k(*wrong)


def evaluate(tmp_path, reply, rows=HUMANEVAL, chat=False, **settings):
    task = get_task({"name": "code", "allow_code_execution": True, **settings})
    raw = task.load_data({"test": write_jsonl(tmp_path / "test.jsonl", rows)})
    tokenizer = byte_tokenizer(chat=chat)
    return task.evaluate(Reciter(tokenizer, reply), tokenizer, raw, "test", folder=tmp_path / "out")


@isolated
@pytest.mark.parametrize("chat", [True, False])
def test_a_model_is_asked_to_complete_the_opened_block(tmp_path, chat):
    prompts = []

    def reply(prompt):
        prompts.append(prompt)
        return "\n    return 2 * x\n```\nThis works because 1 / 0."

    assert evaluate(tmp_path, reply, chat=chat) == {"pass@1": 0.5}
    begins = "[user]Complete" if chat else "Below is an instruction"
    assert all(prompt.startswith(begins) for prompt in prompts)
    ends = ("[assistant]" if chat else "### Response:\n") + '```python\ndef double(x):\n    """Twice x."""'
    assert any(prompt.endswith(ends) for prompt in prompts)
    rows = [json.loads(line) for line in (tmp_path / "out" / "test_scored.jsonl").read_text().splitlines()]
    assert rows == [
        {"task": "T/0", "passed": [True], "reasons": [""]},
        {"task": "T/1", "passed": [False], "reasons": ["AssertionError"]},
    ]


@isolated
def test_a_base_model_continues_the_bare_prompt_up_to_the_next_top_level_line(tmp_path):
    prompts = []

    def reply(prompt):
        prompts.append(prompt)
        return "\n    return 2 * x\n\ndef other():\n    raise\nprint(1 / 0)"

    assert evaluate(tmp_path, reply, continues_prompt=True) == {"pass@1": 0.5}
    assert 'def double(x):\n    """Twice x."""' in prompts


@isolated
def test_mbpp_rows_are_asked_with_their_tests(tmp_path):
    prompts = []
    solution = "\ndef one(x):\n    return x + int(math.sqrt(1))\n"

    def reply(prompt):
        prompts.append(prompt)
        return solution + ("```" if prompt.endswith("```python") else "assert False")

    assert evaluate(tmp_path, reply, rows=MBPP, chat=True) == {"pass@1": 1.0}
    assert "Write a function to add one.\n\nYour code should pass these tests:\n\nassert one(1) == 2\n" in prompts[0]
    assert evaluate(tmp_path, reply, rows=MBPP, continues_prompt=True) == {"pass@1": 1.0}
    assert prompts[1] == '"""\nWrite a function to add one.\nassert one(1) == 2\n"""'
    sanitised = [
        {
            "task_id": 7,
            "prompt": "Add one.",
            "code": MBPP[0]["code"],
            "test_imports": ["import math"],
            "test_list": MBPP[0]["test_list"],
        }
    ]
    assert evaluate(tmp_path, reply, rows=sanitised, chat=True) == {"pass@1": 1.0}


@isolated
def test_several_samples_give_pass_at_each_k(tmp_path):
    replies = itertools.cycle(["\n    return 2 * x\n```", "\n    return 0\n```"])
    scores = evaluate(
        tmp_path, lambda _: next(replies), rows=HUMANEVAL[:1], k=[1, 2], generation={"samples": 4, "temperature": 0.8}
    )
    assert scores == {"pass@1": 0.5, "pass@2": pytest.approx(1 - 1 / 6)}  # C(2,2)/C(4,2)


@isolated
def test_what_a_model_writes_is_stopped_and_scored_as_failed(tmp_path):
    def reply(prompt):
        return (
            "\n    while True: pass\n```"
            if "double" in prompt
            else "\n    open('/tmp/trimtab-outside', 'w')\n    return x / 2\n```"
        )

    assert evaluate(tmp_path, reply, cpu_seconds=1) == {"pass@1": 0.0}
    reasons = [
        json.loads(line)["reasons"][0] for line in (tmp_path / "out" / "test_scored.jsonl").read_text().splitlines()
    ]
    assert "CPU time" in reasons[0]
    assert "Permission denied" in reasons[1]


def test_nothing_runs_without_the_flag(tmp_path, monkeypatch):
    monkeypatch.setattr(sandbox, "_start", lambda *_, **__: pytest.fail("a program was started"))
    task = get_task({"name": "code"})
    raw = task.load_data({"test": write_jsonl(tmp_path / "test.jsonl", HUMANEVAL)})
    assert task.evaluate(None, byte_tokenizer(), raw, "test") == {}
    assert task.notes == ["pass@k not scored: running generated code needs task.allow_code_execution=true"]
    assert (task.metric, task.greater_is_better) == ("answer_loss", False)


def test_a_machine_without_isolation_is_told_at_the_start(monkeypatch):
    monkeypatch.setattr(sandbox, "isolation", lambda: sandbox.Isolation((), {"seccomp": "no such call"}))
    with pytest.raises(ConfigError, match=r"task\.allow_code_execution=True: this machine cannot guarantee no network"):
        get_task({"name": "code", "allow_code_execution": True})
    assert get_task({"name": "code", "allow_code_execution": True, "force_code_execution": True}).metric == "pass@1"


def test_reference_solutions_are_learned_and_lossed_as_answers(tmp_path):
    task = get_task({"name": "code"})
    raw = task.load_data(
        {
            "train": write_jsonl(tmp_path / "t.jsonl", [{"query": "Hi?", "answer": "print('hi')"}]),
            "validation": write_jsonl(tmp_path / "v.jsonl", HUMANEVAL),
            "test": write_jsonl(tmp_path / "m.jsonl", MBPP),
        }
    )
    ready = task.prepare(raw, byte_tokenizer(), byte_model())
    answers = [
        byte_tokenizer().decode([t for t in ready[split][0]["labels"] if t != -100])
        for split in ("train", "validation", "test")
    ]
    assert answers == [
        "print('hi')</s>",
        '```python\ndef double(x):\n    """Twice x."""\n    return 2 * x\n```</s>',
        "```python\ndef one(x):\n    return x + 1\n```</s>",
    ]
    assert task.eval_splits(ready) == ["test", "validation"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"benchmark": "humanevall"}, r"task\.benchmark='humanevall': not known\. Did you mean 'humaneval'\?"),
        ({"k": [1, 10]}, r"task\.k=\[1, 10\]: needs task\.generation\.samples=10 or more; it is 1"),
        ({"k": []}, r"task\.k=\[\]: whole numbers"),
        ({"k": 2, "generation": {"samples": 2}}, r"task\.generation\.temperature=None: needed when several"),
        ({"cpu_seconds": 0}, r"task\.cpu_seconds=0: a whole number, at least 1"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        get_task({"name": "code", **settings})


def test_rows_without_tests_are_reported(tmp_path):
    with pytest.raises(DataError, match=r"row 1 has no list of tests in column 'test_list'"):
        get_task({"name": "code"}).load_data(
            {"test": write_jsonl(tmp_path / "t.jsonl", [{**MBPP[0], "test_list": []}])}
        )


def test_the_hub_gives_training_rows_and_the_benchmark():
    assert get_task({"name": "code"}).hub_sources["test"] == ("openai/openai_humaneval", None, "test")
    assert get_task({"name": "code", "benchmark": "mbpp"}).hub_sources["test"][1] == "full"


@isolated
@pytest.mark.parametrize(("name", "continues"), [("humaneval", False), ("humaneval", True), ("mbpp", False)])
def test_a_model_that_knows_the_reference_solutions_passes(tmp_path, name, continues):
    task = get_task({"name": "code", "allow_code_execution": True, "continues_prompt": continues})
    raw = task.load_data({"test": str(data_pack(name) / "test.jsonl"), "max_samples": 4})
    rows = list(raw["test"])

    def reply(prompt):
        row = next(
            row for row in rows if row["messages"][0]["content"] in prompt or row["bare_prompt"].rstrip("\n") in prompt
        )
        code = row["messages"][-1]["content"].removeprefix("```python\n").removesuffix("\n```")
        return "\n" + code.removeprefix(row["head"]).lstrip("\n") + "\n```\nDone."

    tokenizer = byte_tokenizer()
    assert task.evaluate(Reciter(tokenizer, reply), tokenizer, raw, "test") == {"pass@1": 1.0}


def test_a_program_is_asked_for_behind_what_the_template_writes_before_an_answer(tmp_path):
    task = get_task({"name": "code"})
    raw = task.load_data({"test": write_jsonl(tmp_path / "t.jsonl", HUMANEVAL)})
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ '(none)' if m.role == 'assistant' }}{{ m.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    ids = task.prepare(raw, tokenizer, byte_model())["test"][0]["input_ids"]
    learned = tokenizer.decode(ids)
    assert learned.startswith(task.question_text(raw["test"][0], tokenizer, "row"))


@pytest.mark.parametrize("continues", [False, True])
def test_rows_to_be_predicted_are_asked_as_their_kind_is_trained_and_scored(tmp_path, continues):
    task = get_task({"name": "code", "template": "plain", "continues_prompt": continues})
    tokenizer, asked = byte_tokenizer(), []

    def reply(prompt):
        asked.append(prompt)
        return "So:\n```python\n1\n```"

    def answers(rows):
        n, raw, places = task.ask(DataSpec.read({"test": write_jsonl(tmp_path / "f.jsonl", rows)}, ("test",)))
        assert (n, places) == (len(rows), list(range(len(rows))))
        return task.answers(Reciter(tokenizer, reply), tokenizer, raw, "test")

    assert answers([{"instruction": "Print 1."}]) == [["So:\n```python\n1\n```"]]
    assert asked.pop() == "Print 1."
    assert answers(HUMANEVAL[:1]) == [["So:"]]
    assert asked.pop().endswith('def double(x):\n    """Twice x."""')


@isolated
def test_a_tiny_model_is_scored_from_end_to_end(tmp_path):
    task = get_task({"name": "code", "allow_code_execution": True, "generation": {"max_new_tokens": 4}})
    raw = task.load_data({"test": str(data_pack("humaneval") / "test.jsonl"), "max_samples": 2})
    assert task.evaluate(byte_model(), byte_tokenizer(), raw, "test") == {"pass@1": 0.0}
