"""Instruction rows in all their forms; the loss on the answers only; what is kept with the adapter."""

import math

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import processors
from transformers import AutoTokenizer, Trainer, TrainingArguments

from tasks.stand_ins import Reciter, byte_model, byte_tokenizer, data_pack, decoder_tokenizer, tiny_config, write_jsonl
from trimtab.app import judging
from trimtab.app.models import ModelSpec, load_config, load_model
from trimtab.app.tasks import get_task
from trimtab.app.tasks.answer_loss import answer_scores, answer_sums
from trimtab.app.tasks.chats import Reader
from trimtab.app.tasks.data import DataSpec
from trimtab.errors import ConfigError, DataError

ROWS = [
    {"instruction": "Name a colour.", "input": "", "output": "Red."},
    {"instruction": "Add.", "input": "1 and 2", "output": "3"},
]
CHAT = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "Ciao"},
]


def load(tmp_path, rows, settings=None, **splits):
    task = get_task({"name": "instruct", **(settings or {})})
    files = {
        split: write_jsonl(tmp_path / f"{split}.jsonl", part)
        for split, part in {"train": rows, **(splits or {"validation": rows})}.items()
    }
    return task, task.load_data(files)


def prepared(tmp_path, rows, settings=None, tokenizer=None, model=None):
    task, loaded = load(tmp_path, rows, settings)
    tokenizer = tokenizer or byte_tokenizer()
    ready = task.prepare(loaded, tokenizer, model or byte_model())
    return task, ready, tokenizer


def learned(row, tokenizer):
    """The text before the answer, and the answer, as the labels mark them."""
    pieces, before = [], None
    for token, label in zip(row["input_ids"], row["labels"]):
        assert label in (-100, token)
        if (label != -100) != before:
            pieces.append([])
            before = label != -100
        pieces[-1].append(token)
    return [tokenizer.decode(piece) for piece in pieces]


def test_alpaca_rows_get_the_papers_prompt_and_labels_on_the_answer_alone(tmp_path):
    _, ready, tokenizer = prepared(tmp_path, ROWS)
    assert learned(ready["train"][0], tokenizer) == [
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nName a colour.\n\n### Response:\n",
        "Red.</s>",
    ]
    assert learned(ready["train"][1], tokenizer) == [
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1 and 2\n\n"
        "### Response:\n",
        "3</s>",
    ]


def test_a_tokenizers_own_template_is_used_and_every_answer_of_a_chat_is_learned(tmp_path):
    _, ready, tokenizer = prepared(
        tmp_path, [{"messages": CHAT}, *({"messages": CHAT},) * 3], tokenizer=byte_tokenizer(chat=True)
    )
    assert learned(ready["train"][0], tokenizer) == [
        "[user]Hi<|end|>\n[assistant]",
        "Hello<|end|>",
        "\n[user]Bye<|end|>\n[assistant]",
        "Ciao<|end|>",
    ]


def test_a_template_that_rewrites_earlier_turns_leaves_the_last_answer(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if not (m.role == 'assistant' and not loop.last) %}"
        "[{{ m.role }}]{{ m.content }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    _, ready, _ = prepared(tmp_path, [{"messages": CHAT}] * 2, tokenizer=tokenizer)
    assert learned(ready["train"][0], tokenizer) == ["[user]Hi[user]Bye[assistant]", "Ciao</s>"]


