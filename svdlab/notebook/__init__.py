"""What notebooks show: one fix, a tensor, a sweep, a reader's own port; charts, figures, tables, players."""

import importlib
import sys

from svdlab.lazy import lazy_names

_HOMES = {
    "explorer": ("Explorer",),
    "sweep_board": ("SweepExplorer", "show_sweep", "sweeps_side_by_side"),
    "diagnoser": ("Diagnoser",),
    "inspector": ("Inspector",),
    "players": ("Player", "case_clips", "picture", "plot_case_frames"),
    "tables": (
        "catalogue_table",
        "diagnosis_table",
        "ratio_text",
        "stage_table",
        "verdict_html",
        "where_it_shows",
    ),
    "charts": (
        "plot_catalogue",
        "plot_chunks",
        "plot_curves",
        "plot_divergence",
        "plot_frames",
        "plot_steps",
    ),
    "figures": ("plot_frontier", "plot_ramps"),
}
__getattr__, __dir__ = lazy_names(
    __name__, {name: f"{__name__}.{module}" for module, names in _HOMES.items() for name in names}
)

if "google.colab" in sys.modules:  # which shows no widgets of others until it is told to
    importlib.import_module("google.colab.output").enable_custom_widget_manager()
