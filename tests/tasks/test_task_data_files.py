"""Reading users' files: what is read, and how each mistake is reported."""

import pytest

from tasks.stand_ins import data_pack, write_jsonl
from trimtab.app.tasks.data import DataSpec, column
from trimtab.app.tasks.files import read_file, read_files
from trimtab.errors import ConfigError, DataError

SPLITS = ("train", "validation", "test")


def read(tmp_path, name, content):
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_file("data.train", file)


def test_json_lines_end_at_newline_only(tmp_path):
    text = "one\u2028two\u2029three\x85four\x0bfive\x1csix"
    file = write_jsonl(tmp_path / "x.jsonl", [{"text": text}, {"text": "b"}])
    assert read_file("data.train", DataSpec.read({"train": file}, SPLITS).files["train"][0]) == {"text": [text, "b"]}


def test_csv_lines_end_at_newline_only_and_cells_stay_text(tmp_path):
    table = read(tmp_path, "x.csv", 'id,text\r\n007,"a, ""b""\u2028\nc"\r\n\r\nNA,d\r\n')
    assert table == {"id": ["007", "NA"], "text": ['a, "b"\u2028\nc', "d"]}


def test_tsv_quotes_are_characters(tmp_path):
    assert read(tmp_path, "x.tsv", 'a\tb\n"x\t1\ny"\t2\n') == {"a": ['"x', 'y"'], "b": ["1", "2"]}


def test_parquet_is_read(tmp_path):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", "b"], "label": [1, 0]}), tmp_path / "x.parquet")
    assert read_file("data.train", tmp_path / "x.parquet") == {"text": ["a", "b"], "label": [1, 0]}


def test_json_list_and_byte_order_mark_are_read(tmp_path):
    assert read(tmp_path, "x.json", '[{"a": 1}, {"a": 2}]') == {"a": [1, 2]}
    assert read(tmp_path, "y.jsonl", b'\xef\xbb\xbf{"a": 1}\n') == {"a": [1]}


def test_rows_with_differing_keys_are_filled_with_none(tmp_path):
    table = read(tmp_path, "x.jsonl", '{"a": 1}\n{"b": 2}\n{"a": 3, "c": 4}\n')
    assert table == {"a": [1, None, 3], "b": [None, 2, None], "c": [None, None, 4]}


def test_several_files_are_one_table(tmp_path):
    files = [tmp_path / "1.jsonl", tmp_path / "2.jsonl"]
    write_jsonl(files[0], [{"a": 1}])
    write_jsonl(files[1], [{"a": 2}])
    assert read_files("data.train", files) == {"a": [1, 2]}
    write_jsonl(files[1], [{"a": 2, "b": 3}])
    table = read_files("data.train", files)
    assert table == {"a": [1, 2], "b": [None, 3]}
    with pytest.raises(DataError, match=r"task\.label='b': no column 'b' in 1\.jsonl, which is among"):
        column(table, "b", "task.label='b'", "data.train")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("x.jsonl", "", ["holds no rows"]),
        ("x.csv", "text,label\n", ["holds no rows"]),
        ("x.csv", "", ["holds no rows"]),
        ("x.json", "[]", ["holds no rows"]),
        ("x.jsonl", '{"a": 1}\n{"a": \n', ["line 2", "not valid JSON"]),
        ("x.jsonl", '{"a": 1}\n[2]\n', ["line 2", "list", "not an object"]),
        ("x.json", '[{"a": 1}, 3]', ["entry 2", "int"]),
        ("x.json", '[{"a": 1},', ["not valid JSON"]),
        ("x.csv", "a,b\n1,2\n3\n", ["line 3 has 1 fields", "first line has 2"]),
        ("x.csv", 'a,b\n1,"2\n', ["after line 1", "not valid CSV"]),
        ("x.csv", "a,a\n1,2\n", ["'a' appears twice"]),
        ("x.parquet", "no", ["not a Parquet file"]),
        ("x.xlsx", "no", ["cannot tell its format", ".csv"]),
        ("x.jsonl", b'{"a": 1}\n{"a": "\xe9"}\n', ["line 2 is not UTF-8"]),
    ],
)
def test_a_bad_file_is_reported_in_one_line(tmp_path, name, content, words):
    with pytest.raises(DataError) as error:
        read(tmp_path, name, content)
    message = str(error.value)
    assert "\n" not in message
    assert message.startswith("data.train='")
    for word in words:
        assert word in message


def test_a_missing_file_is_named_with_its_neighbour(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", [{"a": 1}])
    with pytest.raises(DataError, match=r"data\.train='.*tran\.jsonl': no such file\. Did you mean 'train\.jsonl'\?"):
        DataSpec.read({"train": str(tmp_path / "tran.jsonl")}, SPLITS)
    with pytest.raises(DataError, match=r"data\.test='.*x\.csv': no such file$"):
        DataSpec.read({"test": str(tmp_path / "nowhere" / "x.csv")}, SPLITS)
    with pytest.raises(DataError, match=r"no test file in this folder .*; it holds train\.jsonl"):
        DataSpec.read({"test": str(tmp_path)}, SPLITS)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"trian": "x"}, ["data.trian='x'", "Did you mean 'train'?"]),
        ({"train": 3}, ["data.train=3", "a path"]),
        ({"train": []}, ["data.train=[]"]),
        ({"max_samples": 0}, ["data.max_samples=0", "at least 1"]),
        ({"max_samples": {"train": "many"}}, ["data.max_samples.train='many'"]),
        ({"max_samples": {"trian": 3}}, ["data.max_samples.trian=3", "Did you mean 'train'?"]),
        ({"sample_seed": "x"}, ["data.sample_seed='x'"]),
    ],
)
def test_a_wrong_data_setting_is_refused_in_one_line(data, words):
    with pytest.raises(ConfigError) as error:
        DataSpec.read(data, SPLITS)
    for word in words:
        assert word in str(error.value)


def test_samples_are_the_first_or_drawn_with_the_seed():
    assert DataSpec(max_samples=3, sample_seed="first").kept("train", 10) == [0, 1, 2]
    assert DataSpec(max_samples=3).kept("train", 10) == DataSpec(max_samples=3, sample_seed=0).kept("train", 10)
    assert DataSpec(max_samples=3).kept("train", 3) is None
    assert DataSpec(max_samples={"train": 3}).kept("test", 10) is None
    drawn = DataSpec(max_samples=3, sample_seed=1).kept("train", 1000)
    assert drawn == DataSpec(max_samples=3, sample_seed=1).kept("train", 1000) == sorted(drawn)
    assert drawn != DataSpec(max_samples=3, sample_seed=2).kept("train", 1000)


def test_real_files_have_their_documented_row_counts():
    assert len(read_file("data.train", data_pack("cola") / "train.jsonl")["sentence"]) == 8551
    assert len(read_file("data.train", data_pack("rte") / "train.jsonl")["label"]) == 2490
