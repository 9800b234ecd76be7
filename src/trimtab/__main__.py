"""`python -m trimtab`."""

from .app.cli import main

main()
