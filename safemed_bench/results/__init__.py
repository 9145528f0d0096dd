"""Records -> frames -> estimates with intervals -> summary and tables. Without torch: a journal is enough."""

from .frames import load_records, load_run
from .summary import summarise, summary_of
from .tables import render

__all__ = ["load_records", "load_run", "render", "summarise", "summary_of"]
