"""Figures as files: pages that need no network, and pictures where a browser is found to draw them.

kaleido is called itself: Plotly's own ``write_image`` refuses some pairs of versions that work. One browser draws
all pictures of a call.
"""

import logging
from base64 import b64encode
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import plotly.graph_objects as go

from qnb.report import theme
from qnb.report.figures import draw_all
from qnb.report.results import Results

LOGGER = logging.getLogger(__name__)
PLOTLY = "application/vnd.plotly.v1+json"  # the type of a figure in a notebook
KINDS, WIDTH_PX, SCALE = ("png", "svg"), 900, 1.25  # of pictures
PAGE_SPAN = "max(100%, 600px)"  # of a figure's own page: narrower windows scroll
REMEDY = "pip install kaleido, and install Chromium or Chrome, or run kaleido_get_chrome"


def save_figures(results: Results, folder: Path, with_pictures: bool = True) -> dict[str, go.Figure]:
    """Draw every figure, save it as a page, and as PNG and SVG where wanted; return the figures by name.

    A page that changed loses its pictures. Only missing ones are drawn, since a browser takes seconds.
    """
    figures, undrawn = draw_all(results), {}
    label = f"  <span style='font-size:12px;font-weight:400;color:{theme.QUIET}'>{escape(results.label)}</span>"
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        # model and device stand beside the title, since a picture is passed on without the page around it
        named = go.Figure(figure).update_layout(title_text=figure.layout.title.text + label * bool(results.label))
        page, files = folder / f"{name}.html", [folder / f"{name}.{kind}" for kind in KINDS]
        options = {"include_plotlyjs": "directory", "config": theme.CONFIG, "div_id": name, "default_width": PAGE_SPAN}
        if not page.exists() or page.read_text(encoding="utf-8") != named.to_html(**options):
            for file in files:
                file.unlink(missing_ok=True)
        named.write_html(page, **options)  # and plotly.js once beside all, so that no network is needed to look
        if not all(file.exists() for file in files):
            undrawn[name] = named
    if with_pictures and (problem := pictures(undrawn, folder)):
        LOGGER.warning(problem)
    return figures


def pictures(figures: Mapping[str, go.Figure], folder: Path, scale: float = SCALE) -> str:
    """Write each figure that draws something as PNG and SVG; return why not, or nothing.

    A browser that fails costs the pictures, never the run that asked for them.

    Parameters
    ----------
    figures
        Figures by file name.
    folder
        Where the pictures go.
    scale
        Of a PNG: pixels of a picture for one of a screen.
    """
    shown = {name: figure for name, figure in figures.items() if figure.data}
    if not shown:
        return ""
    jobs = [
        {"fig": figure, "path": folder / f"{name}.{kind}",
         "opts": {"format": kind, "width": WIDTH_PX, "height": figure.layout.height, "scale": scale}}
        for name, figure in shown.items() for kind in KINDS
    ]  # fmt: skip
    try:
        from kaleido import write_fig_from_object_sync

        write_fig_from_object_sync(jobs, cancel_on_error=True, kopts={"mathjax": False, "timeout": 30})
    except Exception as error:
        return f"figures are saved as HTML only: the browser did not draw them ({error}); {REMEDY}"
    return ""


def draw_into(shown: Sequence[dict[str, Any]]) -> str:
    """Replace figures of a notebook's outputs by pictures; return why not, or nothing.

    One that has nothing to draw says so.
    """
    figures = {str(number): go.Figure(data[PLOTLY], skip_invalid=True) for number, data in enumerate(shown)}
    with TemporaryDirectory() as folder:
        if problem := pictures(figures, Path(folder), scale=0.7):
            return problem
        for name, figure in figures.items():
            picture, data = Path(folder, f"{name}.png"), shown[int(name)]
            data.clear()
            if picture.exists():
                data["image/png"] = b64encode(picture.read_bytes()).decode()
            else:
                data["text/plain"] = f"{figure.layout.title.text} Not measured."
    return ""
