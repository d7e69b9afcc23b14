"""Notebooks run headless into pages that open offline: ``svdlab report``."""

from svdlab.report.verdict import record

__all__ = ["record"]
