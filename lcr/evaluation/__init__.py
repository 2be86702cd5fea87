"""What a trained model keeps: streaming evaluation on a grid of lengths and depths, its results, the report.

run = load_run("runs/mamba")                                     # lcr.training.run
rows = evaluate_run(run, grid_from_config(run.config), "runs/mamba/results.jsonl")
report = write_report("runs/mamba")
"""

from lcr.evaluation.cells import evaluate_run
from lcr.evaluation.grid import Grid, grid_from_config
from lcr.evaluation.report import Report, describe_report, write_report
from lcr.evaluation.results import Row, append_row, read_rows
from lcr.evaluation.series import Series, select_series
from lcr.evaluation.tables import print_table

__all__ = [
    "Grid",
    "Report",
    "Row",
    "Series",
    "append_row",
    "describe_report",
    "evaluate_run",
    "grid_from_config",
    "print_table",
    "read_rows",
    "select_series",
    "write_report",
]
