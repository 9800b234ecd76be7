"""`get_task`: names, settings, and a user's own tasks."""

import doctest
import subprocess
import sys
from importlib.metadata import EntryPoint

import pytest

from trimtab.app import tasks
from trimtab.app.tasks import GLUE_NAMES, get_task, known_tasks
from trimtab.errors import ConfigError


def make_own(size=1):
    return ("own", size)


def test_every_builtin_task_can_be_made():
    for name in tasks.TASKS:
        task = get_task({"name": name})
        assert task.name == name
        assert task.metric


def test_the_examples_in_the_docstrings_hold():
    assert doctest.testmod(tasks).failed == 0


def test_glue_has_its_nine_tasks():
    from trimtab.app.tasks.glue import KINDS

    assert sorted(GLUE_NAMES) == sorted(KINDS)
    assert len(KINDS) == 9


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"name": "glue/colla"}, ["task.name='glue/colla'", "Did you mean 'glue/cola'?"]),
        ({"name": "text_clasification"}, ["Did you mean 'text_classification'?"]),
        ({}, ["task.name=None", "glue/mnli"]),
        ({"name": "glue/cola", "max_lenght": 3}, ["task.max_lenght=3", "Did you mean 'max_length'?"]),
        ({"name": "glue/cola", "max_length": 0}, ["task.max_length=0", "at least 2"]),
        ({"name": "glue/cola", "max_length": "64"}, ["task.max_length='64'", "whole number"]),
        ({"name": "glue/cola", "notes": []}, ["task.notes"]),
        ({"name": "text_classification", "metric": "accurcy"}, ["task.metric='accurcy'", "Did you mean 'accuracy'?"]),
        ({"name": "text_classification", "metric": "mse"}, ["There is accuracy"]),
        ({"name": "text_classification", "text": ""}, ["task.text=''", "name of a column"]),
        ({"name": "text_classification", "labels": ["a"]}, ["task.labels", "at least two"]),
        ({"name": "text_classification", "labels": ["a", "b", "a"]}, ["each name once"]),
        ({"name": "text_classification", "labels": ["a", "b"], "regression": True}, ["leave it out"]),
        ({"name": "text_classification", "regression": "no"}, ["task.regression='no'", "true or false"]),
        ({"name": "code", "allow_code_execution": "never"}, ["task.allow_code_execution='never'", "true or false"]),
        ({"name": "text_classification", "metric": ["accuracy"]}, ["task.metric=['accuracy']", "a text"]),
        ({"name": "math", "dataset": ["gsm8k"]}, ["task.dataset=['gsm8k']", "a text"]),
        ({"name": "text", "text": ["title", "body"]}, ["task.text=['title', 'body']", "the name of a column"]),
        ({"name": "math", "marks": 4}, ["task.marks=4", "a list of texts"]),
        ({"name": "no_such_module:make"}, ["cannot import 'no_such_module'"]),
        ({"name": "json:lods"}, ["no 'lods'", "Did you mean 'loads'?"]),
        ({"name": f"{__name__}:make_own", "sise": 2}, ["task.name", "sise"]),
    ],
)
def test_a_wrong_task_is_refused_in_one_line_that_names_the_cure(spec, words):
    with pytest.raises(ConfigError) as error:
        get_task(spec)
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_a_users_function_makes_a_task():
    assert get_task({"name": f"{__name__}:make_own", "size": 3}) == ("own", 3)


def test_an_installed_package_can_announce_a_task(monkeypatch):
    point = EntryPoint("theirs", f"{__name__}:make_own", "trimtab.tasks")
    monkeypatch.setattr("trimtab.registry.metadata.entry_points", lambda group: [point])
    assert known_tasks()["theirs"] == f"{__name__}:make_own"
    assert get_task({"name": "theirs"}) == ("own", 1)


def test_making_a_task_imports_neither_torch_nor_datasets():
    code = (
        "import sys; from trimtab.app.tasks import get_task; get_task({'name': 'glue/cola'}); "
        "print([m for m in ('torch', 'datasets', 'transformers', 'sklearn') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONPATH": ":".join(sys.path)}
    )
    assert done.stdout.strip() == "[]"
