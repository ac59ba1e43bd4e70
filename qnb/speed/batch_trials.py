"""Try a batch of the workload's longest prompt: does it fit, and what memory does it take?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from qnb.memory import MIB, is_out_of_memory, release
from qnb.prompts import Workload
from qnb.quantize.checkpoint import quiet
from qnb.speed.batch_search import OUT_OF_MEMORY, Probe
from qnb.speed.decode_work import weights_mib
from qnb.speed.engines import FACTORIES, warm_up_batch_sizes
from qnb.speed.monitor import Sensor, Window

NEAR_LIMIT = 0.95  # share of the memory above which a batch has to fit twice


@dataclass(frozen=True)
class Trials:
    """A `TryBatch` with a loaded model, which leaves memory as it was.

    On a GPU a batch fits when it runs and the allocator, which the caller limits, reserves no more than `limit_mib`.
    On a CPU, where memory does not run out but swaps, it fits when the process stays within `limit_mib` above
    `baseline_mib`, its memory before the model was loaded.
    """

    model: PreTrainedModel
    workload: Workload
    limit_mib: float
    engine: str = "eager"
    baseline_mib: float = 0.0

    def __post_init__(self) -> None:
        """Generate a few tokens, so that kernels and workspaces loaded once are not counted to a batch."""
        weights_mib(self.model)  # a product may pack them
        for batch_size in warm_up_batch_sizes(self.engine, len(self.workload.longest)):
            self._fits(batch_size, min(4, self.workload.new_tokens))

    def __call__(self, batch_size: int) -> Probe:
        """Run a batch with all its new tokens."""
        release()
        try:
            return self._run_on_gpu(batch_size) if self.model.device.type == "cuda" else self._run_on_cpu(batch_size)
        finally:
            release()

    def _run_on_gpu(self, batch_size: int) -> Probe:
        """Run a batch and read torch's allocator.

        Near the limit the batch has to fit twice: the first run finds all memory free, the second finds it in the
        pieces that the first one left, and so does every batch of a workload after it.
        """
        device = self.model.device
        idle_mib = torch.cuda.memory_allocated(device) / MIB
        room_mib = (torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)) / MIB
        torch.cuda.reset_peak_memory_stats(device)
        torch.cuda.reset_accumulated_memory_stats(device)

        def read() -> tuple[float, float, bool]:
            stats = torch.cuda.memory_stats(device)
            peaks_mib = (stats[f"{name}_bytes.all.peak"] / MIB for name in ("reserved", "allocated"))
            return *peaks_mib, stats["num_alloc_retries"] > 0

        def is_near_limit() -> bool:
            reserved_mib, _, is_squeezed = read()
            return is_squeezed or reserved_mib > NEAR_LIMIT * min(self.limit_mib, room_mib)

        if not self._fits(batch_size, self.workload.new_tokens, is_near_limit):
            return Probe(batch_size, False, idle_mib=idle_mib, room_mib=room_mib, ended=OUT_OF_MEMORY)
        reserved_mib, live_mib, is_squeezed = read()
        fits = reserved_mib <= self.limit_mib
        return Probe(batch_size, fits, reserved_mib, live_mib, is_squeezed, idle_mib, room_mib)

    def _run_on_cpu(self, batch_size: int) -> Probe:
        with Window(Sensor("cpu"), 0.01, self.baseline_mib) as window:
            fits = self._fits(batch_size, self.workload.new_tokens)
        if not fits:
            return Probe(batch_size, False, ended=OUT_OF_MEMORY)
        grown_mib = window.usage.peak_used_memory_mib
        return Probe(batch_size, grown_mib is None or grown_mib <= self.limit_mib, grown_mib)

    def _fits(self, batch_size: int, new_tokens: int, runs_again: Callable[[], bool] = lambda: False) -> bool:
        """Generate for a batch, once more if `runs_again` says so; return whether memory sufficed."""
        prompt = self.workload.longest
        try:
            with quiet():
                engine = FACTORIES[self.engine](self.model, batch_size, len(prompt), self.workload.new_tokens)
                engine.generate([prompt] * batch_size, new_tokens)
                if runs_again():
                    engine.generate([prompt] * batch_size, new_tokens)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return False
        return True
