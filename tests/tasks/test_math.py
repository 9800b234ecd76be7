"""Final numbers: how they are read, and a whole evaluation by hand."""

import json

import pytest

from tasks.stand_ins import Reciter, byte_model, byte_tokenizer, data_pack, write_jsonl
from trimtab.app.tasks import get_task
from trimtab.app.tasks.math import flexible_answer, gold_of, is_same, number_of, strict_answer
from trimtab.errors import ConfigError

GSM = [
    {"question": "2 + 2?", "answer": "Two and two is <<2+2=4>>4.\n#### 4"},
    {"question": "Half of 2400?", "answer": "It is <<2400/2=1200>>1,200.\n#### 1,200"},
    {"question": "Owes 3?", "answer": "So:\n#### -3"},
    {"question": "3 * 6?", "answer": "#### 18"},
]


@pytest.mark.parametrize(
    ("text", "strict", "flexible"),
    [
        ("It is 18.\n#### 18", "18", "18"),
        ("#### $18.00", "$18.00", "$18.00"),
        ("The answer is 18.", None, "18"),
        ("####18\n\nThen 5 more", "18", "5"),
        ("#### 7\n#### 18", "7", "18"),  # the first mark counts, as in lm-eval
        ("20-2", None, "2"),
        ("It is -18", None, "-18"),
        ("#### eighteen", None, None),
        ("", None, None),
        ("5/18.", None, "18"),
        ("1,800 / 100 = 18%", None, "18"),
    ],
)
def test_the_two_readings_of_a_number(text, strict, flexible):
    assert strict_answer(text, ["####"], "18") == strict
    assert flexible_answer(text, "18") == flexible


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("18", 18),
        ("18.0", 18),
        ("$1,800.50", "1800.50"),
        (" -3 ", -3),
        ("-$3", -3),
        (".5", "0.5"),
        ("18.", 18),
        ("5%", 5),
        ("1,8", None),
        ("1, 2", None),
        ("1, 200", None),
        ("2 1/2", None),
        ("\u22123", -3),
        ("C", None),
        ("", None),
        ("1/2", None),
        ("nan", None),
        ("infinity", None),
        ("1e5", None),
        ("²", None),
    ],
)
def test_numbers_are_numbers_however_they_are_written(text, number):
    from decimal import Decimal

    assert number_of(text) == (None if number is None else Decimal(number))


def test_other_right_answers_than_numbers():
    assert gold_of("So it is five. The answer is (C).") == "C"
    assert flexible_answer("A cat? I choose (B), not C... so B", "C") == "B"
    assert strict_answer("#### (C)", ["####"], "C") == "C"
    assert strict_answer("#### Cats", ["####"], "C") is None
    assert gold_of("Hence $x$. The answer is: $\\frac{1}{2}$") == "$\\frac{1}{2}$"
    assert is_same(flexible_answer("The answer is: \\frac{1}{2}.", "$\\frac{1}{2}$"), "$\\frac{1}{2}$")
    assert gold_of("The answer is 18 hours.") == "18"
    assert gold_of("The answer is: 5x + 3") == "5x + 3"
    assert gold_of("No number is stated") is None


@pytest.mark.parametrize(
    ("solution", "gold", "answer"),
    [
        ("The roots.\n#### 1, 2", "1, 2", "#### 1, 2"),
        ("So.\n#### 1,5", "1,5", "#### 1,5"),
        ("The answer is 42. Hope this helps!", "42", "It is 42"),
        ("The answer is **42**.", "42", "It is 42"),
        ("**Final answer:** 42", "42", "It is 42"),
        ("12 * 3\nFinal Answer: 36", "36", "It is 36"),
        ("So we get $\\boxed{12}$.", "12", "It is 12"),
        ("So we get $\\boxed{\\frac{1}{2}}$.", "\\frac{1}{2}", "First\n\\boxed{\\frac{1}{2}}"),
        ("The final answer is $12$. I hope it is correct.", "$12", "It is 12"),
        ("#### \\$1,200", "$1,200", "1200"),
        ("#### 12 km/h", "12", "12 km/h"),
        ("#### 2 million", "2 million", "#### 2 million"),
        ("#### \u22123", "-3", "-3"),
        ("#### 3\u20ac", "3", "\u20ac3"),
        ("The answer is (B) 12 km", "B", "B"),
    ],
)
def test_a_stated_answer_ends_with_its_sentence_and_is_read_without_marks_around_it(solution, gold, answer):
    assert gold_of(solution) == gold
    assert is_same(flexible_answer(answer, gold), gold)
    assert is_same(flexible_answer(solution, gold), gold)


