"""Images and rows with images as people have them, and the models that read them."""

import base64
import io
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from tasks.stand_ins import llava_model, llava_processor, png, write_jsonl
from tasks.vision_stand_ins import blip2, mllama, paligemma
from trimtab.app.starting import start
from trimtab.app.tasks import get_task
from trimtab.app.tasks.data import DataSpec
from trimtab.app.tasks.encoding import Padder
from trimtab.app.tasks.images import pixels_of
from trimtab.app.tasks.vqa import agreement
from trimtab.errors import ConfigError, DataError, ModelError

RED, BLUE = png("red"), png("blue")
QA = {"question": "what colour?", "answer": "red"}
ASKED = "what colour?\nAnswer the question using a single word or phrase."


def encoded(image, kind="PNG", **more):
    out = io.BytesIO()
    image.save(out, kind, **more)
    return out.getvalue()


def load(folder, rows, settings=None, split="train"):
    task = get_task({"name": "vqa", **(settings or {})})
    file = write_jsonl(folder / f"{split}.jsonl", rows)
    return task, task.load_data({split: file, "test": file})[split]


def asked(q="what colour?", a="red"):
    return [{"role": "user", "content": q}, {"role": "assistant", "content": a}]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("red.png", "sub/red.png"):
        (tmp_path / name).write_bytes(RED)
    return tmp_path


@pytest.mark.parametrize(
    "cells",
    [
        {"image": "sub/red.png"},
        {"image": r"sub\red.png"},
        {"image_path": "./red.png"},
        {"Image": "red.png"},
        {"images": ["red.png"]},
        {"file_name": "red.png"},
        {"image": {"path": "red.png"}},
        {"image": {"bytes": None, "path": "red.png"}, "image_id": 7},
        {"image": base64.urlsafe_b64encode(RED).decode()},
        {"png_base64": "data:image/png;base64," + base64.b64encode(RED).decode()},
    ],
)
def test_an_image_is_found_however_its_column_gives_it(folder, cells):
    assert load(folder, [{**QA, **cells}])[1]["image"][:] == [RED]


def test_an_image_may_be_given_by_its_address_on_this_machine(folder):
    for name in (str(folder / "red.png"), (folder / "red.png").as_uri()):
        assert load(folder, [{**QA, "image": name}])[1]["image"][:] == [RED]


@pytest.mark.parametrize("nothing", ["", None, float("nan"), [], {"bytes": None, "path": None}])
def test_a_cell_that_holds_nothing_is_no_image(folder, nothing):
    task, rows = load(folder, [{**QA, "image": nothing}, {**QA, "image": "red.png"}])
    assert len(rows) == 1
    assert "train: 1 of 2 rows have no image and were left out (task.text_rows)" in task.notes


@pytest.mark.parametrize(
    ("cell", "words"),
    [
        ("https://example.org/x.png", "row 1 names the address 'https://example.org/x.png'; images are not fetched"),
        (["red.png", "sub/red.png"], "row 1 has 2 images; one a row is read"),
        ("sub", "names the image .*sub', which is not there"),
        ("x.y" * 300, r"names the image '.{150,170}', which is not there"),
    ],
)
def test_what_names_no_image_is_refused_by_its_row(folder, cell, words):
    with pytest.raises(DataError, match=words):
        load(folder, [{**QA, "image": cell}])


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "x.png' cannot be read: it is empty"),
        (b"<svg xmlns=", "of no kind that Pillow knows, and begins with b'<svg xmlns='"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "it is a Git LFS pointer"),
        (encoded(Image.new("1", (14000, 14000))), "cannot be read: Image size .* exceeds limit"),
        (encoded(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"), "has 32 bits a pixel"),
    ],
)
def test_a_file_that_is_no_image_is_refused_as_it_is_read(folder, data, words):
    (folder / "x.png").write_bytes(data)
    with pytest.raises(DataError, match=f"row 1: .*{words}"):
        load(folder, [{**QA, "image": "x.png"}])


