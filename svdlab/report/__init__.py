"""Notebooks run headless into pages that open offline: ``svdlab report``."""

from svdlab.report.run import record

__all__ = ["record"]
