"""Figures as files: a page that needs no network, and a picture where a browser is found to draw it.

kaleido is called itself: Plotly's own ``write_image`` refuses some pairs of versions that work. One browser draws
all pictures of a call.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

import plotly.graph_objects as go

from qnb.report import theme as look

WIDTH_PX, SCALE = 900, 1.5
REMEDY = "install Chromium or Chrome, or run kaleido_get_chrome"


def _told(figure: go.Figure, of: str) -> go.Figure:
    told = go.Figure(figure)
    if of:
        text = f"</b>  <span style='font-size:12px;color:{look.QUIET}'>{escape(of)}</span>"
        told.layout.title.text = figure.layout.title.text.replace("</b>", text, 1)
    return told


def pages(figures: Mapping[str, go.Figure], folder: Path) -> list[Path]:
    """Write each figure as HTML; plotly.js lies once beside them, so no network is needed to look."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, figure in figures.items():
        path = folder / f"{name}.html"
        figure.write_html(path, include_plotlyjs="directory", full_html=True, config={"responsive": True})
        paths.append(path)
    return paths


def pictures(
    figures: Mapping[str, go.Figure], folder: Path, kinds: Sequence[str] = ("png", "svg"), of: str = ""
) -> str:
    """Write each figure that draws something as PNG and SVG; return why not where no browser draws them.

    `of`, a model and its device, stands beside the title: a picture is passed on without the page around it. A
    browser that fails costs the pictures, never the run that asked for them.
    """
    drawn = {name: figure for name, figure in figures.items() if not look.is_empty(figure)}
    if not drawn:
        return ""
    try:
        from choreographer.browsers.chromium import Chromium
        from kaleido import write_fig_from_object_sync
        from kaleido.errors import KaleidoError
    except ModuleNotFoundError:
        return "figures are saved as HTML only: kaleido is not installed; pip install kaleido, and " + REMEDY
    if not Chromium.find_browser(skip_local=False):
        return f"figures are saved as HTML only: there is no browser to draw PNG and SVG; {REMEDY}"
    folder.mkdir(parents=True, exist_ok=True)
    wanted = [
        {
            "fig": _told(figure, of),
            "path": folder / f"{name}.{kind}",
            "opts": {"format": kind, "width": WIDTH_PX, "height": figure.layout.height, "scale": SCALE},
        }
        for name, figure in drawn.items()
        for kind in kinds
    ]
    try:
        write_fig_from_object_sync(wanted, cancel_on_error=True, kopts={"mathjax": False, "timeout": 30})
    except (RuntimeError, OSError, KaleidoError) as error:
        return f"figures are saved as HTML only: the browser did not draw them ({error}); {REMEDY}"
    return ""