THINKING = (
    "{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
"""As Qwen3's, which writes an empty reasoning before the last answer, but not into the prompt."""


def test_what_a_template_writes_before_an_answer_is_learned_and_is_none_of_the_answers_words(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = THINKING
    task, ready, _ = prepared(tmp_path, ROWS, tokenizer=tokenizer)
    prompt, answer = learned(ready["train"][0], tokenizer)
    assert (prompt, answer) == ("[user]Name a colour.<|end|>[assistant]", "<think>\n\n</think>\n\nRed.<|end|>")
    _, raw = load(tmp_path, ROWS)
    for said in ("<think>\n\n</think>\n\nRed.", "Red."):
        model = Reciter(tokenizer, lambda prompt, said=said: said)
        assert task.answers(model, tokenizer, raw["validation"], "validation") == [["Red."], ["Red."]]


def test_rows_to_be_answered_need_no_column_of_answers_whatever_its_name(tmp_path):
    file = write_jsonl(tmp_path / "t.jsonl", [{"ask": "Name a colour."}])
    task = get_task({"name": "instruct", "columns": {"instruction": "ask", "output": "reply"}})
    _, raw, _ = task.ask(DataSpec.read({"test": file}, ("test",)))
    assert raw["messages"][0][0]["content"] == "Name a colour."
    task = get_task({"name": "instruct", "columns": {"instruction": "asked", "output": "reply"}})
    with pytest.raises(DataError, match=r"task\.columns\.instruction='asked': no such column"):
        task.ask(DataSpec.read({"test": file}, ("test",)))


def test_a_prompt_is_tokenised_in_training_as_when_an_answer_is_generated(tmp_path):
    for tokenizer in (byte_tokenizer(), byte_tokenizer(chat=True), decoder_tokenizer()):
        tokenizer.pad_token = tokenizer.pad_token or "</s>"
        task, ready, _ = prepared(tmp_path, ROWS, tokenizer=tokenizer)
        raw = task.load_data({"train": str(tmp_path / "train.jsonl"), "validation": str(tmp_path / "train.jsonl")})
        for row, one in zip(ready["train"], raw["train"]):
            asked = task.question_columns(one, tokenizer, "row")["input_ids"]
            assert row["input_ids"][: len(asked)] == asked
            assert row["labels"][len(asked) - 1] == -100 != row["labels"][len(asked)]


def test_tokens_that_join_prompt_and_answer_are_kept_apart():
    class Joining:
        """Makes one token of "ab", as byte-pair encodings do."""

        eos_token, eos_token_id, all_special_tokens, chat_template, bos_token = "$", 9, ["$"], "x", None
        ids = {"ab": 1, "a": 2, "b": 3, "$": 9}

        def __call__(self, text, **_):
            found = []
            while text:
                piece = "ab" if text.startswith("ab") else text[0]
                found.append(self.ids[piece])
                text = text[len(piece) :]
            return {"input_ids": found}

        def apply_chat_template(self, messages, tokenize, add_generation_prompt):
            return "".join(m["content"] for m in messages)

    task = get_task({"name": "instruct"})
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert task.encode(turns, Joining()) == ([2, 3, 9], [-100, 3, 9])
    turns[0]["content"] = "b"
    assert task.encode(turns, Joining()) == ([3, 3, 9], [-100, 3, 9])


def test_a_beginning_token_is_written_once_where_the_tokenizer_writes_one(tmp_path):
    from tokenizers.processors import TemplateProcessing

    tokenizer = byte_tokenizer()
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    _, ready, _ = prepared(tmp_path, ROWS, tokenizer=tokenizer)
    assert ready["train"][0]["input_ids"][:2].count(1) == 1


@pytest.mark.parametrize(
    ("form", "row"),
    [
        ("messages", {"messages": CHAT}),
        (
            "conversations",
            {
                "conversations": [
                    {"from": "human", "value": "Hi"},
                    {"from": "gpt", "value": "Hello"},
                    {"from": "human", "value": "Bye"},
                    {"from": "gpt", "value": "Ciao"},
                ]
            },
        ),
        ("completion", {"prompt": CHAT[:3], "completion": CHAT[3:]}),
    ],
)
def test_chats_are_one_whatever_their_keys(form, row):
    table = {name: [value] for name, value in row.items()}
    assert Reader().form(table, "x") == form
    assert Reader().conversations(table, "x") == [CHAT]


@pytest.mark.parametrize(
    ("form", "row"),
    [
        ("completion", {"prompt": "Q", "completion": "A"}),
        ("response", {"query": "Q", "response": "A", "type": "GSM"}),
        ("query", {"query": "Q", "answer": "A", "lang": "python"}),
        ("question", {"question": "Q", "answer": "A"}),
        ("alpaca", {"instruction": "Q", "output": "A"}),
        ("instances", {"instruction": "Q", "instances": [{"input": "", "output": "A"}]}),
    ],
)
def test_questions_and_answers_are_one_whatever_their_columns(form, row):
    table = {name: [value] for name, value in row.items()}
    assert Reader().form(table, "x") == form
    assert Reader().conversations(table, "x") == [
        [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    ]


def test_an_instruction_is_asked_with_the_input_of_its_instance():
    def asked(*instances):
        return Reader(asking=True).conversations({"instruction": ["Sum."], "instances": [list(instances)]}, "x")

    assert asked({"input": "1 2"})[0][0] == {"role": "user", "content": "Sum.", "input": "1 2"}
    with pytest.raises(DataError, match="row 1 has 2 instances, and a row is given one answer; give each a row"):
        asked({"input": "1 2"}, {"input": "3 4"})


def test_columns_can_be_named_and_prompts_taken_as_they_stand(tmp_path):
    rows = [{"before": "2 + 2 =", "after": " 4"}] * 2
    _, ready, tokenizer = prepared(tmp_path, rows, {"prompt": "before", "answer": "after", "template": "plain"})
    assert learned(ready["train"][0], tokenizer) == ["2 + 2 =", " 4</s>"]
    _, ready, tokenizer = prepared(tmp_path, [{"prompt": "2 + 2 =", "completion": " 4"}] * 2)
    assert learned(ready["train"][0], tokenizer) == ["2 + 2 =", " 4</s>"]


def test_a_system_message_and_a_template_file(tmp_path):
    (tmp_path / "t.jinja").write_text("{% for m in messages %}<{{ m.content }}>{% endfor %}")
    _, ready, tokenizer = prepared(tmp_path, ROWS, {"system": "Be brief.", "template": str(tmp_path / "t.jinja")})
    assert learned(ready["train"][1], tokenizer) == ["<Be brief.><Add.\n\n1 and 2>", "<3></s>"]
    _, ready, tokenizer = prepared(tmp_path, ROWS, {"system": "Be brief."})
    assert tokenizer.decode(ready["train"][0]["input_ids"]).startswith("Be brief.\n\n### Instruction:\nName")


def test_the_template_is_saved_with_the_tokenizer(tmp_path):
    _, _, tokenizer = prepared(tmp_path, ROWS)
    tokenizer.save_pretrained(tmp_path / "adapter")
    again = AutoTokenizer.from_pretrained(tmp_path / "adapter")
    text = again.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True)
    assert text.endswith("### Instruction:\nHi\n\n### Response:\n")


def test_long_rows_are_cut_and_rows_without_room_for_an_answer_left_out(tmp_path):
    rows = [{"prompt": "p" * n, "completion": "answer"} for n in (2, 18, 40)]
    task, ready, _ = prepared(tmp_path, rows, {"max_length": 20})
    assert [len(row) for row in ready["train"]["input_ids"]] == [9, 20]
    assert ready["train"][1]["labels"][-2:] == ready["train"][1]["input_ids"][-2:]
    assert "train: 1 of 3 rows left out: the prompt alone has 20 tokens or more (task.max_length)" in task.notes
    assert "train: 1 of 2 rows cut to 20 tokens (task.max_length)" in task.notes
    with pytest.raises(DataError, match=r"data\.train: no row's answer begins within task\.max_length=20"):
        prepared(tmp_path, rows[2:] * 2, {"max_length": 20})


def test_the_worst_rows_are_told_by_their_own_words_where_others_were_left_out(tmp_path):
    rows = [{"instruction": "x" * 80 if i == 1 else f"Question {i}", "output": f"answer {i}"} for i in range(4)]
    task, raw = load(tmp_path, rows, {"template": "plain"})
    ready = task.prepare(raw, byte_tokenizer(), byte_model("gpt2"))["validation"]
    assert len(ready) == 3
    kept = {"answer_loss": [1.0, 9.0, 2.0], "tokens": [1, 1, 1]}
    worst = judging.worst(task, kept, raw["validation"], task.places["validation"])
    assert [(one["row"], one["text"], one["loss"]) for one in worst] == [
        (3, "Question 2", 9.0), (4, "Question 3", 2.0), (1, "Question 0", 1.0),
    ]  # fmt: skip


def test_layers_are_selected_on_rows_without_their_end_token(tmp_path):
    task, ready, tokenizer = prepared(tmp_path, ROWS)
    rows = task.selection_rows(ready)
    assert rows.column_names == ["input_ids", "attention_mask"]
    assert [tokenizer.decode(ids[-1:]) for ids in rows["input_ids"]] == [".", "3"]
    assert [len(mask) for mask in rows["attention_mask"]] == [len(ids) for ids in rows["input_ids"]]
    assert task.pool(tiny_config("llama")) == "last"


def test_loss_is_summed_over_answer_tokens_only():
    # Two rows over three tokens, vocabulary of two; p(token 1) is 3/4 at position 0, 1/2 at position 1.
    logits = torch.tensor([[[0.0, math.log(3)], [0.0, 0.0], [9.0, 0.0]]] * 2)
    labels = torch.tensor([[-100, 1, 0], [-100, -100, 1]])
    sums = answer_sums(logits, labels, shifted=True)
    # Argmax of a tie is token 0.
    assert sums.tolist() == [pytest.approx([math.log(4 / 3) + math.log(2), 2, 2]), pytest.approx([math.log(2), 1, 0])]
    scores = answer_scores(sums.numpy())
    loss = (math.log(4 / 3) + 2 * math.log(2)) / 3
    assert scores == pytest.approx({"answer_loss": loss, "perplexity": math.exp(loss), "token_accuracy": 2 / 3})


def test_an_encoder_decoders_labels_are_not_shifted():
    logits = torch.tensor([[[0.0, math.log(3)], [0.0, 0.0]]])
    assert answer_sums(logits, torch.tensor([[1, -100]]), shifted=False).tolist() == [
        pytest.approx([math.log(4 / 3), 1, 1])
    ]


def test_scores_of_nothing_and_of_the_very_bad_are_not_numbers_that_look_good():
    assert math.isnan(answer_scores(np.zeros((1, 3)))["answer_loss"])
    assert answer_scores(np.array([[1e4, 1.0, 0]]))["perplexity"] == math.inf
    assert math.isnan(answer_scores(np.array([[math.nan, 1.0, 0]]))["perplexity"])


@pytest.mark.parametrize("kind", ["llama", "t5", "bart"])
def test_the_answer_loss_is_the_models_own_loss_whatever_the_padding(tmp_path, kind):
    model = byte_model(kind, **({"max_position_embeddings": 512} if kind == "bart" else {}))
    task, ready, tokenizer = prepared(tmp_path, ROWS, model=model)
    collate = task.collator(tokenizer)
    batch = collate([ready["train"][i] for i in range(2)])
    with torch.no_grad():
        sums = task.preprocess_logits_for_metrics((model(**batch).logits, "cache"), batch["labels"])
        for row, alone in zip(sums, ready["train"]):
            one = collate([alone])
            assert row[0] / row[1] == pytest.approx(model(**one).loss.item(), rel=1e-4)
    assert task.compute_metrics(((sums.numpy(),), None))["answer_loss"] == pytest.approx(
        (sums[:, 0].sum() / sums[:, 1].sum()).item()
    )


def test_an_encoder_decoder_reads_the_question_and_learns_the_answer(tmp_path):
    task, ready, tokenizer = prepared(tmp_path, ROWS, model=byte_model("t5"))
    assert task.task_type == "SEQ_2_SEQ_LM"
    row = ready["train"][1]
    assert tokenizer.decode(row["input_ids"]) == "Add.\n\n1 and 2"
    assert tokenizer.decode(row["labels"]) == "3"
    assert task.selection_rows(ready).column_names == ready["train"].column_names  # its decoder needs the labels


def ending_tokenizer():
    """Ends every text, as T5's and BART's do."""
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 2)]
    )
    return tokenizer


