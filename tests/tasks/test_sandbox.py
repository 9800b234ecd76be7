"""Generated programs: what they cannot do, and that good ones still pass."""

import json
import os
import re
import socket
import sys

import pytest

from tasks.stand_ins import data_pack
from trimtab.app.tasks import confine, sandbox
from trimtab.app.tasks.sandbox import Isolation, Limits, run_program, run_programs
from trimtab.errors import ConfigError

SHORT = Limits(cpu_seconds=1, wall_seconds=30)
isolated = pytest.mark.skipif(bool(sandbox.isolation().lacks), reason=f"no isolation: {sandbox.isolation().missing}")
each_layer = pytest.mark.parametrize(
    "layer",
    [
        pytest.param(name, marks=pytest.mark.skipif(name not in sandbox.isolation().layers, reason="not here"))
        for name in sandbox.LAYERS
    ],
)


def needs(*layers):
    lacking = set(layers) - set(sandbox.isolation().layers)
    return pytest.mark.skipif(bool(lacking), reason=f"not on this machine: {lacking}")


@isolated
@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("while True: pass", "CPU time over the limit"),
        ("x = 'a' * 10**10", "MemoryError"),
        ("open('big', 'wb').write(b'a' * 10**8)", "File too large"),
        ("for i in range(10**6): open(f'f{i}', 'wb').write(b'a' * 10**5)", "No space left"),
        ("import os\nwhile True: os.fork()", "Operation not permitted"),
        ("import subprocess; subprocess.run(['true'])", "Operation not permitted"),
        (
            "import threading, time\nfor i in range(500): threading.Thread(target=time.sleep, args=(60,)).start()",
            "can't start new thread",
        ),
        ("import os; os.kill(os.getppid(), 9)", "Operation not permitted"),
        ("import os; os.kill(-1, 9)", "Operation not permitted"),
        ("import resource; resource.setrlimit(resource.RLIMIT_CPU, (60, 60))", "not allowed"),
        ("import sys; sys.exit(0)", "SystemExit: 0"),
        ("import os; os._exit(0)", "left before its end, with exit code 0"),
        ("import ctypes; ctypes.string_at(0)", "stopped by SIGSEGV"),
        ("def f(): f()\nf()", "RecursionError"),
        ("def f(:", "SyntaxError"),
        ("assert 1 + 1 == 3, 'sums'", "AssertionError: sums"),
        ("input()", "EOFError"),
    ],
)
def test_a_program_that_misbehaves_is_stopped_and_has_failed(program, reason):
    verdict = run_program(program, SHORT)
    assert not verdict.passed
    assert reason in verdict.reason


@isolated
def test_a_program_that_sleeps_is_stopped():
    verdict = run_program("import time; time.sleep(60)", Limits(wall_seconds=0.5))
    assert verdict == sandbox.Verdict(False, "wall time over 0.5 s")


@isolated
@pytest.mark.parametrize(
    "program",
    [
        "",
        "print('x' * 10**6)",
        "with open('notes', 'w') as f: f.write('b')\nimport os\nos.rename('notes', 'more'); os.remove('more')",
        "import threading\nt = threading.Thread(target=print); t.start(); t.join()",
        "import asyncio, collections, dataclasses, heapq, itertools, math, random, re, sys, typing",
        "from dataclasses import dataclass\n@dataclass\nclass A:\n    x: 'int'\nassert A(1).x == 1",
        "if __name__ == '__main__': raise ValueError",
    ],
)
def test_an_honest_program_passes(program):
    assert run_program(program) == sandbox.Verdict(True)


