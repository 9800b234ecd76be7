"""Kinds of data files as people have them: what is in the file -> what is trained on, what is said, what is refused."""

import bz2
import csv
import doctest
import gzip
import io
import json
import lzma
import zipfile
from collections import Counter
from datetime import date
from decimal import Decimal

import pytest

from trimtab.app.tasks import cells, files, get_task, labels, names
from trimtab.app.tasks.columns import Table
from trimtab.app.tasks.files import read_file
from trimtab.app.tasks.guessing import guess
from trimtab.errors import TrimtabError

PAIRS = [(f"the film was {word} {i}", "good" if i % 2 else "bad") for i, word in enumerate(["dull", "warm"] * 10)]


def separated(mark=",", rows=PAIRS, header=("text", "label")):
    return "".join(mark.join(map(str, row)) + "\n" for row in (header, *rows))


def objects(rows=PAIRS):
    return [{"text": text, "label": label} for text, label in rows]


def lines(rows=PAIRS):
    return "".join(json.dumps(row) + "\n" for row in objects(rows))


def with_labels(*labels, times=8):
    return [(f"the film {i}", label) for i, label in enumerate(labels * times)]


def zipped(name, data, **others):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for file, content in {name: data, **others}.items():
            archive.writestr(file, content)
    return out.getvalue()


def arrow(kind, rows=20, text=("string", False), label=("string", False), more=()):
    """The pairs as Parquet or Feather. Of a column: its type, and whether it is a dictionary, or two values to take."""
    import pyarrow
    import pyarrow.feather
    import pyarrow.parquet

    def column(values, name, how):
        kind = pyarrow.decimal128(5, 2) if name == "decimal128" else getattr(pyarrow, name)()
        values = [how[i % 2] for i in range(rows)] if isinstance(how, list) else values[:rows]
        made = pyarrow.array(values, kind)
        return made.dictionary_encode() if how is True else made

    columns = {"text": column([t for t, _ in PAIRS], *text), "label": column([la for _, la in PAIRS], *label)}
    out = io.BytesIO()
    table = pyarrow.table({**columns, **dict(more)})
    (pyarrow.parquet.write_table if kind == "parquet" else pyarrow.feather.write_feather)(table, out)
    return out.getvalue()


def zstd(data):
    import pyarrow

    return pyarrow.compress(data.encode(), codec="zstd", asbytes=True)


def load(tmp_path, name, content, settings=(), data=(), **others):
    """The task, its rows, and the counts of the class names over training and validation."""
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    for other, text in others.items():
        (tmp_path / other.replace("__", ".")).write_text(text)
    task = get_task({"name": "text_classification", **dict(settings)})
    given = {key: str(tmp_path / value) if key == "validation" else value for key, value in dict(data).items()}
    rows = task.load_data({"train": str(file), **given})
    names = task.label_names
    counts = Counter(names[i] for part in rows.values() for i in part["label"][:]) if names else None
    return task, rows, counts