@pytest.mark.parametrize(("settings", "limit"), [({}, 64), ({"max_length": 20}, 20)])
def test_an_encoder_is_asked_what_it_was_trained_on_where_the_question_is_too_long(tmp_path, settings, limit):
    rows = [{"instruction": "".join(map(chr, range(40, 120))), "output": "a"}] * 2
    tokenizer, model = ending_tokenizer(), byte_model("bart", max_position_embeddings=64)
    settings = {"generation": {"max_new_tokens": 4}, **settings}
    task, ready, _ = prepared(tmp_path, rows, settings, tokenizer, model)
    read = []
    model.model.encoder.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(kwargs["input_ids"][0].tolist()), with_kwargs=True
    )
    _, raw = load(tmp_path, rows, settings)
    task.answers(model, tokenizer, raw["validation"], "validation")
    assert read == [ready["train"][0]["input_ids"]]
    assert len(read[0]) == limit and tokenizer.decode(read[0][:3] + read[0][-1:]) == "()*</s>"
    assert task.notes[-1] == f"validation: 2 of 2 prompts cut to {limit} tokens"


def test_a_decoder_with_few_positions_is_given_no_more_of_an_answer_and_asked_for_no_more(tmp_path):
    rows = [{"instruction": "q" * 100, "output": "a" * n} for n in (3, 80)]
    tokenizer = ending_tokenizer()
    model = byte_model("led", max_position_embeddings=None, max_encoder_position_embeddings=128, max_decoder_position_embeddings=32,
                       d_model=16, encoder_layers=1, decoder_layers=1, attention_window=16)  # fmt: skip
    task, ready, _ = prepared(tmp_path, rows, None, tokenizer, model)
    assert [len(ids) for ids in ready["train"]["input_ids"]] == [101, 101]
    assert [(len(ids), ids[-1]) for ids in ready["train"]["labels"]] == [(4, 2), (32, 2)]
    assert "train: 1 of 2 answers cut to 32 tokens, the positions that the decoder has" in task.notes
    assert model(**task.collator(tokenizer)([ready["train"][1]])).loss > 0
    with pytest.raises(ConfigError, match=r"max_new_tokens=256: at most 32, the positions that this model's decoder"):
        task.answers(model, tokenizer, load(tmp_path, rows)[1]["train"], "train")