def test_sixteen_bits_keep_their_shades_and_a_photo_stands_upright():
    shades = np.array([[0, 256, 32768, 65535]], np.uint16)
    assert np.asarray(pixels_of(encoded(Image.fromarray(shades)), "x"))[0, :, 0].tolist() == [0, 1, 128, 255]
    exif = Image.Exif()
    exif[0x0112] = 6  # held on its side
    photo = Image.new("RGB", (8, 4), "white")
    photo.paste("black", (0, 0, 4, 4))
    upright = pixels_of(encoded(photo, exif=exif), "x")
    assert upright.size == (4, 8)
    assert upright.getpixel((1, 1)) == (0, 0, 0)
    assert upright.getpixel((1, 6)) == (255, 255, 255)


def test_one_name_for_two_images_in_the_folders_of_two_files_is_refused(tmp_path):
    files = []
    for name, image in (("a", RED), ("b", BLUE)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.png").write_bytes(image)
        (tmp_path / name / f"{name}.png").write_bytes(image)
        files.append(write_jsonl(tmp_path / name / "rows.jsonl", [{**QA, "image": f"{name}.png"}]))
    task = get_task({"name": "vqa"})
    assert task.load_data({"train": files, "test": files})["train"]["image"][:] == [RED, BLUE]
    for name in "ab":
        write_jsonl(tmp_path / name / "rows.jsonl", [{**QA, "image": "x.png"}])
    with pytest.raises(DataError, match=r"names the image 'x\.png', and another one is called so, too"):
        task.load_data({"train": files, "test": files})


def test_lists_of_images_that_datasets_saved_stay_encoded(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list([{"messages": asked("<image>what?"), "images": [Image.new("RGB", (4, 4))]}] * 3)
    rows.save_to_disk(tmp_path / "saved")
    got = get_task({"name": "vqa"}).load_data({"train": str(tmp_path / "saved")})["train"]
    assert got["image"][0].startswith(b"\x89PNG")


CHATS = [
    {"conversations": [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "red"}], "image": "red.png"},
    {"conversations": [{"from": "human", "value": "what?\n<image>"}, {"from": "gpt", "value": "red"}], "image": "red.png"},
    {"messages": asked([{"type": "image"}, {"type": "text", "text": "what?"}]), "images": ["red.png"]},
    {"messages": asked([{"type": "image", "image": "red.png"}, {"type": "text", "text": "what?"}])},
    {"messages": asked([{"type": "image_url", "image_url": {"url": "red.png"}}, {"type": "text", "text": "what?"}])},
    {"messages": json.dumps(asked("<image>what?")), "image": "red.png"},
    {"messages": asked("what?"), "images": ["red.png"]},
    {"instruction": "what?", "output": "red", "image": "red.png"},
    {"prompt": "<image> what?", "response": "red", "image": "red.png"},
]  # fmt: skip


@pytest.mark.parametrize("row", CHATS)
def test_a_chat_has_its_image_before_the_words_of_its_first_question(folder, row):
    task, rows = load(folder, [row])
    assert rows["image"][:] == [RED]
    first, answer = rows["messages"][0]
    assert (first["content"], first["input"], answer["content"], answer["input"]) == ("what?", "image", "red", "")
    learned = task.example_columns(rows[0], _with_template(), "row")
    assert _with_template().tokenizer.decode(learned["input_ids"]) == (
        "USER: " + "<image>" * 4 + "\nwhat? ASSISTANT: red</s>"
    )


def test_every_answer_of_a_chat_is_learned(folder):
    turns = [*asked("<image>\nwhat?"), *asked("and now?", "blue")]
    task, rows = load(folder, [{"messages": turns, "images": ["red.png"]}])
    processor, model = llava_processor(), llava_model()
    got = task.prepare({"train": rows}, processor, model)["train"][0]
    learned = [token for token in got["labels"] if token != -100]
    assert processor.tokenizer.decode(learned) == " red</s> blue</s>"
    assert [a for a, b in zip(got["input_ids"], got["labels"]) if b != -100] == learned
    assert model(**task.collator(processor)([got])).loss > 0
    assert rows["gold"][:] == ["blue"]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"messages": asked("<image><image>what?"), "images": ["red.png"]}, "has 2 <image> in its text, and one image"),
        ({"messages": asked("what?", "a <image>"), "images": ["red.png"]}, "has <image> elsewhere than in the first"),
        ({"messages": [*asked(), *asked("<image>?")], "images": ["red.png"]}, "elsewhere than in the first question"),
        ({**QA, "question": "<image><image>", "image": "red.png"}, "has 2 <image>"),
        ({"caption": "a cat", "image": "red.png"}, "columns caption, image are in none of the forms known"),
    ],
)
def test_a_chat_whose_images_cannot_be_placed_is_refused(folder, row, words):
    with pytest.raises(DataError, match=words):
        load(folder, [row])


