"""Capture work as a CUDA graph, which is replayed without Python launching its kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

WARM_UP_STEPS = 2  # runs before one is captured


def capture(work: Callable[[], Any], pool: Any = None) -> torch.cuda.CUDAGraph:
    """Capture `work`, after runs in which kernels are compiled and libraries allocate their workspaces.

    They run on the stream that torch captures on: cuBLAS keeps a workspace for every stream that it ever saw.
    Graphs of one `pool` share memory.
    """
    graph = torch.cuda.CUDAGraph()
    captured: Any = torch.cuda.graph(graph, pool=pool)
    main, side = torch.cuda.current_stream(), captured.capture_stream
    side.wait_stream(main)
    with torch.cuda.stream(side):
        for _ in range(WARM_UP_STEPS):
            work()
    main.wait_stream(side)
    with torch.cuda.stream(main), captured:
        work()
    return graph
