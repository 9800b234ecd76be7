"""A run folder becomes one offline page; several become a table. No model, no tensor, no torch.

`data` and `modules` compute, `charts` draws up the figures, `html` writes the page, `comparing` joins runs.
"""

from .compare_page import compare
from .comparing import CompareTable
from .data import Report, load
from .html import write

__all__ = ["CompareTable", "Report", "compare", "load", "write"]