def test_a_mark_without_an_image_is_refused(folder):
    rows = [{**QA, "image": "red.png"}, {**QA, "question": "<image>?", "image": None}]
    with pytest.raises(DataError, match="row 2 has 1 <image> in its text, and no image"):
        load(folder, rows, {"text_rows": True})


def test_rows_without_a_question_or_an_answer_are_left_out(folder):
    lacking = [{"question": None}, {"answer": None}, {"answer": ""}, {}]
    task, rows = load(folder, [{**QA, "image": "red.png", **cells} for cells in lacking])
    assert len(rows) == 1
    assert "train: 1 of 4 rows have no prompt and were left out" in task.notes
    assert "train: 2 of 4 rows have no answer and were left out" in task.notes


@pytest.mark.parametrize("answer", [1, "B", "fire", "1", 1.0])
@pytest.mark.parametrize("name", ["choices", "options"])
def test_the_right_option_is_named_by_its_place_its_letter_or_its_words(folder, name, answer):
    row = {"question": "Which is warm?", name: ["ice", "fire"], "answer": answer, "image": "red.png"}
    _, rows = load(folder, [row])
    assert rows["gold"][:] == ["B"]
    assert "A. ice\nB. fire" in rows["messages"][0][0]["content"]


def test_of_several_answers_the_most_frequent_is_learned_and_all_of_them_count(folder):
    ten = [{"answer": a, "answer_id": i} for i, a in enumerate(["red"] * 2 + ["dark red"] * 8)]
    two = ["blue", "navy", "blue"]
    rows = [
        {"question": "?", "answers": ten, "multiple_choice_answer": "dark red", "image": "red.png"},
        {"question": "?", "answers": two, "multiple_choice_answer": None, "image": "red.png"},
    ]
    task, got = load(folder, rows)
    assert got["gold"][:] == ["dark red", "blue"]
    scores, each = task.score(got, [["Red"], ["navy."]])
    assert [row["right"] for row in each] == [[0.6], [1.0]]
    assert scores["accuracy"] == pytest.approx(0.8)


def test_agreement_is_that_of_vqa_worked_by_hand():
    # Left out one of the 3: the other 9 hold 2, else 3: (3 · 2/3 + 7 · 1) / 10.
    assert agreement("yes", ["yes"] * 3 + ["no"] * 7) == pytest.approx(0.9)
    assert [agreement("yes", ["yes"] * n + ["no"] * (10 - n)) for n in (0, 4, 10)] == [0, 1, 1]


def test_rows_of_a_file_are_asked_without_answers(folder):
    file = write_jsonl(folder / "new.jsonl", [
        {"question": "what colour?", "image": "red.png"},
        {"question": "what colour?", "image": None},
        {"question": None, "image": "red.png"},
    ])  # fmt: skip
    n, rows, places = get_task({"name": "vqa"}).ask(DataSpec.read({"test": file}, ("test",)))
    assert (n, places, rows["image"][:]) == (3, [0], [RED])
    assert rows["messages"][0][0]["content"] == ASKED


# -- models --------------------------------------------------------------------------------------------


def test_a_prompt_that_is_read_both_ways_does_not_see_its_answer(folder):
    model, processor = paligemma()
    task, rows = load(folder, [{**QA, "answer": "magenta", "image": "red.png"}])
    row = task.prepare({"train": rows}, processor, model)["train"][0]
    batch = task.collator(processor)([row])
    at = len(row["input_ids"]) - 3
    with torch.no_grad():
        before = model(**batch).logits
        batch["input_ids"][0, at] += 1
        moved = (model(**batch).logits - before).abs().amax(-1)[0] > 0
    assert int(moved.nonzero()[0]) == at


