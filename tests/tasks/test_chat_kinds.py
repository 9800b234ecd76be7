"""Kinds of instruction and chat rows as people have them: the row -> the conversation, and which words are learned."""

import json

import pandas
import pytest

from tasks.stand_ins import byte_model, byte_tokenizer, tiny_config, write_jsonl
from trimtab.app.tasks import get_task
from trimtab.app.tasks.data import DataSpec
from trimtab.errors import TrimtabError


def user(text):
    return {"role": "user", "content": text}


def says(text, **more):
    return {"role": "assistant", "content": text, **more}


def human(text):
    return {"from": "human", "value": text}


def gpt(text, **more):
    return {"from": "gpt", "value": text, **more}


CALL = {"name": "add", "arguments": {"a": 1}}
CALLING = says(None, tool_calls=[{"id": "1", "type": "function", "function": {**CALL, "arguments": '{"a": 1}'}}])
HI = "[user]Hi<|end|>\n[assistant]"
CHAT_TEMPLATE = (
    "{% if tools %}[tools]{{ tools | tojson }}{% endif %}"
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<call {{ call.function.name }} {{ call.function.arguments | tojson }}>{% endfor %}"
    "<|end|>{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)

# Name -> (row, settings, what is read and not learned / «what is learned»).
ROWS = {
    "ShareGPT with a system column": (
        {"system": "Be brief.", "conversations": [human("Hi"), gpt("Yo")]}, {}, "[system]Be brief.<|end|>\n" + HI + "«Yo<|end|>»",
    ),
    "ShareGPT with a system turn": (
        {"conversations": [{"from": "system", "value": "Be brief."}, human("Hi"), gpt("Yo")]}, {}, "[system]Be brief.<|end|>\n" + HI + "«Yo<|end|>»",
    ),
    "ShareGPT that gpt begins": (
        {"conversations": [gpt("Welcome"), human("Hi"), gpt("Yo")]}, {}, "[assistant]Welcome<|end|>\n" + HI + "«Yo<|end|>»",
    ),
    "ShareGPT that gpt begins after the system": (
        {"system": "S", "conversations": [gpt("Welcome"), human("Hi"), gpt("Yo")]}, {}, "[system]S<|end|>\n[assistant]Welcome<|end|>\n" + HI + "«Yo<|end|>»",
    ),
    "ShareGPT with tools": (
        {"conversations": [human("Hi"), {"from": "function_call", "value": json.dumps(CALL)}, {"from": "observation", "value": "2"}, gpt("Two")]}, {},
        HI + '«[{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]<|end|>»\n[tool]2<|end|>\n[assistant]«Two<|end|>»',
    ),
    "roles in capitals": ({"messages": [{"role": "User", "content": "Hi"}, {"role": "ASSISTANT", "content": "Yo"}]}, {}, HI + "«Yo<|end|>»"),
    "a developer's words": ({"messages": [{"role": "developer", "content": "S"}, user("Hi"), says("Yo")]}, {}, "[system]S<|end|>\n" + HI + "«Yo<|end|>»"),
    "parts of text": ({"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}, says("Yo")]}, {}, HI + "«Yo<|end|>»"),
    "calls of tools": (
        {"messages": [user("Hi"), CALLING, {"role": "tool", "tool_call_id": "1", "content": "2"}, says("Two")]}, {},
        HI + '«[{"id": "1", "type": "function", "function": {"name": "add", "arguments": "{\\"a\\": 1}"}}]<|end|>»\n[tool]2<|end|>\n[assistant]«Two<|end|>»',
    ),
    "OpenAI's older calls": (
        {"messages": [user("Hi"), says(None, function_call={"name": "add", "arguments": "{}"}), {"role": "function", "name": "add", "content": "2"}, says("Two")]}, {},
        HI + '«[{"type": "function", "function": {"name": "add", "arguments": "{}"}}]<|end|>»\n[tool]2<|end|>\n[assistant]«Two<|end|>»',
    ),
    "weight 0": ({"messages": [user("Hi"), says("wrong", weight=0), user("No"), says("Yo", weight=1)]}, {}, HI + "wrong<|end|>\n[user]No<|end|>\n[assistant]«Yo<|end|>»"),
    "weight 0, as text": ({"messages": [user("Hi"), says("wrong", weight="0"), user("No"), says("Yo")]}, {}, HI + "wrong<|end|>\n[user]No<|end|>\n[assistant]«Yo<|end|>»"),
    "a system's words by another name": ({"system_message": "S", "messages": [user("Hi"), says("Yo")]}, {}, "[system]S<|end|>\n" + HI + "«Yo<|end|>»"),
    "Gemini": (
        {"systemInstruction": {"parts": [{"text": "S"}]}, "contents": [{"role": "user", "parts": [{"text": "Hi"}]}, {"role": "model", "parts": [{"text": "Yo"}]}]},
        {"columns": {"messages": "contents"}}, "[system]S<|end|>\n" + HI + "«Yo<|end|>»",
    ),
    "parts by OpenAI's newer names": (
        {"messages": [user([{"type": "input_text", "text": "Hi"}]), says([{"type": "output_text", "text": "Yo"}])]}, {}, HI + "«Yo<|end|>»",
    ),
    "train false": ({"messages": [user("Hi"), says("wrong", train=False), user("No"), says("Yo")]}, {}, HI + "wrong<|end|>\n[user]No<|end|>\n[assistant]«Yo<|end|>»"),
    "loss false in ShareGPT": ({"conversations": [human("Hi"), gpt("wrong", loss=False), human("No"), gpt("Yo")]}, {}, HI + "wrong<|end|>\n[user]No<|end|>\n[assistant]«Yo<|end|>»"),
    "the last answer not learned": ({"messages": [user("Hi"), says("Yo"), user("No"), says("wrong", weight=0)]}, {}, HI + "«Yo<|end|>»"),
    "a question at the end": ({"messages": [user("Hi"), says("Yo"), user("And?")]}, {}, HI + "«Yo<|end|>»"),
    "Alpaca with system and history": (
        {"instruction": "Hi", "input": "", "output": "Yo", "system": "S", "history": [["a", "b"]]}, {},
        "[system]S<|end|>\n[user]a<|end|>\n[assistant]«b<|end|>»\n" + HI + "«Yo<|end|>»",
    ),
    "history as text, as in CSV": (
        {"instruction": "Hi", "input": "", "output": "Yo", "system": "", "history": '[["a", "b"]]'}, {},
        "[user]a<|end|>\n[assistant]«b<|end|>»\n" + HI + "«Yo<|end|>»",
    ),
    "an empty history as some write it": ({"instruction": "Hi", "output": "Yo", "history": [["", ""]]}, {}, HI + "«Yo<|end|>»"),
    "an answer that says nothing": ({"conversations": [human("Hi"), gpt(""), human("No"), gpt("Yo")]}, {}, HI + "<|end|>\n[user]No<|end|>\n[assistant]«Yo<|end|>»"),
    "no history": ({"instruction": "Hi", "input": None, "output": "Yo", "system": None, "history": None}, {}, HI + "«Yo<|end|>»"),
    "an empty history": ({"instruction": "Hi", "output": "Yo", "history": []}, {}, HI + "«Yo<|end|>»"),
    "an input that is missing": ({"instruction": "Hi", "input": "NaN", "output": "Yo"}, {}, HI + "«Yo<|end|>»"),
    "an input alone": ({"instruction": "", "input": "Hi", "output": "Yo"}, {}, HI + "«Yo<|end|>»"),
    "messages as text, as in CSV": ({"messages": json.dumps([user("Hi"), says("Yo")])}, {}, HI + "«Yo<|end|>»"),
    "Dolly": ({"instruction": "Hi", "context": "there", "response": "Yo"}, {}, "[user]Hi\n\nthere<|end|>\n[assistant]«Yo<|end|>»"),
    "a question with its passage": ({"question": "Hi", "passage": "there", "answer": "Yo"}, {}, "[user]Hi\n\nthere<|end|>\n[assistant]«Yo<|end|>»"),
    "two texts that a prompt is about": (
        {"prompt": "Hi", "input": "there", "context": ["you", "two"], "completion": "Yo"}, {},
        "[user]Hi\n\nthere\n\nyou\n\ntwo<|end|>\n[assistant]«Yo<|end|>»",
    ),
    "choices, the answer by its place": (
        {"question": "Hi?", "choices": ["red", "blue"], "answer": 1}, {}, "[user]Hi?\n\nA. red\nB. blue<|end|>\n[assistant]«B<|end|>»",
    ),
    "choices in columns": (
        {"question": "Hi?", "A": "red", "B": "blue", "answer": "A"}, {}, "[user]Hi?\n\nA. red\nB. blue<|end|>\n[assistant]«A<|end|>»",
    ),
    "ARC's choices": (
        {"question": "Hi?", "choices": {"text": ["red", "blue"], "label": ["1", "2"]}, "answer": "2"}, {},
        "[user]Hi?\n\n1. red\n2. blue<|end|>\n[assistant]«2<|end|>»",
    ),
    "names in capitals and with blanks": ({"Prompt ": "Hi", "RESPONSE": "Yo"}, {}, HI + "«Yo<|end|>»"),
    "OpenOrca": ({"system_prompt": "S", "question": "Hi", "response": "Yo"}, {}, "[system]S<|end|>\n" + HI + "«Yo<|end|>»"),
    "numbers": ({"question": "Hi", "answer": 3}, {}, HI + "«3<|end|>»"),
    "an answer that is JSON": ({"question": "Hi", "answer": '{"a": 1}'}, {}, HI + '«{"a": 1}<|end|>»'),
    "an answer that is a JSON list": ({"question": "Hi", "answer": '[{"a": 1}]'}, {}, HI + '«[{"a": 1}]<|end|>»'),
    "other names": (
        {"dialogue": [{"speaker": "Pupil", "text": "Hi"}, {"speaker": "Teacher", "text": "Yo"}], "intro": "S"},
        {"columns": {"messages": "dialogue", "role": "speaker", "content": "text", "system": "intro"}, "roles": {"Pupil": "user", "Teacher": "assistant"}},
        "[system]S<|end|>\n" + HI + "«Yo<|end|>»",
    ),
    "other names of Alpaca's columns": ({"ask": "Hi", "say": "Yo"}, {"columns": {"instruction": "ask", "output": "say"}}, HI + "«Yo<|end|>»"),
    "columns named one by one, with a system": ({"ask": "Hi", "say": "Yo", "system": "S"}, {"prompt": "ask", "answer": "say"}, "[system]S<|end|>\n" + HI + "«Yo<|end|>»"),
    "the word None, where it is an answer": ({"question": "Hi", "answer": "None"}, {"missing": []}, HI + "«None<|end|>»"),
}  # fmt: skip


def marked(row, tokenizer):
    """The text, with what is learned in «»."""
    out, inside = "", False
    for token, label in zip(row["input_ids"], row["labels"]):
        if (label != -100) != inside:
            out += "»" if inside else "«"
            inside = not inside
        out += tokenizer.decode([token])
    return out + ("»" if inside else "")


def load(tmp_path, rows, settings=None, **data):
    settings = dict(settings or {})
    data |= {key: settings.pop(key) for key in ("missing",) if key in settings}
    task = get_task({"name": settings.pop("name", "instruct"), **settings})
    file = write_jsonl(tmp_path / "t.jsonl", rows)
    return task, task.load_data({"train": file, "validation": file, **data})


@pytest.mark.parametrize("kind", ROWS)
def test_a_kind_of_row_is_the_conversation_that_it_means(tmp_path, kind):
    row, settings, expected = ROWS[kind]
    tokenizer = byte_tokenizer(chat=True)
    task, rows = load(tmp_path, [row] * 2, settings)
    assert marked(task.prepare(rows, tokenizer, byte_model())["train"][0], tokenizer) == expected


def test_a_system_message_that_stands_in_two_places_is_read_once_and_said(tmp_path):
    own = {"messages": [{"role": "system", "content": "S"}, user("Hi"), says("Yo")]}
    task, rows = load(
        tmp_path,
        [{**own, "intro": "S"}, {**own, "intro": "T"}, {**own, "intro": None}],
        {"columns": {"system": "intro"}},
    )
    assert [[m["content"] for m in turns] for turns in rows["train"]["messages"]] == [["S", "Hi", "Yo"]] * 3
    said = "1 of 3 conversations begin with a system message of their own, another than in column 'intro'"
    assert [note for note in task.notes if "system" in note] == [f"{split}: {said}: theirs is read" for split in rows]


def test_answers_by_place_are_not_taken_for_missing_words(tmp_path):
    task, _ = load(tmp_path, [{"question": "Hi?", "choices": ["red", "blue"], "answer": 1}] * 2)
    assert task.notes[0] == "train: answers are the places of their choices, from 0, and learned by their letters"


@pytest.mark.parametrize(
    ("row", "read"),
    [
        ({"question": "Hi?", "choices": ["red", "a 'blue'"], "answer": 1}, ["Hi?\n\nA. red\nB. a 'blue'", "B"]),
        (
            {"question": "Hi?", "choices": {"text": ["red", "blue"], "label": ["1", "2"]}, "answer": "2"},
            ["Hi?\n\n1. red\n2. blue", "2"],
        ),
        ({"messages": [user("Hi"), says("Yo\n'o'")]}, ["Hi", "Yo\n'o'"]),
        ({"source": ["It rained.", "It's wet."], "target": ["Rain", "Wet"]}, ["It rained. It's wet.", "Rain"]),
    ],
)
def test_what_pandas_makes_of_a_parquet_file_in_csv_is_the_same(tmp_path, row, read):
    frame = pandas.DataFrame([row] * 4)
    frame.to_parquet(tmp_path / "t.parquet")
    pandas.read_parquet(tmp_path / "t.parquet").to_csv(tmp_path / "t.csv", index=False)  # lists as numpy prints them
    for file in ("t.parquet", "t.csv"):
        task = get_task({"name": "summarize" if "source" in row else "instruct"})
        turns = task.load_data({"train": str(tmp_path / file)})["train"]["messages"][0]
        assert [m["content"] for m in turns] == read or [turns[0]["input"], turns[1]["content"]] == read


@pytest.mark.parametrize(
    ("choices", "answers", "said"),
    [
        (["red", "blue"], [0, 1], ["A", "B"]),
        (["red", "blue"], ["0", "1"], ["A", "B"]),  # all is text in CSV
        (["red", "blue"], [0.0, None, 1.0], ["A", "B"]),  # as pandas writes it where one is missing
        ([1, 2, 3], [2, 1], ["2", "1"]),  # in words
        (["12 km", "13 km"], ["12", "13"], ["12", "13"]),
    ],
)
def test_whole_numbers_are_places_of_choices_unless_they_are_choices(tmp_path, choices, answers, said):
    rows = [{"question": f"Hi {i}?", "choices": choices, "answer": answer} for i, answer in enumerate(answers)]
    _, rows = load(tmp_path, rows)
    assert [turns[-1]["content"] for turns in rows["train"]["messages"]] == said


@pytest.mark.parametrize("flag", [{"weight": 0}, {"train": False}, {"weight": "0"}])
@pytest.mark.parametrize("row", [{"prompt": "Hi", "completion": "wrong"}, {"messages": [user("Hi"), says("wrong")]}])
def test_a_row_that_is_not_to_be_learned_is_left_out(tmp_path, row, flag):
    right = {key: "Yo" if key == "completion" else [user("Hi"), says("Yo")] for key in row if key != "prompt"}
    task, rows = load(tmp_path, [row | flag, row | right | dict.fromkeys(flag, 1)])
    assert [messages[-1]["content"] for messages in rows["train"]["messages"]] == ["Yo"]
    assert "train: 1 of 2 rows have no answer that is learned (weight, train) and were left out" in task.notes


def test_a_column_of_weights_that_are_no_flags_is_not_read_and_said(tmp_path):
    task, rows = load(tmp_path, [{"prompt": "Hi", "completion": "Yo", "weight": w, "loss": 0.0} for w in (0, 0.5)])
    assert len(rows["train"]) == 2 and "train: not read: weight, loss" in task.notes


def test_a_template_with_a_place_for_tools_gets_them_and_others_are_told_in_words(tmp_path):
    chat = [user("Hi"), CALLING, {"role": "tool", "content": "2"}, says("Two")]
    row = {"messages": chat, "tools": [{"type": "function", "function": {"name": "add"}}]}
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    task, rows = load(tmp_path, [row] * 2)
    assert marked(task.prepare(rows, tokenizer, byte_model())["train"][0], tokenizer) == (
        '[tools][{"type": "function", "function": {"name": "add"}}][user]Hi<|end|>[assistant]'
        '«<call add {"a": 1}><|end|>»[tool]2<|end|>[assistant]«Two<|end|>»'
    )
    tokenizer = byte_tokenizer()  # Alpaca's template
    text = tokenizer.decode(task.prepare(rows, tokenizer, byte_model())["train"][0]["input_ids"])
    assert text.startswith('Tools that can be called:\n[{"type": "function"')
    for part in ("### Instruction:\nHi", '"name": "add"', "### Input:\n2\n\n", "### Response:\nTwo</s>"):
        assert part in text


def test_alpacas_template_keeps_the_system_and_a_greeting(tmp_path):
    row = {"system": "S", "conversations": [gpt("Welcome"), human("Hi"), gpt("Yo")]}
    task, rows = load(tmp_path, [row] * 2)
    tokenizer = byte_tokenizer()
    assert marked(task.prepare(rows, tokenizer, byte_model())["train"][0], tokenizer) == (
        "S\n\n### Response:\nWelcome</s>\n\n### Instruction:\nHi\n\n### Response:\n«Yo</s>»"
    )


@pytest.mark.parametrize(
    ("odd", "note"),
    [
        ({"messages": [says("alone")]}, "1 of 3 rows have no answer and were left out"),
        ({"messages": [user("alone")]}, "1 of 3 rows have no answer and were left out"),
        ({"messages": [user(None), says("Yo")]}, "1 of 3 rows have no prompt and were left out"),
        ({"messages": [user(" "), says("Yo")]}, "1 of 3 rows have no prompt and were left out"),
        ({"messages": []}, "1 of 3 rows have no answer and were left out"),
        ({"messages": None}, "1 of 3 rows have no answer and were left out"),
        ({"messages": [user("Hi"), says("x", weight=0)]}, "1 of 3 rows have no answer that is learned (weight, train)"),
        ({"messages": [user("Hi"), says("Yo"), user("?")]}, "1 of 3 conversations end without an answer"),
    ],
)
def test_what_is_left_out_of_chats_is_said(tmp_path, odd, note):
    task, _ = load(tmp_path, [*[{"messages": [user("Hi"), says("Yo")]}] * 2, odd])
    assert any(one.startswith(f"train: {note}") for one in task.notes), task.notes


@pytest.mark.parametrize(
    ("odd", "note"),
    [
        ({"instruction": "a", "output": None}, "1 of 3 rows have no answer"),
        ({"instruction": "a", "output": float("nan")}, "1 of 3 rows have no answer"),
        ({"instruction": "a", "output": "nan"}, "words that count as missing: 'nan' 1 (data.missing lists them)"),
        ({"instruction": " ", "output": "a"}, "1 of 3 rows have no prompt"),
        ({"instruction": float("nan"), "output": "a"}, "1 of 3 rows have no prompt"),
    ],
)
def test_what_is_left_out_of_pairs_is_said(tmp_path, odd, note):
    task, rows = load(tmp_path, [*[{"instruction": "Hi", "output": "Yo"}] * 2, odd])
    assert any(one.startswith(f"train: {note}") for one in task.notes), task.notes
    assert len(rows["train"]) == 2


@pytest.mark.parametrize(
    ("row", "settings", "words"),
    [
        ({"messages": [{"role": "robot", "content": "x"}]}, {}, ["role 'robot'", "task.roles", "{robot: user}"]),
        (
            {"messages": [{"speaker": "a", "text": "x"}]},
            {},
            ["without role", "speaker, text", "task.columns={role: speaker"],
        ),
        (
            {"messages": [{"role": "user", "text": "x"}]},
            {},
            ["without content", "role, text", "task.columns={content: text}"],
        ),
        ({"question": "a", "choices": ["b"], "answer": 1}, {}, ["its answer 1 is none of its 1 choices"]),
        ({"messages": ["Hi"]}, {}, ["row 1 has a str where a message"]),
        ({"messages": "[{"}, {}, ["row 1: its list of messages is not valid JSON"]),
        ({"messages": [user("Hi"), says("x", weight=0.5)]}, {}, ["weight 0.5"]),
        ({"messages": [user([{"type": "image_url", "image_url": {}}]), says("x")]}, {}, ["image_url", "text alone"]),
        ({"instruction": "a", "output": "b", "history": ["a"]}, {}, ["its history is no list of [question, answer]"]),
        ({"messages": [says("x")]}, {}, ["no row has an answer"]),
        ({"a": "b"}, {"columns": {"messages": "c"}}, ["task.columns.messages='c'", "It has a"]),
        ({"a": "b"}, {"columns": {"mesages": "a"}}, ["task.columns.mesages='a'", "Did you mean 'messages'?"]),
        ({"a": "b"}, {"roles": {"x": "asistant"}}, ["task.roles.x='asistant'", "Did you mean 'assistant'?"]),
        ({"a": "b"}, {"roles": "user"}, ["task.roles='user'"]),
    ],
)
def test_what_cannot_be_a_conversation_is_refused_in_one_line(tmp_path, row, settings, words):
    with pytest.raises(TrimtabError) as error:
        load(tmp_path, [row] * 2, settings)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("row", "settings", "unread"),
    [
        ({"messages": [user("Hi"), says("Yo", reasoning_content="hm")], "context": "c", "id": None}, {}, "context, reasoning_content of messages"),
        ({"question": "Hi", "reasoning": "hm", "answer": "Yo"}, {}, "reasoning"),
        ({"question": "Hi", "context": {"a": 1}, "answer": "Yo"}, {}, "context"),
        ({"ask": "Hi", "say": "Yo", "context": "c"}, {"prompt": "ask", "answer": "say"}, "context"),
        ({"ask": "Hi", "say": "Yo", "A": "a", "B": "b"}, {"prompt": "ask", "answer": "say"}, "A, B"),
        ({"question": "Hi", "options": {"temperature": 1}, "answer": "Yo"}, {}, "options"),
        ({"question": "Hi", "options": "a|b", "answer": "Yo"}, {}, "options"),
        ({"document": "Hi", "summary": "Yo", "topic": "t"}, {"name": "summarize"}, "topic"),
    ],
)  # fmt: skip
def test_what_is_not_read_is_said(tmp_path, row, settings, unread):
    task, _ = load(tmp_path, [row] * 2, settings)
    assert f"train: not read: {unread}" in task.notes


def test_the_place_of_a_choice_is_no_right_number(tmp_path):
    row = {"question": "Hi?", "choices": ["red", "blue"], "answer": 1}
    task, rows = load(tmp_path, [row] * 2, {"name": "math"})
    assert rows["train"]["gold"][:] == ["B", "B"]
    assert not any("not read" in note for note in task.notes)
    assert any("learned by their letters" in note for note in task.notes)


def test_a_file_of_questions_with_a_column_of_another_name_is_told_how_to_say_so(tmp_path):
    (tmp_path / "f.csv").write_text("Frage,Nr\nWann?,1\n")
    spec = DataSpec.read({"test": str(tmp_path / "f.csv")}, ("test",))
    with pytest.raises(TrimtabError, match=r"say which it is: 'task\.columns=\{instruction: Frage\}'"):
        get_task({"name": "instruct"}).ask(spec)
    n, rows, _ = get_task({"name": "instruct", "columns": {"instruction": "Frage"}}).ask(spec)
    assert n == 1 and rows["messages"][0][0]["content"] == "Wann?"


def test_files_of_different_forms_are_refused_together(tmp_path):
    one = write_jsonl(tmp_path / "1.jsonl", [{"instruction": "a", "output": "b"}])
    other = write_jsonl(tmp_path / "2.jsonl", [{"messages": [user("Hi"), says("Yo")]}])
    with pytest.raises(TrimtabError, match=r"1\.jsonl has no column 'messages', which others have"):
        get_task({"name": "instruct"}).load_data({"train": [one, other]})


@pytest.mark.parametrize("name", ["instruct", "math", "code"])
def test_an_encoder_is_refused_by_its_kind(name):
    with pytest.raises(TrimtabError, match=rf"task\.name='{name}': needs a model that writes; bert is an encoder"):
        get_task({"name": name}).adjust_to(tiny_config("bert"))


@pytest.mark.parametrize(
    ("answer", "written", "right"),
    [
        (3, "3", True),
        (3, "It is 3.", True),
        (3, "4", False),
        (3.5, "3.50", True),
        ("1,200", "1200", True),
        ("-4", "-4", True),
        ("18 hours", "18", True),
        ("B", "B", True),
        ("B", "C", False),
        ("3/4", "3/4", True),
        ("3/4", "4/3", False),
    ],
)
def test_a_bare_answer_is_scored_exactly(tmp_path, answer, written, right):
    task, rows = load(tmp_path, [{"question": "How many?", "answer": answer}] * 2, {"name": "math"})
    assert task.needs_generation(rows["validation"])
    scores, _ = task.score(rows["validation"], [[written]] * 2)
    assert scores["exact_match_flexible"] == float(right)
    strict, _ = task.score(rows["validation"], [[f" {answer}\n"]] * 2)
    assert strict["exact_match_strict"] == 1.0


def test_a_solution_with_a_mark_is_still_read_strictly_by_it(tmp_path):
    task, rows = load(tmp_path, [{"question": "How many?", "answer": "1 + 2 = 3\n#### 3"}] * 2, {"name": "math"})
    assert task.score(rows["validation"], [["3"], ["#### 3"]])[0]["exact_match_strict"] == 0.5
