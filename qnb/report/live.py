"""A live view of the device while a benchmark runs; it watches and keeps nothing.

What a study keeps of its device is read by its own, faster window. This one reads once a second and draws three
lines of SVG, so that what is timed does not notice.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from html import escape
from types import TracebackType

import ipywidgets as widgets

from qnb.speed.monitor import Sample, sensor
from qnb.study import Study

LINES = {"utilization_pct": "utilization, %", "memory_mib": "memory, MiB", "power_w": "power, W"}
KEPT = 240  # readings drawn, the newest
WIDTH_PX, HEIGHT_PX = 240, 36


class Monitor:
    """Draws utilization, memory and power while its block runs: ``with live.Monitor(study): ...``.

    Parameters
    ----------
    study
        Whose device is watched.
    period_s
        Seconds between two readings.
    """

    def __init__(self, study: Study, period_s: float = 1.0) -> None:
        self._period_s = period_s
        self._sensor = sensor(study.device.place)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="qnb-live", daemon=True)
        self._readings: list[Sample] = []
        self.panel = widgets.HTML(value="The monitor draws once a second.")

    def __enter__(self) -> Monitor:
        from IPython.display import display

        display(self.panel)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(self._period_s):
            try:
                self._readings.append(self._sensor.sample())
            except Exception:  # noqa: S112  any driver error: a broken sensor must not break a measurement
                continue
            self.panel.value = draw(self._readings[-KEPT:], self._period_s)


def draw(readings: Sequence[Sample], period_s: float) -> str:
    """Return readings as lines of SVG, a row a quantity, each with its newest value in words."""
    rows = []
    for name, words in LINES.items():
        values = [reading[name] for reading in readings if name in reading]
        if not values:
            continue
        top = 100.0 if name.endswith("_pct") else max(values) or 1.0
        scale = HEIGHT_PX / top
        points = " ".join([f"{at},{HEIGHT_PX - scale * value:.1f}" for at, value in enumerate(values)])
        told = escape(f"{words}: {values[-1]:,.0f}; highest of {len(values) * period_s:,.0f} s {max(values):,.0f}")
        rows.append(
            "<div style='display:flex;flex-wrap:wrap;gap:.75rem;align-items:center'>"
            f"<svg role='img' aria-label='{told}' viewBox='0 -1 {max(len(values) - 1, 1)} {HEIGHT_PX + 2}' "
            f"width='{WIDTH_PX}' height='{HEIGHT_PX}' preserveAspectRatio='none' style='background:#f4f4f4'>"
            "<polyline fill='none' stroke='#1f4e9c' stroke-width='1.5' vector-effect='non-scaling-stroke' "
            f"points='{points}'/></svg><span>{told}</span></div>"
        )
    return "".join(rows)
