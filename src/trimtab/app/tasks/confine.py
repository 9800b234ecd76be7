"""The child's side of the sandbox: confine this very process, then run a program in it.

`sandbox.py` starts a fresh Python with this file's text as its ``-c`` argument, so nothing here may import
Trimtab, and importing it does nothing. Each layer is tried by itself; those named in the job's ``require``
must hold, or the program is not run. Linux only, and without help from outside Python's library:

``namespaces``  own user, network and mount namespaces; the working folder becomes a small file system in memory.
``landlock``    nothing outside the working folder can be written, made or removed, nor another process inspected.
``seccomp``     no sockets, no new processes, no signals, no change of limits, owners or modes.

The order matters: mounting comes before Landlock, which forbids it, and the system call filter comes last.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import resource
import struct
import sys
import types
from typing import Any

_LIBC = ctypes.CDLL(None, use_errno=True)

# -- namespaces ----------------------------------------------------------------------------------------

_CLONE_NEWNS, _CLONE_NEWIPC, _CLONE_NEWUSER, _CLONE_NEWNET = 0x20000, 0x8000000, 0x10000000, 0x40000000
_MS_NOSUID_NODEV = 0x2 | 0x4
_MS_REC_PRIVATE = 0x4000 | 0x40000


def enter_namespaces(folder: str, total_bytes: int) -> None:
    """Own network (with no device up), and a file system of `total_bytes` in memory over `folder`."""
    uid, gid = os.geteuid(), os.getegid()
    _call("unshare", _CLONE_NEWUSER | _CLONE_NEWNET | _CLONE_NEWNS | _CLONE_NEWIPC)
    for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    _call("mount", None, b"/", None, _MS_REC_PRIVATE, None)
    options = f"size={total_bytes},nr_inodes=1024,mode=700".encode()
    _call("mount", b"tmpfs", folder.encode(), b"tmpfs", _MS_NOSUID_NODEV, options)


# -- Landlock ------------------------------------------------------------------------------------------

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # the same on every architecture
_WRITE_FILE, _TRUNCATE = 1 << 1, 1 << 14
# Removing and making of every kind (bits 4 to 12); bit 13 (moving across folders) is always denied.
_CHANGES = _WRITE_FILE | sum(1 << bit for bit in range(4, 13))


def restrict_writes(folder: str) -> None:
    """Landlock: what changes files is allowed beneath `folder` only. Reading stays as it is."""
    version = _syscall(_CREATE_RULESET, None, 0, 1)
    rights = _CHANGES | (_TRUNCATE if version >= 3 else 0)
    attributes = ctypes.create_string_buffer(struct.pack("Q", rights), 8)
    ruleset = _syscall(_CREATE_RULESET, attributes, 8, 0)
    for path, allowed in ((folder, rights), (os.devnull, _WRITE_FILE)):
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        _syscall(_ADD_RULE, ruleset, 1, ctypes.create_string_buffer(struct.pack("=Qi", allowed, place), 12), 0)
        os.close(place)
    _syscall(_RESTRICT_SELF, ruleset, 0)
    os.close(ruleset)


# -- seccomp -------------------------------------------------------------------------------------------

# name: (x86_64, aarch64); None where that architecture has no such call.
_DENIED: dict[str, tuple[int | None, int | None]] = {
    "socket": (41, 198),
    "connect": (42, 203),
    "bind": (49, 200),
    "listen": (50, 201),
    "fork": (57, None),
    "vfork": (58, None),
    "execve": (59, 221),
    "execveat": (322, 281),
    "kill": (62, 129),
    "tkill": (200, 130),
    "tgkill": (234, 131),
    "pidfd_send_signal": (424, 424),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "pidfd_open": (434, 434),
    "pidfd_getfd": (438, 438),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "setrlimit": (160, 164),
    "prlimit64": (302, 261),
    "setpriority": (141, 140),
    "sched_setaffinity": (203, 122),
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "chroot": (161, 51),
    "pivot_root": (155, 41),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "mount_setattr": (442, 442),
    "open_by_handle_at": (304, 265),
    "mknod": (133, None),
    "mknodat": (259, 33),
    "chmod": (90, None),
    "fchmod": (91, 52),
    "fchmodat": (268, 53),
    "fchmodat2": (452, 452),
    "chown": (92, None),
    "fchown": (93, 55),
    "lchown": (94, None),
    "fchownat": (260, 54),
    "utime": (132, None),
    "utimes": (235, None),
    "futimesat": (261, None),
    "utimensat": (280, 88),
    "setxattr": (188, 5),
    "lsetxattr": (189, 6),
    "fsetxattr": (190, 7),
    "removexattr": (197, 14),
    "lremovexattr": (198, 15),
    "fremovexattr": (199, 16),
    "shmget": (29, 194),
    "semget": (64, 190),
    "msgget": (68, 186),
    "mq_open": (240, 180),
    "memfd_create": (319, 279),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "setuid": (105, 146),
    "setgid": (106, 144),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "kexec_load": (246, 104),
    "reboot": (169, 142),
    "swapon": (167, 224),
    "acct": (163, 89),
    "settimeofday": (164, 170),
    "sethostname": (170, 161),
}
_CLONE, _CLONE3 = (56, 220), 435
_CLONE_THREAD = 0x10000
_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column above, AUDIT_ARCH_…

_LOAD, _JUMP_EQUAL, _JUMP_GREATER_EQUAL, _JUMP_SET, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL, _EPERM, _ENOSYS = 0x7FFF0000, 0x80000000, 0x00050000 | 1, 0x00050000 | 38
_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT = 0, 4, 16  # offsets in the kernel's `seccomp_data`


def filter_of(machine: str) -> list[tuple[int, int, int, int]]:
    """The filter as (code, jump if true, jump if false, value): denied calls fail with EPERM.

    A clone that makes a thread passes, one that makes a process does not. `clone3` hides its flags behind a
    pointer, so it is said not to exist, and the C library then uses `clone`.
    """
    column, architecture = _ARCHITECTURES[machine]
    code = [
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_JUMP_EQUAL, 1, 0, architecture),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER),
        # x86_64: from this number on, the x32 copies of all calls.
        (_JUMP_GREATER_EQUAL, 0, 1, 0x40000000),
        (_RETURN, 0, 0, _EPERM),
        (_JUMP_EQUAL, 0, 1, _CLONE3),
        (_RETURN, 0, 0, _ENOSYS),
    ]
    for numbers in _DENIED.values():
        if numbers[column] is not None:
            code += [(_JUMP_EQUAL, 0, 1, numbers[column]), (_RETURN, 0, 0, _EPERM)]  # type: ignore[list-item]
    return [
        *code,
        (_JUMP_EQUAL, 0, 3, _CLONE[column]),
        (_LOAD, 0, 0, _FIRST_ARGUMENT),
        (_JUMP_SET, 1, 0, _CLONE_THREAD),
        (_RETURN, 0, 0, _EPERM),
        (_RETURN, 0, 0, _ALLOW),
    ]


def filter_calls() -> None:
    """Installs the filter; it can never be taken off again."""
    machine = platform.machine()
    if machine not in _ARCHITECTURES:
        raise OSError(f"no system call table for {machine}")
    code = filter_of(machine)
    table = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in code))
    program = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(code), ctypes.addressof(table)))
    _call("prctl", 22, 2, program, 0, 0)  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER


# -- rights and limits ---------------------------------------------------------------------------------


def drop_rights() -> None:
    """No privilege can be gained any more, and root's capabilities are gone."""
    _call("prctl", 38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    header = ctypes.create_string_buffer(struct.pack("Ii", 0x20080522, 0))
    _call("capset", header, ctypes.create_string_buffer(24))


def set_limits(limits: dict[str, int]) -> None:
    """Hard limits of the kernel, in the units of `sandbox.Limits`."""
    for name, value in (
        (resource.RLIMIT_CPU, limits["cpu_seconds"]),
        (resource.RLIMIT_AS, limits["memory_bytes"]),
        (resource.RLIMIT_FSIZE, limits["file_bytes"]),
        (resource.RLIMIT_NPROC, limits["processes"]),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
    ):
        _, hard = resource.getrlimit(name)
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        # The kernel signals at the soft CPU limit and kills at the hard one.
        resource.setrlimit(name, (value, value + 1 if name == resource.RLIMIT_CPU and value != hard else value))


# -- the job -------------------------------------------------------------------------------------------


def confine(job: dict[str, Any], folder: str) -> dict[str, str]:
    """Applies limits and the job's layers. Returns why each layer that is not there is missing ("" if it is)."""
    layers = {
        "namespaces": lambda: enter_namespaces(folder, job["limits"]["total_bytes"]),
        "landlock": lambda: restrict_writes(folder),
        "seccomp": filter_calls,
    }
    outcome = dict.fromkeys(layers, "not asked for")
    _attempt("namespaces", layers, outcome, job)
    os.chdir(folder)  # the mount hides the folder that we stood in
    set_limits(job["limits"])
    if sys.platform == "linux":
        drop_rights()
    _attempt("landlock", layers, outcome, job)
    _attempt("seccomp", layers, outcome, job)
    return outcome


def _attempt(name: str, layers: dict[str, Any], outcome: dict[str, str], job: dict[str, Any]) -> None:
    if name in job["layers"]:
        try:
            layers[name]()
            outcome[name] = ""
        except (OSError, AttributeError) as error:  # AttributeError: a C library without that function
            outcome[name] = str(error) or type(error).__name__


def run(program: str) -> str:
    """Runs the program to its end. Returns "" or what it raised."""
    module = types.ModuleType("program")  # not "__main__": as in HumanEval's harness, such blocks do not run
    sys.modules["program"] = module
    try:
        exec(compile(program, "<program>", "exec"), module.__dict__)
    except BaseException as error:  # SystemExit too: a program that leaves early has not passed
        text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        return text[:500]
    return ""


def main() -> None:
    """Reads a job from standard input, and answers on what was standard output at the start."""
    job = json.loads(sys.stdin.buffer.read())
    answers = os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    sys.path = [path for path in sys.path if path]
    outcome = confine(job, os.getcwd())
    _answer(answers, job["token"], {"layers": outcome})
    if all(outcome[name] == "" for name in job["require"]):
        _answer(answers, job["token"], {"error": run(job["program"])})
    os._exit(0)  # threads that the program left behind are not waited for


def _answer(descriptor: int, token: str, content: dict[str, Any]) -> None:
    os.write(descriptor, (token + json.dumps(content) + "\n").encode())


def _call(name: str, *arguments: Any) -> int:
    return _checked(name, getattr(_LIBC, name)(*arguments))


def _syscall(number: int, *arguments: Any) -> int:
    return _checked(f"system call {number}", _LIBC.syscall(ctypes.c_long(number), *arguments))


def _checked(name: str, result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
    return result


if __name__ == "__main__":
    main()