def test_numbers_that_only_look_alike_without_commas_or_blanks_differ():
    assert not is_same("15", "1,5") and not is_same("21/2", "2 1/2") and not is_same("12", "1, 2")
    assert strict_answer("#### **42**", ["####"], "42") == "42"
    assert strict_answer("so $\\boxed{42}$", ["so"], "42") == "42"


def test_fractions_written_out_agree_to_a_millionth_and_whole_numbers_exactly():
    assert is_same("1.3333333", "1.3333333333333333")
    assert not is_same("1.33", "1.3333333333333333")
    assert not is_same("100000001", "100000000")


@pytest.mark.parametrize("digits", [40, 5000])
def test_a_number_that_a_model_repeated_without_end_is_wrong_and_no_accident(digits):
    assert not is_same("1" * digits, "18") and not is_same("1" * digits + ".5", "18.5")
    assert is_same("1" * digits, "1" * digits)
    assert flexible_answer("\\boxed{" * digits, "x") is None and gold_of("\\boxed " * digits) is None
    assert flexible_answer("111," * digits + "1", "18") == "1"  # soon


def score(tmp_path, reply, rows=GSM, settings=None, **more):
    task = get_task({"name": "math", **(settings or {})})
    raw = task.load_data({"test": write_jsonl(tmp_path / "test.jsonl", rows)})
    tokenizer = byte_tokenizer()
    model = Reciter(tokenizer, reply)
    return task.evaluate(model, tokenizer, raw, "test", **more), model


def test_a_whole_evaluation_by_hand(tmp_path):
    said = {
        "2 + 2": "2+2=4\n#### 4",
        "2400": "That is $1200.00.",
        "Owes": "#### 3",
        "3 * 6": "18\n#### 19\nQuestion: 1",
    }
    scores, _ = score(
        tmp_path, lambda prompt: next(text for key, text in said.items() if key in prompt), folder=tmp_path / "out"
    )
    # Strict: the first alone. Flexible: the first two; the last is 19 once the next question is cut off.
    assert scores == {"exact_match_flexible": 0.5, "exact_match_strict": 0.25}
    rows = [json.loads(line) for line in (tmp_path / "out" / "test_scored.jsonl").read_text().splitlines()]
    assert rows[2] == {"row": 2, "gold": "-3", "strict": [False], "flexible": [False]}
    assert len((tmp_path / "out" / "test_answers.jsonl").read_text().splitlines()) == 4


def test_answers_in_the_folder_are_not_asked_for_again(tmp_path):
    settings = {"generations": str(tmp_path / "out"), "generation": {"batch_size": 1}}
    assert score(tmp_path, lambda _: "#### 4", settings=settings)[1].calls == 4
    scores, model = score(tmp_path, lambda _: "#### 5", settings=settings)
    assert (scores["exact_match_strict"], model.calls) == (0.25, 0)


def test_other_marks_and_an_instruction_before_every_problem(tmp_path):
    prompts = []
    scores, _ = score(
        tmp_path,
        lambda prompt: prompts.append(prompt) or "The answer is: 4",
        GSM[:1],
        {"marks": ["The answer is:"], "instruction": "Think."},
    )
    assert scores["exact_match_strict"] == 1.0
    assert "### Instruction:\nThink.\n\n2 + 2?\n\n### Response:\n" in prompts[0]


@pytest.mark.parametrize("keep", [False, True])
def test_calculator_marks_are_learned_only_when_asked_for(tmp_path, keep):
    task = get_task({"name": "math", "calculator_marks": keep})
    rows = task.load_data({"train": write_jsonl(tmp_path / "t.jsonl", GSM)})
    assert ("<<2+2=4>>" in rows["train"][0]["messages"][-1]["content"]) == keep


