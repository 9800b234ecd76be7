"""Questions about images: rows in their forms, prompts with image tokens, scores, and a tiny LLaVA."""

import base64
import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoProcessor, Trainer, TrainingArguments

from tasks.stand_ins import (
    Reciter,
    byte_model,
    byte_tokenizer,
    data_pack,
    llava_model,
    llava_processor,
    png,
    write_jsonl,
)
from trimtab.app.model_facts import unread_outputs
from trimtab.app.models import ModelSpec, load_model, load_tokenizer
from trimtab.app.tasks import get_task
from trimtab.app.tasks.vqa import option_of, short_answer
from trimtab.errors import ConfigError, DataError, ModelError

RED, BLUE = png("red"), png("blue")


def b64(data):
    return base64.b64encode(data).decode()


ROWS = [
    {"question": "what colour?", "answer": "red", "png_base64": b64(RED)},
    {"question": "is it blue?", "answer": "yes", "png_base64": b64(BLUE)},
]
SCIENCE = {"question": "Which is warm?", "choices": ["ice", "fire"], "answer": 1, "hint": "Think.", "lecture": "x"}


def load(tmp_path, rows, settings=None, split="train"):
    task = get_task({"name": "vqa", **(settings or {})})
    file = write_jsonl(tmp_path / f"{split}.jsonl", rows)
    return task, task.load_data({split: file, "validation": file} if split == "train" else {split: file})


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("(B)", "B"),
        ("B. fire", "B"),
        ("B\nbecause", "B"),
        ("The answer is B.", "B"),
        ("the answer is: (A)", "A"),
        ("fire", "B"),
        ("The fire!", "B"),
        ("A fire burns", None),
        ("C", None),
        ("", None),
        ("b", None),
        ("Because", None),
    ],
)
def test_the_option_that_a_text_chooses(text, letter):
    assert option_of(text, ["ice", "fire"]) == letter


def test_short_answers_do_not_differ_by_case_articles_or_stops():
    assert short_answer("The Circle.\nIt is round.") == short_answer(" circle") == "circle"
    assert short_answer("dark  teal!") == "dark teal"
    assert short_answer("yes") != short_answer("no")


def evaluate(tmp_path, reply, rows, folder=None):
    task, raw = load(tmp_path, rows, split="test")
    processor = llava_processor()
    return task.evaluate(Reciter(processor.tokenizer, reply), processor, raw, "test", folder=folder)


def test_a_whole_evaluation_by_hand(tmp_path):
    prompts = []
    scores = evaluate(tmp_path, lambda prompt: prompts.append(prompt) or "Red.", [*ROWS, ROWS[0]], tmp_path / "out")
    assert scores == {"accuracy": pytest.approx(2 / 3), "majority_accuracy": pytest.approx(2 / 3)}
    assert sorted(prompts)[-1] == (
        "USER: " + "<image>" * 4 + "\nwhat colour?\nAnswer the question using a single word or phrase. ASSISTANT:"
    )
    rows = [json.loads(line) for line in (tmp_path / "out" / "test_scored.jsonl").read_text().splitlines()]
    assert rows[1] == {"row": 1, "gold": "yes", "given": ["red"], "right": [False]}


def test_scienceqa_rows_ask_for_the_letter_of_a_choice(tmp_path):
    rows = [{**SCIENCE, "image": {"bytes": None, "path": str(tmp_path / "fire.png")}}, {**SCIENCE, "image": None}]
    (tmp_path / "fire.png").write_bytes(RED)
    task, raw = load(tmp_path, rows)
    assert raw["train"][0]["messages"][0]["content"] == (
        "Think.\nWhich is warm?\nA. ice\nB. fire\nAnswer with the option's letter from the given choices directly."
    )
    assert raw["train"]["gold"][:] == ["B"]
    assert "train: 1 of 2 rows have no image and were left out (task.text_rows)" in task.notes
    for said, accuracy in (("B", 1.0), ("The answer is A.", 0.0)):
        scores = evaluate(tmp_path, lambda _, said=said: said, rows)
        assert scores == {"accuracy": accuracy, "majority_accuracy": 1.0}


def test_rows_without_an_image_can_be_kept_and_go_into_one_batch_with_others(tmp_path):
    rows = [{**SCIENCE, "image": None}, {**SCIENCE, "image": "fire.png"}]
    (tmp_path / "fire.png").write_bytes(RED)
    task, raw = load(tmp_path, rows, {"text_rows": True})
    processor, model = llava_processor(), llava_model()
    ready = task.prepare(raw, processor, model)
    batch = task.collator(processor)([ready["train"][i] for i in range(2)])
    assert batch["pixel_values"].shape == (1, 3, 16, 16)
    assert (batch["input_ids"] == 3).sum(dim=1).tolist() == [0, 4]
    assert model(**batch).loss > 0
    assert "pixel_values" not in task.collator(processor)([ready["train"][0]])


