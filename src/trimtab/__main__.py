"""`trimtab`, and `python -m trimtab`."""

from __future__ import annotations

import sys
from typing import NoReturn

from .errors import missing_extra


def main() -> NoReturn:
    """The command, or one line on what it needs."""
    try:
        from .app.cli import main as command
    except ModuleNotFoundError as error:
        if missing := missing_extra("the trimtab command", error):
            print(f"error: {missing}", file=sys.stderr)
            sys.exit(2)
        raise
    command()


if __name__ == "__main__":
    main()
