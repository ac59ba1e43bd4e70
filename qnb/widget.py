"""Panels over a study's tables, in Jupyter and Colab; they read and never measure.

A figure is put into an Output widget by assigning its ``outputs``: drawing inside ``with output:`` can stop a
headless run for good, and FigureWidget leaves megabytes of state in an executed notebook.
"""

from __future__ import annotations

import ipywidgets as widgets
import plotly.graph_objects as go

from qnb import figure
from qnb.study import Study


def show(output: widgets.Output, drawn: go.Figure) -> None:
    """Make `drawn` the only content of `output`, as the notebook's own renderer would show it."""
    bundle = drawn._repr_mimebundle_()  # what IPython itself asks a figure for
    output.outputs = ({"output_type": "display_data", "data": bundle, "metadata": {}},)


def explorer(study: Study) -> widgets.VBox:
    """Return a panel that draws one metric of Table 3 or 4 for the precisions ticked."""
    tables = {"batch size 1": study.table3(), "largest batch": study.table4()}
    tables = {name: table for name, table in tables.items() if not table.empty}
    if not tables:
        return widgets.VBox([widgets.Label("Nothing measured yet: run 03_perf_bs1 or 04_perf_maxbatch first.")])
    setting = widgets.Dropdown(options=list(tables), description="setting")
    names = {f"{title} ({unit})": name for name, (title, unit, _) in figure.METRICS.items()}
    metric = widgets.Dropdown(options=names, description="metric")
    known = list(dict.fromkeys(name for table in tables.values() for name in table.precision))
    precisions = widgets.SelectMultiple(options=known, value=known, description="precisions", rows=len(known))
    output = widgets.Output()

    def redraw(_: object = None) -> None:
        table = tables[setting.value]
        show(output, figure.metric(table[table.precision.isin(precisions.value)], metric.value))

    for control in (setting, metric, precisions):
        control.observe(redraw, names="value")
    redraw()
    return widgets.VBox([widgets.HBox([setting, metric, precisions]), output])