@isolated
def test_a_program_finds_an_empty_folder_and_nothing_of_our_environment(monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    assert run_program("import os; assert os.listdir('.') == [], os.listdir('.')").passed
    assert run_program("import os; assert set(os.environ) <= {'PYTHONHASHSEED', 'LC_CTYPE'}, dict(os.environ)").passed
    assert run_program("import sys; assert 'trimtab' not in sys.modules and '' not in sys.path").passed
    verdict = run_program(f"open('/proc/{os.getpid()}/environ').read()")
    assert "Permission denied" in verdict.reason


@pytest.mark.parametrize(
    "layer", [pytest.param("namespaces", marks=needs("namespaces")), pytest.param("seccomp", marks=needs("seccomp"))]
)
def test_the_network_is_out_of_reach_by_either_layer_alone(layer):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        program = f"import socket; socket.create_connection(('127.0.0.1', {port}), timeout=5)"
        assert run_program(program, layers=(), force=True).passed  # it is there for whoever may reach it
        assert not run_program(program, layers=[layer]).passed


@needs("landlock")
def test_files_outside_the_folder_cannot_be_changed(tmp_path):
    kept = tmp_path / "kept"
    kept.write_text("kept")
    for program in (
        f"open({str(kept)!r}, 'w')",
        f"import os; os.remove({str(kept)!r})",
        f"import os; os.truncate({str(kept)!r}, 0)",
        f"import os; os.rename({str(kept)!r}, 'mine')",
        f"import os; os.mkdir({str(tmp_path / 'new')!r})",
        f"import shutil; shutil.rmtree({str(tmp_path)!r})",
    ):
        assert "Permission denied" in run_program(program, layers=["landlock"]).reason
    assert [file.name for file in tmp_path.iterdir()] == ["kept"]
    assert kept.read_text() == "kept"


@needs("landlock")
def test_many_small_files_are_stopped_where_no_file_system_of_ones_own_is_to_be_had():
    program = "import time\nfor i in range(10**6): open(f'f{i}', 'wb').write(b'a' * 10**5)"
    assert "files over" in run_program(program, layers=["landlock"]).reason


@each_layer
def test_a_layer_that_does_not_hold_stops_the_program_from_running(layer, monkeypatch):
    source = sandbox._confine_source()
    broken = source.replace("layers[name]()", 'raise OSError(1, "switched off")')
    assert broken != source
    monkeypatch.setattr(sandbox, "_confine_source", lambda: broken)
    verdict = run_program("pass", layers=[layer])
    assert not verdict.passed
    assert verdict.reason.startswith(f"not run: {layer}:")


def test_programs_are_refused_where_the_machine_offers_no_isolation(monkeypatch):
    monkeypatch.setattr(sandbox, "isolation", lambda: Isolation((), dict.fromkeys(sandbox.LAYERS, "no such call")))
    with pytest.raises(
        ConfigError,
        match=r"task\.allow_code_execution=True: this machine cannot guarantee no network, "
        r"no writing .* no other processes .*force_code_execution=true",
    ):
        run_program("pass")
    assert run_program("pass", force=True).passed
    assert "MemoryError" in run_program("x = 'a' * 10**10", force=True).reason  # the limits stay


def test_part_of_the_isolation_is_not_enough():
    assert Isolation(("namespaces", "landlock", "seccomp")).lacks == ()
    assert Isolation(("landlock", "seccomp")).lacks == ()
    assert Isolation(("namespaces", "seccomp")).lacks == ("no writing outside its folder",)
    assert Isolation(("namespaces", "landlock")).lacks == ("no other processes",)


HEADERS = ("/usr/include/x86_64-linux-gnu/asm/unistd_64.h", "/usr/include/asm-generic/unistd.h")  # aarch64: generic


@pytest.mark.parametrize("column", [0, 1])
def test_system_call_numbers_are_those_of_the_kernel(column):
    if not os.path.exists(HEADERS[column]):
        pytest.skip("no kernel headers here")
    with open(HEADERS[column], encoding="utf-8") as text:
        pairs = re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", text.read())
    kernel = {name: int(number) for name, number in pairs}
    calls = {**confine._DENIED, "clone": confine._CLONE, "clone3": (confine._CLONE3,) * 2}
    newer = {"fchmodat2"} - set(kernel)  # since Linux 6.6
    ours = {name: numbers[column] for name, numbers in calls.items() if name not in newer}
    assert ours == {name: kernel.get(name) for name in ours}


def humaneval_programs(n=None):
    rows = [json.loads(line) for line in (data_pack("humaneval") / "test.jsonl").read_text().split("\n") if line][:n]
    return [f"{r['prompt']}{r['canonical_solution']}\n{r['test']}\ncheck({r['entry_point']})\n" for r in rows]


def mbpp_programs():
    rows = [json.loads(line) for line in (data_pack("mbpp") / "test.jsonl").read_text().split("\n") if line]
    return ["\n".join([r["code"], r["test_setup_code"], *r["test_list"]]) for r in rows]


@isolated
def test_reference_solutions_of_humaneval_pass_and_wrong_ones_fail():
    programs = humaneval_programs(6)
    assert all(verdict.passed for verdict in run_programs(programs))
    wrong = [program.replace("return ", "return not ") for program in programs[:3]]
    assert not any(verdict.passed for verdict in run_programs(wrong))


@isolated
@pytest.mark.slow
@pytest.mark.parametrize(("programs", "n"), [(humaneval_programs, 164), (mbpp_programs, 500)])
def test_every_reference_solution_passes(programs, n):
    verdicts = list(run_programs(programs()))
    assert [verdict.passed for verdict in verdicts] == [True] * n


def test_the_childs_side_needs_nothing_but_python():
    assert "trimtab" not in sandbox._confine_source().replace("Trimtab", "")
    assert confine.__name__ in sys.modules