def test_a_mask_of_images_for_each_token_goes_with_the_row(folder):
    model, processor = mllama()
    task, rows = load(folder, [{**QA, "image": "red.png"}, {**QA, "answer": "yellow", "image": "sub/red.png"}])
    ready = task.prepare({"train": rows}, processor, model)["train"]
    both = task.collator(processor)(list(ready))
    alone = [task.collator(processor)([row]) for row in ready]
    assert both["cross_attention_mask"].shape == (*both["input_ids"].shape, 1, 2)
    with torch.no_grad():
        for i, batch in enumerate(alone):
            own = model(**batch).logits[0]
            torch.testing.assert_close(model(**both).logits[i, : len(own)], own)
            without = model(**{k: v for k, v in batch.items() if k != "cross_attention_mask"}).logits[0]
            assert not torch.allclose(without, own)


def test_a_processor_that_puts_the_images_tokens_itself_gets_no_second_ones(folder):
    model, processor = blip2()
    task, rows = load(folder, [{**QA, "image": "red.png"}])
    ready = task.prepare({"train": rows}, processor, model)["train"]
    assert ready["input_ids"][0].count(model.config.image_token_index) == 4
    assert model(**task.collator(processor)(list(ready))).loss > 0


def test_models_that_the_task_cannot_serve_are_refused_by_name(folder):
    task, rows = load(folder, [{**QA, "image": "red.png"}])
    with pytest.raises(ModelError, match="InstructBlipProcessor makes qformer_attention_mask, qformer_input_ids"):
        model, processor = blip2(qformer_reads_text=True)
        task.prepare({"train": rows}, processor, model)
    with pytest.raises(ConfigError, match="florence2 is an encoder-decoder"):
        task.adjust_to(SimpleNamespace(model_type="florence2", is_encoder_decoder=True))
    with pytest.raises(ConfigError, match="SimpleNamespace has no chat template and no token for images"):
        task.template_text(SimpleNamespace())


def test_what_a_processor_refuses_is_told_with_the_row(folder):
    task, rows = load(folder, [{**QA, "image": "red.png"}])
    processor = llava_processor()
    processor.chat_template = "{% for m in messages %}{{ m.role }}{% endfor %}"  # has no place for the image
    with pytest.raises(DataError, match=r"train row 1: the model's processor refuses it: .* tokens"):
        task.prepare({"train": rows}, processor, llava_model())


def test_a_text_that_spells_the_images_token_is_refused(folder):
    task, rows = load(folder, [{**QA, "image": "red.png"}])
    row = {**rows[0], "messages": [rows["messages"][0][0], {**rows["messages"][0][1], "content": "a <image>"}]}
    task.meet(llava_processor(), llava_model())
    with pytest.raises(DataError, match="row 1: its text holds <image>, which stands for an image"):
        task.example_columns(row, _with_template(), "row 1")


def _with_template():
    processor = llava_processor()
    get_task({"name": "vqa"}).set_template(processor)
    return processor


def test_a_row_that_lacks_what_the_others_have_is_told():
    with pytest.raises(DataError, match="a row without an image has no cross_attention_mask"):
        Padder(0)([{"cross_attention_mask": [[0]]}, {"cross_attention_mask": None}])


def test_a_row_without_tokens_is_filled_wherever_it_stands():
    for side, filled in (("right", [[7, 7], [1, 2]]), ("left", [[7, 7], [1, 2]])):
        assert Padder(7)([{"input_ids": []}, {"input_ids": [1, 2]}], side)["input_ids"].tolist() == filled
    assert Padder(0)([{"mask": []}, {"mask": [[1, 1]]}])["mask"].tolist() == [[[0, 0]], [[1, 1]]]


def test_init_splits_nothing_off_where_a_test_file_is_scored(folder):
    llava_model().save_pretrained(folder / "model")
    llava_processor().save_pretrained(folder / "model")
    for split in ("train", "test"):
        write_jsonl(folder / f"{split}.jsonl", [{**QA, "image": "red.png"}] * 4)
    made = start(folder / "train.jsonl", folder / "r.yaml", str(folder / "model"))
    assert made.task == "vqa"
    assert "validation_share" not in (folder / "r.yaml").read_text()