EVEN = {"bad": 10, "good": 10}
READ = {
    "semicolons": ("x.csv", separated(";"), EVEN, "separated by semicolon (data.separator)"),
    "tabs in a csv": ("x.csv", separated("\t"), EVEN, "separated by tab"),
    "pipes": ("x.csv", separated("|"), EVEN, "separated by pipe"),
    "commas in a tsv": ("x.tsv", separated(","), EVEN, "separated by comma"),
    "commas in a txt": ("x.txt", separated(","), EVEN, ""),
    "semicolons, commas in texts": ("x.csv", separated(";", [(f"{t}, yes, really", la) for t, la in PAIRS]), EVEN, ""),
    "Excel's sep line": ("x.csv", "sep=;\n" + separated(";"), EVEN, ""),
    "Windows line ends": ("x.csv", separated().replace("\n", "\r\n"), EVEN, ""),
    "old Mac line ends": ("x.csv", separated().replace("\n", "\r"), EVEN, ""),
    "blanks in the header": ("x.csv", separated(header=(" text ", " label")), EVEN, ""),
    "empty columns": ("x.csv", separated(rows=[(*p, "", "") for p in PAIRS], header=("text", "label", "", "")), EVEN, ""),
    "commas at the ends of rows": ("x.csv", separated(rows=[(*p, "", "") for p in PAIRS]), EVEN, ""),
    "empty columns left off": ("x.csv", separated(header=("text", "label", "", "")), EVEN, ""),
    "pandas' index": (
        "x.csv",
        separated(rows=[(i, *p) for i, p in enumerate(PAIRS)], header=("", "text", "label")),
        EVEN,
        "column 1 has no name in the first line and is not read",
    ),
    "UTF-8 with a mark": ("x.csv", separated().encode("utf-8-sig"), EVEN, ""),
    "UTF-16": ("x.csv", separated().encode("utf-16"), EVEN, ""),
    "UTF-16 without a mark": ("x.csv", separated().encode("utf-16-le"), EVEN, ""),
    "UTF-16 from the other end": ("x.tsv", separated("\t").encode("utf-16-be"), EVEN, ""),
    "JSON lines": ("x.jsonl", lines(), EVEN, ""),
    "JSON lines called json": ("x.json", lines(), EVEN, ""),
    "JSON lines called txt": ("x.txt", lines(), EVEN, ""),
    "a list called jsonl": ("x.jsonl", json.dumps(objects()), EVEN, ""),
    "an indented list": ("x.json", json.dumps(objects(), indent=2), EVEN, ""),
    "an indented list called jsonl": ("x.jsonl", json.dumps(objects(), indent=2), EVEN, ""),
    "indented objects": ("x.jsonl", "\n".join(json.dumps(row, indent=2) for row in objects()), EVEN, ""),
    "objects with commas between": ("x.json", ",\n".join(json.dumps(row) for row in objects()), EVEN, ""),
    "a wrapped list": ("x.json", json.dumps({"data": objects()}), EVEN, ""),
    "a wrapped list beside other things": ("x.json", json.dumps({"version": 1, "rows": objects()}, indent=1), EVEN, ""),
    "a list wrapped twice": ("x.json", json.dumps({"set": {"rows": objects()}}), EVEN, ""),
    "one list a split": ("x.json", json.dumps({"train": objects(), "test": objects()[:2]}), EVEN, ""),
    "by columns": ("x.json", json.dumps({k: [row[k] for row in objects()] for k in ("text", "label")}), EVEN, ""),
    "pandas' to_json": (
        "x.json",
        json.dumps({k: {str(i): row[k] for i, row in enumerate(objects())} for k in ("text", "label")}),
        EVEN,
        "",
    ),
    "one object a row, by its name": ("x.json", json.dumps({f"r{i}": row for i, row in enumerate(objects())}), EVEN, ""),
    "one object a row, by its number": ("x.json", json.dumps({str(i): {**row, **({"x": 1} if i else {})} for i, row in enumerate(objects())}), EVEN, ""),
    "pandas' to_json with an index of names": ("x.json", json.dumps({k: {f"r{i}": row[k] for i, row in enumerate(objects())} for k in ("text", "label")}), EVEN, ""),
    "a column that says what rows are for": ("x.csv", separated(rows=[(*p, "train" if i < 15 else "test") for i, p in enumerate(PAIRS)], header=("text", "label", "split")), EVEN, "column 'split' says that rows are for scoring ('test' 5), and all are trained on here"),
    "columns by split": ("x.json", json.dumps({s: {k: [row[k] for row in objects()] for k in ("text", "label")} for s in ("train", "test")}), EVEN, ""),
    "pandas' split": ("x.json", json.dumps({"columns": ["text", "label"], "index": [], "data": PAIRS}), EVEN, ""),
    "JSON in a csv": ("x.csv", json.dumps(objects()), EVEN, ""),
    "gzip": ("x.csv.gz", gzip.compress(separated().encode()), EVEN, ""),
    "gzip that does not say so": ("x.jsonl", gzip.compress(lines().encode()), EVEN, ""),
    "bzip2": ("x.csv.bz2", bz2.compress(separated().encode()), EVEN, ""),
    "zstd": ("x.jsonl.zst", zstd(lines()), EVEN, ""),
    "zip": ("x.zip", zipped("x.csv", separated()), EVEN, ""),
    "zip of JSON lines": ("x.jsonl.zip", zipped("x.jsonl", lines()), EVEN, ""),
    "UTF-32": ("x.csv", separated().encode("utf-32"), EVEN, ""),
    "a mark written twice": ("x.csv", b"\xef\xbb\xbf\xef\xbb\xbf" + separated().encode(), EVEN, ""),
    "JSON lines with a mark and Windows' ends": ("x.jsonl", b"\xef\xbb\xbf" + lines().replace("\n", "\r\n").encode(), EVEN, ""),
    "JSON lines with commas at their ends": ("x.jsonl", lines().replace("}\n", "},\n"), EVEN, ""),
    "a half of a pair of surrogates": ("x.jsonl", lines().replace("film", "\\ud83d film"), EVEN, ""),
    "an infinite number beside": ("x.jsonl", lines().replace("}", ', "x": Infinity}'), EVEN, ""),
    "blank lines at the top": ("x.csv", "\n\n" + separated(), EVEN, ""),
    "a line of blanks at the end": ("x.csv", separated() + "\n   \n", EVEN, ""),
    "quotes around the header": ("x.csv", separated(header=('"text"', '"label"')), EVEN, ""),
    "hard blanks in the header": ("x.csv", separated(header=("text\u00a0", "\u00a0label")), EVEN, ""),
    "line ends of Windows inside of cells": ("x.csv", separated(rows=[(f'"{t}\r\nmore"', la) for t, la in PAIRS]).replace("\n", "\r\n"), EVEN, ""),
    "fastText": ("x.txt", "".join(f"__label__{la} {t}\n" for t, la in PAIRS), EVEN, ""),
    "blanks before quoted cells": ("x.csv", '"text", "label"\n' + "".join(f'"{t}, yes", "{la}"\n' for t, la in PAIRS), EVEN, ""),
    "a lone carriage return, quotes left alone": ("x.tsv", separated("\t", [(f"{t}\rmore", la) for t, la in PAIRS]), EVEN, ""),
    "xz": ("x.csv.xz", lzma.compress(separated().encode()), EVEN, ""),
    "zip of a Mac": ("x.zip", zipped("rows/x.csv", separated(), **{"__MACOSX/rows/._x.csv": "junk"}), EVEN, ""),
    "Feather": ("x.feather", arrow("feather"), EVEN, ""),
    "Feather called arrow": ("x.arrow", arrow("feather"), EVEN, ""),
    "Parquet with long texts and a dictionary": ("x.parquet", arrow("parquet", text=("large_string", False), label=("string", True)), EVEN, ""),
    "Parquet with decimals for labels": ("x.parquet", arrow("parquet", label=("decimal128", [Decimal("0.00"), Decimal("1.00")])), {"0": 10, "1": 10}, ""),
    "Parquet with dates for labels": ("x.parquet", arrow("parquet", label=("date32", [date(2024, 1, 1), date(2024, 1, 2)])), {"2024-01-01": 10, "2024-01-02": 10}, ""),
    "Parquet with truth for labels": ("x.parquet", arrow("parquet", label=("bool_", [False, True])), {"false": 10, "true": 10}, ""),
    "Parquet with pandas' index and an empty column": ("x.parquet", arrow("parquet", more={"__index_level_0__": list(range(20)), "note": [None] * 20}), EVEN, ""),
    "labels of many digits": ("x.jsonl", lines(with_labels(12345678901234567890, 12345678901234567891)), {"12345678901234567890": 8, "12345678901234567891": 8}, ""),
    "labels of either type": ("x.jsonl", lines(with_labels("1", 1, "0", 0.0)), {"0": 16, "1": 16}, ""),
    "numbers below zero": ("x.csv", separated(rows=with_labels(-1, 0, 1)), {"-1": 8, "0": 8, "1": 8}, ""),
    "texts that are numbers": ("x.jsonl", lines([(i, la) for i, (_, la) in enumerate(PAIRS)]), EVEN, ""),
    "a dash for a label": ("x.csv", separated(rows=with_labels("yes", "no", "-")), {"-": 8, "no": 8, "yes": 8}, "is '-' a class? If it stands for no label: data.missing=['-']"),
    "a truth that is missing": ("x.jsonl", lines(with_labels(True, False, None)), {"false": 8, "true": 8}, "8 of 24 rows have no label"),
    "an NA label": ("x.csv", separated(rows=[*PAIRS, ("a", "NA"), ("b", "NA")]), EVEN, "2 of 22 rows have no label and were left out ('NA' 2"),
    "a nan label": ("x.csv", separated(rows=[*PAIRS, ("a", "nan")]), EVEN, "('nan' 1; task.labels or data.missing"),
    "an empty label": ("x.csv", separated(rows=[*PAIRS, ("a", "")]), EVEN, "1 of 21 rows have no label and were left out"),
    "a null label": ("x.jsonl", lines([*PAIRS, ("a", None)]), EVEN, "1 of 21 rows have no label"),
    "a NaN label": ("x.jsonl", lines([*PAIRS, ("a", float("nan"))]), EVEN, "1 of 21 rows have no label"),
    "a NaN text": ("x.jsonl", lines([*PAIRS, (float("nan"), "bad")]), EVEN, "1 of 21 rows have no text and were left out"),
    "a null text": ("x.jsonl", lines([*PAIRS, (None, "bad")]), EVEN, "1 of 21 rows have no text"),
    "a nan word": ("x.csv", separated(rows=[*PAIRS, ("nan", "bad")]), EVEN, "no text and were left out ('nan' 1"),
    "blank texts": ("x.csv", separated(rows=[*PAIRS, (" ", "bad"), ("", "good")]), EVEN, "2 of 22 rows have no text"),
    "numbers, written as floats": ("x.csv", separated(rows=with_labels("0.0", "1.0", "1")), {"0": 8, "1": 16}, ""),
    "a label that may be none": ("x.jsonl", lines(with_labels(-1, 0, 1)), {"-1": 8, "0": 8, "1": 8}, "is '-1' a class? If it stands for no label: data.missing=['-1']"),
    "true beside 1": ("x.jsonl", lines(with_labels(True, False, 1, 0)), {"0": 16, "1": 16}, ""),
    "true": ("x.jsonl", lines(with_labels(True, False)), {"false": 8, "true": 8}, ""),
    "True in a csv": ("x.csv", separated(rows=with_labels("True", "False")), {"False": 8, "True": 8}, ""),
    "whole numbers with blanks": ("x.csv", separated(rows=with_labels(" 1", "0", "1 ")), {"0": 8, "1": 16}, ""),
    "steps of a half": ("x.csv", separated(rows=with_labels("1.0", "1.5")), {"1": 8, "1.5": 8}, ""),
    "several labels in one": ("x.csv", separated(rows=with_labels("a|b", "a", "b")), {"a": 8, "a|b": 8, "b": 8}, "look like several in one: 'a|b'; one label a row is learned"),
    "labels with a decimal comma": ("x.csv", separated(";", with_labels("1,5", "2,5")), {"1,5": 8, "2,5": 8}, "numbers with a decimal comma: task.regression=true"),
    "labels in a unit": ("x.csv", separated(rows=with_labels("5%", "10 %")), {"10 %": 8, "5%": 8}, "classes that look like numbers in %: '5%', '10 %'; if they are: task.regression=true"),
    "labels in two units": ("x.csv", separated(rows=with_labels("$5", "5 €")), {"$5": 8, "5 €": 8}, "numbers in $, €: '$5', '5 €'; if they are: write them all in one unit, or without"),
    "labels with what has no width": ("x.csv", separated(rows=with_labels("bad", "bad\u200b", "good")), {"bad": 8, "bad\u200b": 8, "good": 8}, "differ in blanks or case only: 'bad', 'bad\\u200b'"),
    "blanks and case in labels": (
        "x.csv",
        separated(rows=with_labels(" bad", "Bad ", "bad", "good")),
        {" bad": 8, "Bad ": 8, "bad": 8, "good": 8},
        "differ in blanks or case only: ' bad', 'Bad ', 'bad'; task.fold_labels=true makes them one",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", READ)
def test_a_kind_of_file_is_read_and_what_was_done_is_said(tmp_path, kind):
    name, content, expected, note = READ[kind]
    task, rows, counts = load(tmp_path, name, content)
    assert counts == expected
    assert note in " · ".join(task.notes)
    assert all(text.strip() and text == text.strip() for part in rows.values() for text in part["text"][:])


QUOTED = [(f'she said ""{text}""', label) for text, label in PAIRS]
SETTLED = {
    "folded labels": ({"fold_labels": True}, {}, "x.csv", separated(rows=with_labels(" bad", "Bad ", "bad", "good")), {"bad": 24, "good": 8}),
    "folded into named ones": (
        {"fold_labels": True, "labels": ["Good", "Bad"]}, {}, "x.csv", separated(rows=with_labels(" bad", "GOOD")), {"Bad": 8, "Good": 8},
    ),
    "NA as a named class": ({"labels": ["NA", "yes"]}, {}, "x.csv", separated(rows=with_labels("NA", "yes")), {"NA": 8, "yes": 8}),
    "None as a word": ({}, {"missing": []}, "x.csv", separated(rows=with_labels("None", "yes")), {"None": 8, "yes": 8}),
    "missing words of one's own": ({}, {"missing": ["?"]}, "x.csv", separated(rows=with_labels("?", "no", "yes")), {"no": 8, "yes": 8}),
    "a number that stands for no label": ({}, {"missing": ["-1"]}, "x.jsonl", lines(with_labels(-1, 0, 1)), {"0": 8, "1": 8}),
    "the same as pandas writes it": ({}, {"missing": ["-1"]}, "x.csv", separated(rows=with_labels("-1.0", "0.0", "1.0")), {"0": 8, "1": 8}),
    "the same beside others that are missing": ({}, {"missing": ["-1"]}, "x.jsonl", lines(with_labels(-1.0, 0.0, 1.0, None)), {"0": 8, "1": 8}),
    "a separator that is said": ({}, {"separator": "~"}, "x.csv", separated("~"), EVEN),
    "a tab by its name": ({}, {"separator": "tab"}, "x.csv", separated("\t"), EVEN),
    "Windows' encoding": ({}, {"encoding": "cp1252"}, "x.csv", separated(rows=[(f"caf\xe9 {t}", la) for t, la in PAIRS]).encode("cp1252"), EVEN),
    "quotes escaped by a backslash": ({}, {}, "x.csv", separated(rows=[(f'"so \\"{t}\\", yes"', la) for t, la in PAIRS]), EVEN),
    "quotes that stay": ({}, {"quotes": False}, "x.csv", separated(rows=[(f'"{t}', la) for t, la in PAIRS]), EVEN),
    "named classes written as numbers": ({"labels": ["0", "1"]}, {}, "x.csv", separated(rows=with_labels("1.0", "0.0")), {"0": 8, "1": 8}),
}  # fmt: skip


@pytest.mark.parametrize("kind", SETTLED)
def test_a_key_settles_what_a_file_leaves_open(tmp_path, kind):
    settings, data, name, content, expected = SETTLED[kind]
    assert load(tmp_path, name, content, settings, data)[2] == expected


@pytest.mark.parametrize(
    ("name", "content", "first"),
    [
        ("x.tsv", separated("\t", [(f'"{text}"', label) for text, label in QUOTED]), 'she said "the film was dull 0"'),
        ("x.csv", separated(",", [(f'"{text}"', label) for text, label in QUOTED]), 'she said "the film was dull 0"'),
        ("x.csv", separated(";", [(f'"{text}"', label) for text, label in QUOTED]), 'she said "the film was dull 0"'),
        (
            "x.tsv",
            separated("\t", [(f'"{t}\nand more"', label) for t, label in PAIRS]),
            "the film was dull 0\nand more",
        ),
        ("x.tsv", separated("\t", [(f'"{text}', label) for text, label in PAIRS]), '"the film was dull 0'),
        ("x.tsv", separated("\t", [(f'"Oh," {text}', label) for text, label in PAIRS]), '"Oh," the film was dull 0'),
        ("x.csv", separated(",", [(f'so "{text}"', label) for text, label in PAIRS]), 'so "the film was dull 0"'),
    ],
)
def test_quotes_around_a_cell_are_undone_and_others_stay(tmp_path, name, content, first):
    _, rows, counts = load(tmp_path, name, content)
    assert first in [text for part in rows.values() for text in part["text"][:]]
    assert counts == EVEN


CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
SAID = [{"question": f"What is {i}?", "answers": ["a", "b"]} for i in range(12)]
GUESSED = {
    "messages as Python prints them": ("x.csv", separated(rows=[(f'"{CHAT}"',)] * 12, header=("messages",)), "conversations (messages)"),
    "messages as JSON in a cell": ("x.csv", separated(rows=[('"' + json.dumps(CHAT).replace('"', '""') + '"',)] * 12, header=("messages",)), "conversations (messages)"),
    "other columns of messages": ("x.jsonl", json.dumps({"id": 1, "items": CHAT}) + "\n", "conversations (items)"),
    "MBPP's columns": ("x.jsonl", json.dumps({"text": "Write f", "code": "f", "test_list": ["assert f"]}) + "\n", "programs with their tests"),
    "HumanEval's columns": ("x.jsonl", json.dumps({"prompt": "def f", "canonical_solution": "f", "test": "t", "entry_point": "f"}) + "\n", "programs with their tests"),
    "whole numbers of both types": ("x.jsonl", lines(with_labels(0, 1.0, 1, 0.0)), "a text (text) and one of 2 classes (label)"),
    "columns in another writing": ("x.tsv", separated("\t", header=("文本", "标签")), "a text (文本) and one of 2 classes (标签)"),
    "a pair of texts by their numbers": ("x.tsv", separated("\t", [(i % 2, t, f"so {t}") for i, (t, _) in enumerate(PAIRS)], ("Quality", "#1 String", "#2 String")), "a pair of texts (#1 String and #2 String) and one of 2 classes (Quality)"),
    "a pair of texts by their letters": ("x.csv", separated(rows=[(t, f"so {t}", la) for t, la in PAIRS], header=("sentenceA", "sentenceB", "label")), "a pair of texts (sentenceA and sentenceB) and one of 2 classes (label)"),
    "votes of two people beside a text": ("x.csv", separated(rows=[(t, la, la, la) for t, la in PAIRS], header=("text", "vote1", "vote2", "label")), "a text (text) and one of 2 classes (label)"),
    "two addresses beside a text": ("x.csv", separated(rows=[(t, f"{t} street", f"{t} town", la) for t, la in PAIRS], header=("review", "address1", "address2", "label")), "a text (review) and one of 2 classes (label)"),
    "two teams beside a text": ("x.csv", separated(rows=[(f"Real {i}", f"Ajax {i}", t, la) for i, (t, la) in enumerate(PAIRS)], header=("teamA", "teamB", "Bericht", "label")), "a text (Bericht) and one of 2 classes (label)"),
    "two players beside a text": ("x.csv", separated(rows=[(f"Jo Smith{i}", f"Al {i}", t, la) for i, (t, la) in enumerate(PAIRS)], header=("player1", "player2", "Bericht", "label")), "a text (Bericht) and one of 2 classes (label)"),
    "a pair of texts and where they are from": ("x.csv", separated(rows=[(t, f"so {t}", f"book {i}", la) for i, (t, la) in enumerate(PAIRS)], header=("satz1", "satz2", "quelle", "label")), "a pair of texts (satz1 and satz2) and one of 2 classes (label)"),
    "shares in percent": ("x.csv", separated(rows=[(t, f"{i}%") for i, (t, _) in enumerate(PAIRS)], ), "a text (text) and a number (label)"),
    "prices that are called as such": ("x.csv", separated(rows=[(t, f"$ {i * 7}.5") for i, (t, _) in enumerate(PAIRS)], header=("text", "price")), "a text (text) and a number (price)"),
    "ratings that count up": ("x.csv", separated(rows=[(t, i) for i, (t, _) in enumerate(PAIRS * 4)], header=("text", "rating")), "a text (text) and a number (rating)"),
    "columns by row numbers, fewer than there are columns": ("x.json", json.dumps({name: {str(i): f"{name} {i}" for i in range(2)} for name in ("kommentar", "rohfassung", "quelle", "text")}), "plain text (text)"),
    "Gemini's messages": ("x.jsonl", json.dumps({"contents": [{"role": "user", "parts": [{"text": "Hi"}]}]}) + "\n", "conversations (contents)"),
    "messages of other keys": ("x.jsonl", json.dumps({"messages": [{"author": "user", "text": "Hi"}]}) + "\n", "conversations (messages)"),
    "columns in German by columns": ("x.json", json.dumps({"Rezension": {f"r{i}": t for i, (t, _) in enumerate(PAIRS)}, "Bewertung": {f"r{i}": la for i, (_, la) in enumerate(PAIRS)}}), "a text (Rezension) and one of 2 classes (Bewertung)"),
    "a text and an index": ("x.csv", separated(rows=[(i, t) for i, (t, _) in enumerate(PAIRS)], header=("", "text")), "plain text (text)"),
    "columns in German": ("x.csv", separated(header=("Rezension", "Bewertung")), "a text (Rezension) and one of 2 classes (Bewertung)"),
    "a text and nothing else": ("x.jsonl", "".join(json.dumps({"text": t}) + "\n" for t, _ in PAIRS), "plain text (text)"),
}  # fmt: skip
GUESSED["a title above the text"] = ("x.csv", separated(rows=[(f"Film {i}", t, la) for i, (t, la) in enumerate(PAIRS)], header=("Title", "Plot", "Genre")), "a text (Plot) and one of 2 classes (Genre)")  # fmt: skip
NOT_GUESSED = {
    "a question, its choices and the letter of the right one": ("x.jsonl", "".join(json.dumps({"question_stem": t, "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "AB"[i % 2]}) + "\n" for i, (t, _) in enumerate(PAIRS)), "'choices' look like choices, and 'answerKey' like the right one: to learn it, task.name=instruct 'task.columns={question: question_stem, answer: answerKey}'"),
    "ends of a text and the place of the right one": ("x.jsonl", "".join(json.dumps({"ctx": t, "endings": ["x", "y"], "label": str(i % 2)}) + "\n" for i, (t, _) in enumerate(PAIRS)), "task.name=instruct 'task.columns={question: ctx, choices: endings, answer: label}'"),
    "choices in columns of their own": ("x.csv", separated(rows=[(t, "x", "y", i % 2) for i, (t, _) in enumerate(PAIRS)], header=("sentence", "option1", "option2", "answer")), "put them into one column of lists, choices, beside 'sentence' and answer"),
    "a question, wrong answers, and the right one": ("x.csv", separated(rows=[(t, f"x {i}", f"y {i}") for i, (t, _) in enumerate(PAIRS)], header=("question", "distractor1", "correct_answer")), "'correct_answer' beside 'question': if one of them is to be learned from it, say 'task.prompt=question' 'task.answer=correct_answer'"),
    "a title and a text of another name": ("x.csv", separated(rows=[(f"Film {i}", t) for i, (t, _) in enumerate(PAIRS)], header=("title", "plot")), "'plot' beside 'title': if one of them"),
    "answers to prefer one of": ("x.jsonl", json.dumps({"prompt": "Hi", "chosen": "Yo", "rejected": "No"}) + "\n", "task.name=instruct task.prompt=prompt task.answer=chosen"),
    "conversations to prefer one of": ("x.jsonl", json.dumps({"chosen": CHAT, "rejected": CHAT}) + "\n", "task.name=instruct 'task.columns={messages: chosen}'"),
    "answers that are not there": ("x.jsonl", "".join(json.dumps({"instruction": t, "output": ""}) + "\n" for t, _ in PAIRS), "'output' beside 'instruction' is called like what is to be learned"),
    "texts to prefer one of": ("x.jsonl", json.dumps({"chosen": "Human: Hi", "rejected": "No"}) + "\n", "task.name=text task.text=chosen"),
    "OpenAI's answers to prefer one of": ("x.jsonl", json.dumps({"input": {"messages": CHAT[:1]}, "preferred_output": CHAT[1:], "non_preferred_output": CHAT[1:]}) + "\n", "in one column messages"),
    "several labels a row": ("x.jsonl", lines([(t, [la]) for t, la in PAIRS]), "column 'label' holds lists, and one label a row is learned"),
    "several labels in a cell": ("x.csv", separated(rows=[(t, f"\"['{la}']\"") for t, la in PAIRS]), "column 'label' holds lists"),
    "two texts of unlike names": ("x.csv", separated(rows=[(t, f"so {t}", la) for t, la in PAIRS], header=("claim", "evidence", "label")), "'claim', 'evidence' could each be the text; say which: 'task.text=evidence', or both: 'task.text=claim' 'task.text_pair=evidence'"),
    "source, target and their class": ("x.csv", separated(rows=[(t, f"so {t}", la) for t, la in PAIRS], header=("source", "target", "label")), "'source', 'target' could each be the text"),
    "numbers with a decimal comma": ("x.csv", separated(";", with_labels("1,5", "2,5")), "column 'label' holds '1,5': if these are numbers with a decimal comma, say task.label=label task.regression=true"),
    "numbers in a unit, with a decimal comma": ("x.csv", separated(";", with_labels("1,5 €", "2,5 €")), "column 'label' holds '1,5 €': if these are numbers with a decimal comma"),
    "numbers in two units": ("x.csv", separated(rows=with_labels("$5", "5 €")), "column 'label' holds '$5', and not all in one unit ($, €): write numbers in one"),
    "numbers that have a unit here and there": ("x.csv", separated(rows=with_labels("5", "10%")), "and not all in one unit (%)"),
    "a pair of texts and a third": ("x.csv", separated(rows=[(t, f"so {t}", f"yes {t}", la) for t, la in PAIRS], header=("satz1", "satz2", "antwort", "label")), "'satz1', 'satz2', 'antwort' could each be the text"),
    "rows that are counted": ("x.csv", separated(rows=[(t, i + 7) for i, (t, _) in enumerate(PAIRS)], header=("text", "answer")), "'answer' beside 'text' is called like what is to be learned"),
    "hashes of texts": ("x.jsonl", "".join(json.dumps({"text": t, "_task_hash": 7 * i**2, "answer": "accept"}) + "\n" for i, (t, _) in enumerate(PAIRS)), "'answer' beside 'text' is called like"),
    "a title above the columns": ("x.csv", "My table,\n" + separated(), "column 2 has no name in the first line and is not read; name it, or say task.name=text"),
    "a preferred answer alone": ("x.jsonl", "".join(json.dumps({"prompt": t, "chosen": f"so {t}"}) + "\n" for t, _ in PAIRS), "'chosen' beside 'prompt' is called like what is to be learned"),
    "a mark between columns that is not known": ("x.csv", separated("^"), "names one column, 'text^label'; data.separator says"),
    "no header": ("x.csv", separated(header=("good film", "good")), "'good' is among the labels below it, too; if it does name them: 'task.text=good film' 'task.label=good'"),
    "tags of words": ("x.jsonl", "".join(json.dumps({"sentence": t, "tags": t.split()}) + "\n" for t, _ in PAIRS), "tags hold lists; say what is learned"),
    "labels that are objects": ("x.jsonl", lines([(t, {"name": la}) for t, la in PAIRS]), "column 'label' holds dicts"),
    "labels that are not there": ("x.jsonl", lines([(t, None) for t, _ in PAIRS]), "column 'label' has nothing in any row"),
    "lists of answers": ("x.jsonl", "".join(json.dumps(row) + "\n" for row in SAID), "answers hold lists; say what is learned"),
    "texts within": ("x.jsonl", (json.dumps({"data": {"text": "a"}, "meta": {"label": "b"}}) + "\n") * 2, "no column of text; its columns are data, meta"),
    "texts in pieces": ("x.jsonl", lines([(t.split(), la) for t, la in PAIRS]), "no column of text beside the label 'label'"),
}  # fmt: skip


@pytest.mark.parametrize("module", [cells, files, labels, names])
def test_the_examples_of_names_and_labels_hold(module):
    found = doctest.testmod(module)
    assert found.attempted and not found.failed


def guessed(tmp_path, name, content):
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return guess(read_file("data.train", file), name, {})


@pytest.mark.parametrize("kind", GUESSED)
def test_what_a_file_is_for_is_told_from_its_columns(tmp_path, kind):
    name, content, told = GUESSED[kind]
    assert guessed(tmp_path, name, content).told == told


@pytest.mark.parametrize("kind", NOT_GUESSED)
def test_another_job_is_never_taken_for_one_that_is_done_here(tmp_path, kind):
    name, content, words = NOT_GUESSED[kind]
    with pytest.raises(TrimtabError) as error:
        guessed(tmp_path, name, content)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_choices_of_other_names_are_learned_as_init_says(tmp_path):
    rows = [{"ctx": t, "endings": ["x", "y"], "label": str(i % 2)} for i, (t, _) in enumerate(PAIRS)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = get_task({"name": "instruct", "columns": {"question": "ctx", "choices": "endings", "answer": "label"}})
    turns = task.load_data({"train": str(tmp_path / "t.jsonl")})["train"]["messages"]
    assert [m["content"] for m in turns[1]] == [f"{rows[1]['ctx']}\n\nA. x\nB. y", "B"]


@pytest.mark.parametrize(("name", "good", "bad"), [("label", True, False), ("label", 1, 0), ("is_correct", "1", "0")])
def test_answers_that_are_marked_as_bad_are_not_learned(tmp_path, name, good, bad):
    rows = [{"prompt": "Hi", "completion": "Yo", name: (good, bad)[i % 2]} for i in range(8)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(
        TrimtabError, match=rf"column '{name}' says which answers are good.*keep the rows where it is true"
    ):
        get_task({"name": "instruct"}).load_data({"train": str(tmp_path / "t.jsonl")})


def test_the_place_of_the_right_choice_is_no_mark_of_a_good_answer(tmp_path):
    rows = [{"question": "1 + 1?", "choices": ["2", "3"], "answer": "2", "correct": i % 2} for i in range(4)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = get_task({"name": "instruct"}).load_data({"train": str(tmp_path / "t.jsonl")})
    assert sum(map(len, found.values())) == 4


REFUSED = {
    "no text at all": ("x.csv", separated(rows=[(" ", la) for _, la in PAIRS]), {}, ["no row has a text in column 'text'"]),
    "one class, the other missing": ("x.csv", separated(rows=with_labels("NA", "ok")), {}, ["every row has label 'ok'", "('NA' 8; task.labels"]),
    "no header": ("x.csv", separated(header=PAIRS[0]), {}, ["no column 'text'", "the first line of a file must name its columns"]),
    "a workbook by another name": ("x.csv", zipped("xl/workbook.xml", "<x/>"), {}, ["an Excel workbook; save it as CSV"]),
    "no label at all": ("x.csv", separated(rows=[(t, "NA") for t, _ in PAIRS]), {}, ["no row has a label"]),
    "another encoding": ("x.csv", separated(rows=[("caf\xe9", "a")]).encode("latin-1"), {}, ["line 2 is not UTF-8", "data.encoding=cp1252", "caf\xe9,a"]),
    "a wrong encoding": ("x.csv", separated(rows=[("caf\xe9", "a")]).encode("latin-1"), {"encoding": "ascii"}, ["line 2 is not ascii", "data.encoding"]),
    "an encoding that is none": ("x.csv", separated(), {"encoding": "utf-9"}, ["data.encoding='utf-9'"]),
    "a separator that is too long": ("x.csv", separated(), {"separator": "::"}, ["data.separator='::'", "semicolon"]),
    "two lists": ("x.json", json.dumps({"a": objects(), "b": objects()}), {}, ["2 lists of objects (a, b)", "expected is"]),
    "an object without rows": ("x.json", json.dumps({"a": {"b": 1}, "c": {"d": []}}, indent=1), {}, ["expected is a list of objects"]),
    "a list cut short": ("x.json", json.dumps(objects(), indent=1)[:-30], {}, ["not valid JSON", "line"]),
    "a broken line": ("x.jsonl", lines() + '{"text": \n', {}, ["line 21 is not valid JSON"]),
    "a broken object": ("x.json", '{\n "text": "a",\n "label" 1\n}', {}, ["not valid JSON", "line 3"]),
    "gzip cut short": ("x.csv.gz", gzip.compress(separated().encode())[:-12], {}, ["packed as gzip"]),
    "zstd cut short": ("x.csv.zst", zstd(separated())[:-4], {}, ["packed as zstd"]),
    "lists of labels as pandas writes them": ("x.csv", separated(rows=with_labels("\"['a', 'b']\"", "\"['a']\"")), {}, ["a list written as text, and one label a row is learned"]),
    "a row of each of two classes": ("x.csv", separated(rows=PAIRS[:2]), {}, ["one class is left to learn from", "data.validation"]),
    "numbers with commas": ("x.csv", separated(";", [(t, f"{i},000") for i, (t, _) in enumerate(PAIRS)]), {}, ["task.regression=true for numbers, written without commas (1000, 1.5)"]),
    "a zip of two": ("x.zip", zipped("a.md", "b"), {}, ["must hold one file of rows", "a.md"]),
    "gzip with a wrong middle": ("x.csv.gz", gzip.compress(separated().encode())[:10] + b"\xff" * 60, {}, ["packed as gzip, and damaged"]),
    "zip with a password": ("x.zip", zipped("x.csv", separated()).replace(b"\x00\x00\x00\x00", b"\x01\x00\x00\x00", 1).replace(b"PK\x01\x02\x14\x03\x14\x00\x00", b"PK\x01\x02\x14\x03\x14\x00\x01"), {}, ["cannot be unpacked here", "password"]),
    "a lone carriage return": ("x.csv", separated(rows=[(f"{t}\rmore", la) for t, la in PAIRS]), {}, ["not valid CSV: a carriage return stands alone", "data.quotes=false"]),
    "a pointer of Git LFS": ("x.parquet", "version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n", {}, ["Git LFS pointer", "git lfs pull"]),
    "a web page": ("x.csv", "<!DOCTYPE html><html><body>Log in</body></html>", {}, ["is a web page, not rows"]),
    "a web page called jsonl": ("x.jsonl", "\n<html><head></head></html>", {}, ["is a web page, not rows"]),
    "a title above the header": ("x.csv", "Reviews of 2024\n" + separated(), {}, ["the first line has 1, which must name the columns"]),
    "a header alone": ("x.csv", separated(rows=[]), {}, ["holds no rows below the first line"]),
    "no list": ("x.json", "null", {}, ["holds a NoneType; expected is a list of objects"]),
    "Python's quotes": ("x.json", str(objects()), {}, ["not valid JSON"]),
    "zip of two files": ("x.zip", zipped("a.csv", separated(), **{"b.csv": separated()}), {}, ["must hold one file of rows", "a.csv, b.csv"]),
    "Parquet cut short": ("x.parquet", arrow("parquet")[:-20], {}, ["not a Parquet file"]),
    "Parquet without rows": ("x.parquet", arrow("parquet", rows=0), {}, ["holds no rows"]),
    "a name for two columns": ("x.csv", separated(header=("text", "text")), {}, ["column 'text' appears twice"]),
    "a number of its own in each row": ("x.csv", separated(";", [(t, f"{i},5") for i, (t, _) in enumerate(PAIRS)]), {}, ["column 'label' has 20 different values in 20 rows", "task.regression=true"]),
    "an archive of archives": ("x.tar.gz", b"x", {}, ["cannot tell its format"]),
    "a workbook": ("x.xlsx", b"PK", {}, ["cannot tell its format"]),
    "an empty file": ("x.csv", "", {}, ["holds no rows"]),
    "an unclosed quote": ("x.csv", 'text,label\n"a,b\n', {}, ["not valid CSV", "data.quotes=false"]),
    "another word than missing's": ("x.csv", separated(), {"missing": 3}, ["data.missing=3"]),
    "a share of all": ("x.csv", separated(), {"validation_share": 1.5}, ["data.validation_share=1.5"]),
    "all rows": ("x.csv", separated(), {"validation_share": 20}, ["data.validation_share=20", "leaves none"]),
    "to be stratified by what is not there": ("x.csv", separated(), {"stratify": "site"}, ["no column 'site'"]),
    "an address": ("x.csv", separated(), {"hub": 3}, ["data.hub=3"]),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_read_is_refused_in_one_line(tmp_path, kind):
    name, content, data, words = REFUSED[kind]
    with pytest.raises(TrimtabError) as error:
        load(tmp_path, name, content, data=data)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_numbers_may_have_a_decimal_comma(tmp_path):
    rows = [(text, f"{i},5" if i else "7") for i, (text, _) in enumerate(PAIRS)]
    parts = load(tmp_path, "x.csv", separated(";", rows), {"regression": True})[1]
    assert {n for part in parts.values() for n in part["label"][:]} == {7.0, *(i + 0.5 for i in range(1, 20))}
    with pytest.raises(TrimtabError, match="row 1 has label '1,000', not a finite number"):  # or a thousand
        load(tmp_path, "x.csv", separated(";", with_labels("1,000", "2,000")), {"regression": True})


def test_numbers_may_have_a_unit_and_all_splits_the_same(tmp_path):
    rows = [(text, f"{i} %") for i, (text, _) in enumerate(PAIRS)]
    task, parts, _ = load(tmp_path, "x.csv", separated(rows=rows), {"regression": True})
    assert {n for part in parts.values() for n in part["label"][:]} == set(range(20))
    assert "train: labels are numbers in %, which is left off" in task.notes
    for others, unit in (([("a", 0.5), ("b", 0.2)], "no unit"), ([("a", "$5"), ("b", "$2")], "\\$")):
        with pytest.raises(TrimtabError, match=rf"labels in {unit}, and in % in the training rows; write them alike"):
            files = {"v__csv": separated(rows=others)}
            load(tmp_path, "x.csv", separated(rows=rows), {"regression": True}, {"validation": "v.csv"}, **files)


def test_a_label_of_minus_one_in_a_test_file_is_told_how_to_be_left_out(tmp_path):
    others = {"v__csv": separated(rows=[("a", -1), ("b", -1)])}
    rows = separated(rows=with_labels(0, 1))
    with pytest.raises(TrimtabError, match=r"no training row has. If it stands for no label: data\.missing=\['-1'\]"):
        load(tmp_path, "x.csv", rows, data={"test": str(tmp_path / "v.csv")}, **others)
    files = {"train": str(tmp_path / "x.csv"), "test": str(tmp_path / "v.csv")}
    parts = get_task({"name": "text_classification"}).load_data({**files, "missing": ["-1"]})
    assert len(parts["test"]) == 2 and "label" not in parts["test"].column_names


def test_validation_may_write_the_same_class_otherwise(tmp_path):
    for train, validation in (("1.0", "1"), ("1", "1.0"), ("true", "1"), ("1", "True")):
        other = {"1": "0", "1.0": "0.0", "true": "false", "True": "False"}
        _, _, counts = load(
            tmp_path,
            "x.csv",
            separated(rows=with_labels(train, other[train])),
            data={"validation": "v.csv"},
            v__csv=separated(rows=with_labels(validation, other[validation])),
        )
        assert sorted(counts.values()) == [16, 16]


def test_a_class_of_validation_in_other_letters_is_named_with_the_key(tmp_path):
    with pytest.raises(
        TrimtabError, match=r"'good' differs in blanks or case only: task\.fold_labels=true makes them one"
    ):
        load(tmp_path, "x.csv", separated(), data={"validation": "v.csv"}, v__csv=separated(rows=[("a", "Good")]))


def test_sorted_files_give_every_class_its_share_under_max_samples(tmp_path):
    rows = [(f"film {i}", "bad" if i < 90 else "good") for i in range(120)]
    counts = load(tmp_path, "x.csv", separated(rows=rows), data={"max_samples": 40})[1]["train"]["label"][:]
    assert Counter(counts) == {0: 30, 1: 10}
    first = load(tmp_path, "x.csv", separated(rows=rows), data={"max_samples": 40, "sample_seed": "first"})[1]
    assert Counter(first["train"]["label"][:]) == {0: 40}


def test_what_is_split_off_holds_every_class_and_what_is_too_rare_is_named(tmp_path):
    rows = [(f"film {i}", "common" if i < 95 else "rare" if i < 99 else "lone") for i in range(100)]
    task, parts, _ = load(tmp_path, "x.csv", separated(rows=rows))
    names = task.label_names
    assert {names[i] for i in parts["validation"]["label"][:]} == {"common", "rare"}
    assert len(parts["validation"]) == 10
    assert any("too rare to be split" in note and "'lone'" in note for note in task.notes)
    half = load(tmp_path, "x.csv", separated(rows=rows), data={"validation_share": 0.5})[1]
    assert Counter(names[i] for i in half["validation"]["label"][:]) == {"common": 48, "rare": 2}


def test_a_handful_of_rows_still_gives_a_row_to_score(tmp_path):
    for n in (3, 5):
        _, parts, _ = load(tmp_path, "x.csv", separated(rows=[(f"film {i}", f"class {i}") for i in range(n)]))
        assert len(parts["validation"]) == 1 and len(parts["train"]) == n - 1


def test_a_split_can_be_stratified_by_another_column(tmp_path):
    rows = [(text, label, "a" if i < 18 else "b") for i, (text, label) in enumerate(PAIRS)]
    content = separated(rows=rows, header=("text", "label", "site"))
    _, parts, _ = load(tmp_path, "x.csv", content, data={"stratify": "site", "validation_share": 4})
    assert Counter(parts["validation"]["site"][:]) == {"a": 3, "b": 1}


def test_a_split_of_chats_has_the_share_and_the_strata_that_are_asked_for(tmp_path):
    rows = [{"prompt": f"q {i}", "completion": "a", "site": "x" if i < 15 else "y"} for i in range(20)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = get_task({"name": "instruct"})
    parts = task.load_data({"train": str(tmp_path / "t.jsonl"), "validation_share": 0.2, "stratify": "site"})
    held = [int(turns[0]["content"][2:]) for turns in parts["validation"]["messages"]]
    assert len(held) == 4 and sum(i < 15 for i in held) == 3 and parts["train"].column_names == ["messages"]
    for data, words in (
        ({"stratify": True}, "data.stratify=True"),
        (
            {"validation_share": 0.5, "validation": str(tmp_path / "t.jsonl")},
            "data.validation_share=0.5: nothing is split",
        ),
    ):
        with pytest.raises(TrimtabError, match=words):
            task.load_data({"train": str(tmp_path / "t.jsonl"), **data})


def test_a_column_that_one_file_lacks_does_no_harm_unless_it_is_asked_for(tmp_path):
    (tmp_path / "1.csv").write_text(separated())
    (tmp_path / "2.csv").write_text(separated(rows=[(*p, "x") for p in PAIRS], header=("text", "label", "note")))
    task = get_task({"name": "text_classification"})
    rows = task.load_data({"train": [str(tmp_path / "1.csv"), str(tmp_path / "2.csv")]})
    assert len(rows["train"]) == 36
    asking = get_task({"name": "text_classification", "label": "note"})
    with pytest.raises(TrimtabError, match=r"no column 'note' in 1\.csv"):
        asking.load_data({"train": [str(tmp_path / "1.csv"), str(tmp_path / "2.csv")]})


def test_folders_and_patterns_stand_for_their_files(tmp_path):
    folder = tmp_path / "rows"
    folder.mkdir()
    for name in ("a.csv", "b.csv"):
        (folder / name).write_text(separated())
    (folder / "README.md").write_text("no rows")
    task = get_task({"name": "text_classification"})
    for place in (str(folder), str(folder / "*.csv"), [str(folder / "a.csv"), str(folder / "b.csv")]):
        assert len(task.load_data({"train": place, "validation": str(folder / "a.csv")})["train"]) == 40
    (folder / "train-00000-of-00001.csv").write_text(separated())
    (folder / "test-00000-of-00001.csv").write_text(separated())
    rows = task.load_data({"train": str(folder), "test": str(folder), "validation": str(folder / "a.csv")})
    assert len(rows["train"]) == len(rows["test"]) == 20


@pytest.mark.parametrize(
    "ours, theirs",
    [
        ("train/a.csv", "test/a.csv"),
        ("my_train.csv", "my_test.csv"),
        ("train/pos/1.csv", "val/pos/1.csv"),
        ("trainset.csv", "testset.csv"),
        ("traindata.csv", "eval.csv"),
    ],
)
def test_rows_of_a_folder_that_are_for_scoring_are_not_trained_on(tmp_path, ours, theirs):
    for name, rows in ((ours, PAIRS), (theirs, with_labels("good", "bad"))):
        (tmp_path / "rows" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "rows" / name).write_text(separated(rows=rows))
    (tmp_path / "rows" / "README.txt").write_text("what the rows are")
    (tmp_path / "rows" / "dataset_infos.json").write_text("{}")
    task, split = get_task({"name": "text_classification"}), "test" if "test" in theirs else "validation"
    rows = task.load_data({"train": str(tmp_path / "rows"), split: str(tmp_path / "rows")})
    assert sum(len(part) for name, part in rows.items() if name != split) == 20 and len(rows[split]) == 16
    assert not any("read from" in note for note in task.notes)


def test_a_cell_may_be_as_long_as_a_book(tmp_path):
    before = csv.field_size_limit(131072)  # Python's own, which another test's file may have raised
    try:
        _, _, counts = load(tmp_path, "x.csv", separated(rows=[*PAIRS, ("long" * 40000, "bad")]))
    finally:
        csv.field_size_limit(before)
    assert counts == {"bad": 11, "good": 10}


def test_several_files_of_a_split_are_named(tmp_path):
    for name in ("a/1.csv", "b/2.csv"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(separated())
    task = get_task({"name": "text_classification"})
    task.load_data({"train": str(tmp_path)})
    assert "train: read from 2 files: a/1.csv, b/2.csv" in task.notes


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("x.jsonl", {"id": 1, "meta": [{"text": "another"}]}),
        ("x.json", {"text": "the cat", "meta": [{"text": "another"}]}),
        ("x.json", {"messages": [{"role": "user", "content": "Hi"}], "tools": [{"name": "add"}]}),
    ],
)
def test_a_list_within_the_only_row_is_not_taken_for_the_rows(tmp_path, name, row):
    (tmp_path / name).write_text(json.dumps(row))
    assert read_file("data.train", tmp_path / name) == {key: [value] for key, value in row.items()}


def test_saved_datasets_and_the_hubs_own_are_read_with_the_names_of_their_classes(tmp_path):
    from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

    features = Features({"text": Value("string"), "label": ClassLabel(names=["bad", "good"])})
    part = Dataset.from_dict({"text": [t for t, _ in PAIRS], "label": [int(la == "good") for _, la in PAIRS]}, features)
    whole = DatasetDict({"train": part, "validation": part, "test": part.select(range(4))})
    whole.save_to_disk(tmp_path / "saved")
    part.save_to_disk(tmp_path / "one")
    part.to_parquet(tmp_path / "x.parquet")
    folder = tmp_path / "data"
    folder.mkdir()
    part.to_parquet(folder / "train.parquet")
    part.select(range(4)).to_parquet(folder / "test.parquet")
    for data, sizes in (
        ({"hub": str(tmp_path / "saved")}, {"train": 20, "validation": 20, "test": 4}),
        ({"hub": str(tmp_path / "saved"), "split": {"train": "train", "validation": "test"}}, {"train": 20, "validation": 4}),
        ({"train": str(tmp_path / "saved"), "validation": str(tmp_path / "one")}, {"train": 20, "validation": 20}),
        ({"train": str(tmp_path / "x.parquet")}, {"train": 18, "validation": 2}),
        ({"hub": str(folder)}, {"train": 18, "test": 4, "validation": 2}),
        ({"hub": str(folder), "split": "train[:10]"}, {"train": 8, "validation": 2}),
    ):  # fmt: skip
        task = get_task({"name": "text_classification"})
        rows = task.load_data(data)
        assert {name: len(part) for name, part in rows.items()} == sizes
        assert task.label_names == ["bad", "good"]


def test_rows_that_are_trained_on_and_scored_are_counted(tmp_path):
    task, _, _ = load(tmp_path, "x.csv", separated(), data={"validation": "v.csv"}, v__csv=separated(rows=PAIRS[:3]))
    assert "validation: 3 of 3 rows are among the training rows, too" in task.notes


def test_labels_that_are_named_are_classes_whatever_they_look_like():
    for values in (["5%", "5"], ["1,2", "3"]):
        rows = Table({"text": [f"the {i}th text" for i in range(12)], "label": values * 6})
        found = guess(rows, "x.csv", {"labels": values})
        assert found.task == "text_classification" and "regression" not in found.settings