def test_true_or_false_rows(tmp_path):
    rows = [{"sentence": "It is red.", "label": label, "png_base64": b64(RED)} for label in (1, 0, "true")]
    assert load(tmp_path, rows)[1]["train"]["gold"][:] == ["true", "false", "true"]
    with pytest.raises(DataError, match="row 1 has label 2, not 0, 1, true or false"):
        load(tmp_path, [{**rows[0], "label": 2}])


def test_images_shared_by_rows_lie_in_a_file_beside_them(tmp_path):
    rows = [{"question": "?", "answer": "red", "image_id": 7}, {"question": "??", "answer": "red", "image_id": 7}]
    with pytest.raises(DataError, match=r"task\.images=.*train_images\.jsonl': no such file"):
        load(tmp_path, rows)
    write_jsonl(tmp_path / "train_images.jsonl", [{"image_id": 7, "png_base64": b64(RED)}])
    task = get_task({"name": "vqa"})
    raw = task.load_data({"train": str(tmp_path / "train.jsonl")})
    assert raw["train"][0]["image"] == raw["validation"][0]["image"] == RED
    other = write_jsonl(tmp_path / "other.jsonl", [{"image_id": 8, "png_base64": b64(RED)}])
    with pytest.raises(DataError, match="row 1 names image 7, which the file of images does not have"):
        load(tmp_path, rows, {"images": {"train": other}})


def test_prompt_and_labels_and_image_tokens(tmp_path):
    task, raw = load(tmp_path, ROWS)
    processor = llava_processor()
    row = task.prepare(raw, processor, llava_model())["train"][0]
    decode = processor.tokenizer.decode
    assert decode(row["input_ids"]) == (
        "USER: " + "<image>" * 4 + "\nwhat colour?\nAnswer the question using a single word "
        "or phrase. ASSISTANT: red</s>"
    )
    assert decode([t for t in row["labels"] if t != -100]) == " red</s>"
    assert row["pixel_values"] == RED
    asked = task.question_columns(raw["train"][0], processor, "row")["input_ids"]
    assert row["input_ids"][: len(asked)] == asked


def test_a_processors_own_template_is_used_and_none_is_saved_for_later(tmp_path):
    task, raw = load(tmp_path, ROWS)
    processor = llava_processor()
    task.prepare(raw, processor, llava_model())
    processor.save_pretrained(tmp_path / "adapter")
    again = AutoProcessor.from_pretrained(tmp_path / "adapter")
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Hi"}]}]
    assert again.apply_chat_template(messages, add_generation_prompt=True) == "USER: <image>\nHi ASSISTANT:"
    own = llava_processor()
    own.chat_template = (
        "{% for m in messages %}{{ m.role }}|{% for c in m.content %}{{ '<image>' if c.type == 'image' else "
        "c.text }}{% endfor %}|{% endfor %}{% if add_generation_prompt %}assistant|{% endif %}"
    )
    row = get_task({"name": "vqa"}).prepare(raw, own, llava_model())["train"][0]
    assert own.tokenizer.decode(row["input_ids"]) == (
        "user|" + "<image>" * 4 + "what colour?\nAnswer the question using a single word or phrase.|assistant|red|</s>"
    )


def test_a_llava_trains_and_is_scored_through_the_interface(tmp_path):
    llava_model().save_pretrained(tmp_path / "model")
    llava_processor().save_pretrained(tmp_path / "model")
    task = get_task({"name": "vqa", "generation": {"max_new_tokens": 4}})
    spec = ModelSpec(name_or_path=str(tmp_path / "model"))
    raw = task.load_data({"train": write_jsonl(tmp_path / "train.jsonl", ROWS * 8)})
    processor = load_tokenizer(spec, task)
    got = load_model(spec, task, processor)
    ready = task.prepare(raw, processor, got.model)
    assert task.pool(got.model.config) == "last"
    assert task.selection_rows(ready).column_names == ["input_ids", "attention_mask", "pixel_values"]
    last = [processor.tokenizer.decode(ids[-1:]) for ids in task.selection_rows(ready)["input_ids"]]
    assert set(last) == {"d", "s"}  # of "red" and "yes": the end token is left out
    model = get_peft_model(got.model, LoraConfig(task_type=task.task_type, r=2, target_modules=["q_proj", "v_proj"]))
    trainer = Trainer(
        model=model,
        train_dataset=ready["train"],
        eval_dataset=ready["validation"],
        data_collator=task.collator(processor),
        compute_metrics=task.compute_metrics,
        preprocess_logits_for_metrics=task.preprocess_logits_for_metrics,
        args=TrainingArguments(
            str(tmp_path / "out"),
            max_steps=2,
            per_device_train_batch_size=4,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            save_strategy="no",
        ),
    )
    trainer.train()
    assert trainer.evaluate(ignore_keys=unread_outputs(model))["eval_answer_loss"] > 0
    scores = task.evaluate(model, processor, raw, "validation")
    assert set(scores) == {"accuracy", "majority_accuracy"}