def test_the_kind_of_model_is_settled_by_its_config():
    task = get_task({"name": "instruct"})
    small = {"vocab_size": 64, "num_layers": 1, "d_model": 8, "d_ff": 8, "num_heads": 2, "d_kv": 4}
    spec = ModelSpec(config={"model_type": "t5", **small})
    load_config(spec, task)
    assert (task.auto_class, task.task_type) == ("AutoModelForSeq2SeqLM", "SEQ_2_SEQ_LM")
    assert type(load_model(spec, task).model).__name__ == "T5ForConditionalGeneration"
    load_config(ModelSpec(config={"model_type": "gpt2"}), task)
    assert (task.auto_class, task.task_type) == ("AutoModelForCausalLM", "CAUSAL_LM")


def test_a_checkpoint_of_either_kind_is_loaded_without_being_told(tmp_path):
    for kind, name in (("t5", "T5ForConditionalGeneration"), ("llama", "LlamaForCausalLM")):
        byte_model(kind).save_pretrained(tmp_path / kind)
        task = get_task({"name": "instruct"})
        assert type(load_model(ModelSpec(name_or_path=str(tmp_path / kind)), task).model).__name__ == name


def test_training_lowers_the_answer_loss_on_held_out_rows(tmp_path):
    rows = [{"instruction": f"Say {word}.", "output": word} for word in ("aaaa", "bbbb")] * 20
    model = byte_model()
    task, ready, tokenizer = prepared(tmp_path, rows, {"template": "plain"}, model=model)
    peft = get_peft_model(model, LoraConfig(task_type=task.task_type, r=4, target_modules="all-linear"))
    trainer = Trainer(
        model=peft,
        train_dataset=ready["train"],
        eval_dataset=ready["validation"],
        data_collator=task.collator(tokenizer),
        compute_metrics=task.compute_metrics,
        preprocess_logits_for_metrics=task.preprocess_logits_for_metrics,
        args=TrainingArguments(
            str(tmp_path / "out"),
            max_steps=10,
            per_device_train_batch_size=10,
            learning_rate=3e-2,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            save_strategy="no",
        ),
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_answer_loss"] < before["eval_answer_loss"] - 0.1
    assert after["eval_token_accuracy"] > before["eval_token_accuracy"]
    assert before["eval_answer_loss"] == pytest.approx(before["eval_loss"], rel=1e-3)  # answers are equally long
    assert after["eval_perplexity"] == pytest.approx(math.exp(after["eval_answer_loss"]))
    assert task.evaluate(peft, tokenizer, ready, "validation") == {}  # nothing is generated


def test_a_tenth_is_held_out_where_nothing_else_can_be_scored(tmp_path):
    task, _ = load(tmp_path, ROWS * 15)
    assert task.notes == ["validation: 30 of 30 rows are among the training rows, too"]
    rows = task.load_data({"train": str(tmp_path / "train.jsonl")})
    assert {split: len(part) for split, part in rows.items()} == {"train": 27, "validation": 3}
    assert task.notes == [
        "no data.validation: 3 of 30 training rows were split off for it",
        "validation: 3 of 3 rows are among the training rows, too",
    ]
    rows = task.load_data(
        {"train": str(tmp_path / "train.jsonl"), "test": str(tmp_path / "train.jsonl"), "max_samples": {"train": 4}}
    )
    assert {split: len(part) for split, part in rows.items()} == {"train": 4, "test": 30}
    assert task.eval_splits(rows) == ["test"]


def test_rows_without_an_answer_are_left_out(tmp_path):
    rows = [*ROWS, {"instruction": "?", "input": "", "output": " "}]
    task, loaded = load(tmp_path, rows)
    assert len(loaded["train"]) == 2
    assert "train: 1 of 3 rows have no answer and were left out" in task.notes


@pytest.mark.parametrize(
    ("rows", "settings", "words"),
    [
        ([{"text": "a"}], {}, ["its columns text are in none of the forms known", "task.prompt and task.answer"]),
        ([{"a": "x", "b": "y"}], {"prompt": "a", "answer": "c"}, ["task.answer='c'", "no column 'c'"]),
        ([{"prompt": None, "completion": "a"}], {}, ["no row has a prompt"]),
        ([{"prompt": {"a": 1}, "completion": "a"}], {}, ["row 1: its prompt is a dict"]),
        ([{"messages": "hello"}], {}, ["row 1 has a str where a list of messages is needed"]),
        ([{"messages": [{"role": "robot", "content": "x"}]}], {}, ["row 1 has a message with role 'robot'"]),
        ([{"instruction": "a", "instances": [3]}], {}, ["row 1 has an instance that is no object"]),
        ([{"instruction": "a", "output": ""}], {}, ["no row has an answer"]),
    ],
)
def test_wrong_rows_are_reported_in_one_line(tmp_path, rows, settings, words):
    with pytest.raises(DataError) as error:
        load(tmp_path, rows, settings)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"max_length": 1}, r"task\.max_length=1: a whole number of tokens, at least 2"),
        ({"template": "alpacca"}, r"task\.template='alpacca': not known\. Did you mean 'alpaca'\?"),
        ({"prompt": "a"}, r"task\.answer=None: name both columns"),
        ({"answer": 3}, r"task\.answer=3: the name of a column"),
        ({"system": ""}, r"task\.system='': a text"),
        ({"tempalte": "own"}, r"task\.tempalte='own': task 'instruct' has no such setting\. Did you mean 'template'\?"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        get_task({"name": "instruct", **settings})


def test_what_only_the_model_shows_to_be_wrong_is_refused_by_name(tmp_path):
    with pytest.raises(ConfigError, match=r"task\.template='own': the tokenizer has no chat template"):
        prepared(tmp_path, ROWS, {"template": "own"})
    with pytest.raises(ConfigError, match=r"task\.template='no\.jinja': cannot be read"):
        prepared(tmp_path, ROWS, {"template": "no.jinja"})
    with pytest.raises(ConfigError, match=r"task\.max_length=65: at most 64"):
        prepared(tmp_path, ROWS, {"max_length": 65}, model=byte_model("gpt2"))
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no system role here') }}"
    with pytest.raises(DataError, match="the chat template refuses it: no system role here"):
        prepared(tmp_path, ROWS, tokenizer=tokenizer)


def test_the_hub_is_asked_where_no_files_are_given(monkeypatch):
    import datasets

    asked = []

    def load_dataset(*args, split):
        asked.append((*args, split))
        return datasets.Dataset.from_list([{**row, "text": "x"} for row in ROWS * 10])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = get_task({"name": "instruct"}).load_data({"max_samples": 10})
    assert asked == [("tatsu-lab/alpaca", None, "train")]
    assert {split: len(part) for split, part in rows.items()} == {"train": 9, "validation": 1}

    def unreachable(*args, **kwargs):
        raise OSError("offline\nmore")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(
        DataError, match=r"tatsu-lab/alpaca cannot be fetched from the hub \(offline\); give local files"
    ):
        get_task({"name": "instruct"}).load_data()


@pytest.mark.parametrize(
    ("name", "rows"),
    [("alpaca", 985), ("code_alpaca", 2015), ("self_instruct_seed", None), ("math_instruct", 1143), ("gsm8k", 7473)],
)
def test_real_rows_are_read(name, rows):
    task = get_task({"name": "instruct"})
    loaded = task.load_data({"train": str(data_pack(name) / "train.jsonl")})
    n = len(loaded["train"]) + len(loaded["validation"])
    assert n >= 175 if rows is None else n == rows
    small = {split: part.select(range(8)) for split, part in loaded.items()}
    ready = task.prepare(type(loaded)(small), byte_tokenizer())
    for row, raw in zip(ready["train"], small["train"]):
        assert byte_tokenizer().decode([t for t in row["labels"] if t != -100]) == (
            raw["messages"][-1]["content"].rstrip() + "</s>"
        )