def test_right_answers_come_from_their_column_or_from_the_solution(tmp_path):
    def golds(rows):
        task = get_task({"name": "math"})
        return task.load_data({"test": write_jsonl(tmp_path / "t.jsonl", rows)})["test"]["gold"][:]

    assert golds([{"instruction": "?", "input": "", "output": "Four. The answer is 5.", "answer": "4.0"}]) == ["4.0"]
    assert golds([{"query": "?", "response": "So 4.\n#### 4\nThe answer is: 4", "type": "GSM"}]) == ["4"]
    assert golds([{"instruction": "?", "output": "I do not know."}]) == [None]
    for stated, gold in (
        ("12 km", "12"), ("(B)", "B"), ("B) 12 km", "B"), ("12*1=12\n#### 12", "12"), ("Paris", "Paris"),
    ):  # fmt: skip
        assert golds([{"instruction": "?", "output": "He runs.", "answer": stated}]) == [gold]


def test_rows_that_state_no_answer_are_counted_in_every_split_that_is_scored(tmp_path):
    task = get_task({"name": "math"})
    rows = [{"question": "?", "answer": text} for text in ("#### 1", "Who knows.", "Nobody does.")]
    file = write_jsonl(tmp_path / "t.jsonl", rows)
    task.load_data({"train": file, "test": file})
    assert "test: 2 of 3 rows state no final answer and are not scored" in task.notes
    task.load_data({"train": file, "test": write_jsonl(tmp_path / "u.jsonl", rows[1:])})
    assert any("test: no row states a final answer: exact match is not scored; it is known by" in n for n in task.notes)


def test_rows_without_a_right_answer_are_not_scored(tmp_path):
    assert score(tmp_path, lambda _: "4", [{"instruction": "?", "output": "Who knows."}])[0] == {}
    rows = [{"instruction": "?", "output": "Who knows."}, {"instruction": "?", "output": "The answer is 4."}]
    assert score(tmp_path, lambda _: "4", rows)[0]["exact_match_flexible"] == 1.0


def test_test_rows_are_the_headline_and_validation_rows_come_second(tmp_path):
    file = write_jsonl(tmp_path / "t.jsonl", GSM)
    task = get_task({"name": "math"})
    raw = task.load_data({"train": file, "validation": file, "test": file})
    ready = task.prepare(raw, byte_tokenizer(), byte_model())
    assert task.eval_splits(ready) == ["test", "validation"]
    assert (task.metric, task.greater_is_better, task.training_metric) == ("exact_match_flexible", True, "answer_loss")
    assert not get_task({"name": "math", "metric": "answer_loss"}).greater_is_better


def test_a_tiny_model_is_scored_from_end_to_end(tmp_path):
    task = get_task({"name": "math", "generation": {"max_new_tokens": 8, "batch_size": 2}})
    raw = task.load_data({"test": write_jsonl(tmp_path / "t.jsonl", GSM)})
    scores = task.evaluate(byte_model(), byte_tokenizer(), raw, "test")
    assert scores == {"exact_match_flexible": 0.0, "exact_match_strict": 0.0}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"metric": "exact_match"}, r"task\.metric='exact_match': not known\. Did you mean 'exact_match_strict'\?"),
        ({"marks": []}, r"task\.marks=\[\]: a list of texts"),
        ({"generation": {"samples": 0}}, r"task\.generation\.samples=0"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        get_task({"name": "math", **settings})


def test_prompts_that_do_not_fit_keep_their_end(tmp_path):
    rows = [{"question": "x" * 100 + "?", "answer": "#### 1"}]
    task = get_task({"name": "math", "template": "plain", "generation": {"max_new_tokens": 24}})
    raw = task.load_data({"test": write_jsonl(tmp_path / "t.jsonl", rows)})
    task.evaluate(byte_model("gpt2"), byte_tokenizer(), raw, "test")
    assert task.notes[-1] == "test: 1 of 1 prompts cut on the left to 40 tokens"
    task = get_task({"name": "math", "generation": {"max_new_tokens": 64}})
    with pytest.raises(ConfigError, match=r"task\.generation\.max_new_tokens=64: fewer than 64"):
        task.evaluate(byte_model("gpt2"), byte_tokenizer(), raw, "test")


def test_every_reference_solution_of_the_real_rows_scores():
    task = get_task({"name": "math"})
    raw = task.load_data(
        {"test": str(data_pack("gsm8k") / "test.jsonl"), "validation": str(data_pack("math_instruct") / "train.jsonl")}
    )
    for split, strict, flexible in (("test", 1.0, 1.0), ("validation", 0.0, 0.99)):
        scores, _ = task.score(raw[split], [[turns[-1]["content"]] for turns in raw[split]["messages"]])
        assert scores["exact_match_strict"] == strict
        assert scores["exact_match_flexible"] >= flexible