def test_pixels_reach_the_model_in_its_own_precision_and_batches_change_no_answer(tmp_path):
    task, raw = load(tmp_path, ROWS, {"generation": {"max_new_tokens": 6}})
    processor, model = llava_processor(), llava_model()
    together = task.answers(model, processor, raw["train"], "train")
    alone = [task.answers(model, processor, raw["train"].select([i]), "train")[0] for i in range(2)]
    assert together == alone
    half = llava_model().to(torch.bfloat16)
    ready = task.prepare(raw, processor, half)
    assert task.collator(processor)([ready["train"][0]])["pixel_values"].dtype == torch.bfloat16
    assert task.answers(half, processor, raw["train"], "train")


def test_two_images_of_one_question_give_two_keys(tmp_path):
    rows = [{**ROWS[0], "png_base64": b64(image)} for image in (RED, BLUE)]
    settings = {"generations": str(tmp_path / "g"), "generation": {"max_new_tokens": 2, "batch_size": 1}}
    task, raw = load(tmp_path, rows, settings)
    task.evaluate(llava_model(), llava_processor(), raw, "train")
    lines = [json.loads(line) for line in (tmp_path / "g" / "train_answers.jsonl").read_text().splitlines()]
    assert len({line["key"] for line in lines}) == 2


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"a": 1}, "its columns a are in none of the forms known"),
        ({"question": "?", "answer": "x"}, "no row has an image"),
        ({"question": "?", "answer": "x", "png_base64": "%%"}, "row 1: its image is not base64"),
        ({"question": "?", "answer": "x", "image": "no.png"}, "row 1 names the image .*no.png', which is not there"),
        ({"question": "?", "answer": "x", "image": 3}, "row 1 has a int for an image"),
        ({**SCIENCE, "answer": 2}, "row 1 has answer 2, not the number of one of its choices"),
        ({**SCIENCE, "choices": ["one"]}, "row 1 has no list of 2 to 10 choices"),
    ],
)
def test_wrong_rows_are_reported(tmp_path, row, words):
    with pytest.raises(DataError, match=words):
        load(tmp_path, [row])


def test_what_cannot_work_is_refused_by_name(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"task\.images=3: a path"):
        get_task({"name": "vqa", "images": 3})
    with pytest.raises(ConfigError, match=r"task\.template='alpaca': not known"):
        get_task({"name": "vqa", "template": "alpaca"})
    task, raw = load(tmp_path, ROWS)
    with pytest.raises(ModelError, match="reads no images; task vqa needs a model with a processor"):
        task.prepare(raw, byte_tokenizer(), byte_model())
    with pytest.raises(DataError, match=r"row 1: its image cannot be read: .* begins with b'no image'"):
        load(tmp_path, [{**ROWS[0], "png_base64": b64(b"no image")}])
    with pytest.raises(DataError, match="train row 1: its image cannot be read: image file is truncated"):
        task.prepare(load(tmp_path, [{**ROWS[0], "png_base64": b64(RED[:-30])}])[1], llava_processor(), llava_model())
    monkeypatch.setattr("trimtab.app.tasks.vqa.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"pip install 'trimtab\[vqa\]'"):
        get_task({"name": "vqa"})


@pytest.mark.parametrize(("name", "file", "answers"), [("easy_vqa", "test", 13), ("nlvr", "validation", 2)])
def test_real_rows_are_read_and_learned(name, file, answers):
    task = get_task({"name": "vqa"})
    raw = task.load_data({"test": str(data_pack(name) / f"{file}.jsonl"), "max_samples": 600})
    assert len(set(raw["test"]["gold"])) == answers
    small = type(raw)({"test": raw["test"].select(range(3))})
    processor, model = llava_processor(), llava_model()
    ready = task.prepare(small, processor, model)
    assert model(**task.collator(processor)([ready["test"][i] for i in range(3)])).loss > 0


@pytest.mark.parametrize("written", [b64(RED), "data:image/png;base64," + b64(RED), b64(RED + b"\0" * 900)])
def test_an_image_may_stand_in_its_column_as_base64(tmp_path, written):
    rows = [{"question": "what colour?", "answer": "red", "image": written}] * 2
    assert load(tmp_path, rows)[1]["train"]["image"][0].startswith(RED)
