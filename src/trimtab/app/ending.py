"""How a command ends: errors as one line each, and the exit code; what every command's options are.

Exit codes: 0 done, 1 failed, 2 bad input (one line on stderr, no traceback), 130 stopped by Ctrl-C, 143 by
SIGTERM.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
import tempfile
import textwrap
import time
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

import click

from ..errors import TrimtabError, did_you_mean, missing_extra
from .stopping import Stopped, listening

DEBUG = "TRIMTAB_DEBUG"
_FIRST_ONE_SECONDS = 5
_SIGNALLED = 128
_SMALLER = (
    "halve train.per_device_train_batch_size and double train.gradient_accumulation_steps, which is the same run, "
    "shorten task.max_length, or set train.gradient_checkpointing=true"
)


class Commands(click.Group):
    """A group whose errors are one line each."""

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args and self.get_command(ctx, args[0]) is None and not args[0].startswith("-"):
            known = self.list_commands(ctx)
            near = did_you_mean(args[0], known)
            raise click.UsageError(f"no command {args[0]!r}.{near} There is {', '.join(known)}.")
        return super().resolve_command(ctx, args)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)  # in the order of a run, as they are written

    def main(self, *args: Any, **extra: Any) -> Any:
        # PEFT imports it wherever it is installed, and it warns of kernels that only quantised models use.
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
        try:
            with listening():
                sys.exit(super().main(*args, **{**extra, "standalone_mode": False}) or 0)
        except Stopped as stopped:
            fail(str(stopped), code=stopped.code)
        except (click.Abort, KeyboardInterrupt):
            fail("stopped", code=130)
        except click.exceptions.NoArgsIsHelpError as error:  # bare `trimtab` asks for help
            click.echo(error.ctx.get_help() if error.ctx else "")
            sys.exit(0)
        except click.ClickException as error:
            where = f" (see `{error.ctx.command_path} --help`)" if getattr(error, "ctx", None) else ""  # type: ignore[attr-defined]
            keys = " Keys of the recipe have no dashes: train.learning_rate=1e-3"
            hint = (
                keys if isinstance(error, click.NoSuchOption) and "possibilities" not in error.format_message() else ""
            )
            fail(f"{error.format_message()}{hint}{where}", code=2)
        except TrimtabError as error:
            fail(*(map(str, getattr(error, "errors", [error]))), code=2)
        except BrokenPipeError:  # `trimtab … | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        except Exception as error:
            if isinstance(error, ModuleNotFoundError) and (missing := missing_extra("this command", error)):
                fail(str(missing), code=2)
            from .storage import storage_fault

            if fault := storage_fault(error):
                fail(fault, code=2)
            text = " ".join(str(error).split()) or type(error).__name__
            if "out of memory" in text.lower():
                fail(f"{text[:200]}: {_SMALLER}", code=1)
            fail(f"{type(error).__name__}: {text[:300]} (traceback: {_write_log()}, or run with --debug)", code=1)


def fail(*messages: str, code: int) -> NoReturn:
    """Ends the command with its errors, one line each."""
    if (process := os.environ.get("RANK", "0")) != "0":
        # Of what ends all of torchrun's processes the first one tells, and torchrun ends the others meanwhile.
        if code > _SIGNALLED:
            sys.exit(code)
        time.sleep(_FIRST_ONE_SECONDS)
        messages = tuple(f"process {process}: {message}" for message in messages)
    if os.environ.get(DEBUG):
        traceback.print_exc()
    for message in messages:
        line = f"error: {' '.join(message.split())}"
        if sys.stderr.isatty():
            width = shutil.get_terminal_size().columns
            line = textwrap.fill(line, width, break_long_words=False, break_on_hyphens=False)
        click.echo(line, err=True)
    sys.exit(code)


def _write_log() -> str:
    with tempfile.NamedTemporaryFile("w", prefix="trimtab-", suffix=".log", delete=False, encoding="utf-8") as file:
        file.write(traceback.format_exc())
    return file.name


def _debug(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value:
        os.environ[DEBUG] = "1"


def common(command: Callable[..., Any]) -> Callable[..., Any]:
    """``--json`` and ``--debug``, which every command has."""
    debug = click.option(
        "--debug",
        is_flag=True,
        expose_value=False,
        callback=_debug,
        is_eager=True,
        help=f"Show the traceback of an error (also: {DEBUG}=1).",
    )
    as_json = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON, and nothing else.")
    return as_json(debug(command))
