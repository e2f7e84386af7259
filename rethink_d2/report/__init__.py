"""The paper's figures, tables and verdicts from one's own runs, as one page that needs no network."""

from .page import write_report

__all__ = ["write_report"]
