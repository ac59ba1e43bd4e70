"""A device without a GPU: torch's caching allocator in outline, and a model's own allocations to serve.

The allocator's rules are those of c10/cuda/CUDACachingAllocator.cpp with default settings: sizes rounded to 512 bytes;
segments of 2 MiB for up to 1 MiB, 20 MiB for up to 10 MiB, else whole 2 MiB; best fit; what is left of a block split
off; neighbours joined when freed; and before it gives up, every wholly free segment given back. The allocations are
recorded from the model on the meta device, where tensors have sizes and no bytes.
"""

from __future__ import annotations

import weakref
from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache, partial
from random import Random
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, LlamaForCausalLM

from qnb.device import MIB
from qnb.quantize.checkpoint import shape_config
from qnb.speed.batch_search import OUT_OF_MEMORY, Probe
from qnb.speed.engines import Decoder

WORKSPACE = 32 * MIB  # cuBLAS's


@dataclass
class Block:
    """A piece of a segment, between its neighbours there."""

    size: int
    small: bool
    before: int = 0
    after: int = 0
    free: bool = False


@dataclass
class Allocator:
    """Serves sizes in bytes from segments that together stay within `limit`; raises MemoryError where it cannot."""

    limit: float
    reserved: int = 0
    live: int = 0
    peak_reserved: int = 0
    peak_live: int = 0
    retries: int = 0
    blocks: dict[int, Block] = field(default_factory=dict)
    pools: dict[bool, list[tuple[int, int]]] = field(default_factory=lambda: {True: [], False: []})
    made: int = 0

    def take(self, size: int) -> int:
        """Return the name of a block of at least `size` bytes."""
        size = max(512, -(-size // 512) * 512)
        small = size <= MIB
        pool = self.pools[small]
        place = bisect_left(pool, (size, 0))
        name = pool.pop(place)[1] if place < len(pool) else self._segment(size, small)
        block = self.blocks[name]
        block.free = False
        rest = block.size - size
        if rest >= 512 if small else rest > MIB:
            block.size = size
            other = self._add(Block(rest, small, name, block.after))
            if block.after:
                self.blocks[block.after].before = other
            block.after = other
            self._put(other)
        self.live += block.size
        self.peak_live = max(self.peak_live, self.live)
        return name

    def give(self, name: int) -> None:
        """Free a block and join it with free neighbours."""
        self.live -= self.blocks[name].size
        before = self.blocks[name].before
        if before and self.blocks[before].free:
            self._pull(before)
            name = self._join(before, name)
        after = self.blocks[name].after
        if after and self.blocks[after].free:
            self._pull(after)
            self._join(name, after)
        self._put(name)

    def _join(self, left: int, right: int) -> int:
        gone = self.blocks.pop(right)
        self.blocks[left].size += gone.size
        self.blocks[left].after = gone.after
        if gone.after:
            self.blocks[gone.after].before = left
        return left

    def _segment(self, size: int, small: bool) -> int:
        whole = 2 * MIB if small else 20 * MIB if size < 10 * MIB else -(-size // (2 * MIB)) * 2 * MIB
        if self.reserved + whole > self.limit:
            self.retries += 1
            for pool in self.pools.values():
                for free, name in list(pool):
                    if not self.blocks[name].before and not self.blocks[name].after:
                        self._pull(name)
                        del self.blocks[name]
                        self.reserved -= free
            if self.reserved + whole > self.limit:
                raise MemoryError
        self.reserved += whole
        self.peak_reserved = max(self.peak_reserved, self.reserved)
        return self._add(Block(whole, small))

    def _add(self, block: Block) -> int:
        self.made += 1
        self.blocks[self.made] = block
        return self.made

    def _put(self, name: int) -> None:
        block = self.blocks[name]
        block.free = True
        insort(self.pools[block.small], (block.size, name))

    def _pull(self, name: int) -> None:
        block = self.blocks[name]
        pool = self.pools[block.small]
        del pool[bisect_left(pool, (block.size, name))]
        block.free = False


class _Recorder(TorchDispatchMode):
    """Notes when a storage on the meta device comes (its number and bytes) and goes (its number, negative)."""

    def __init__(self, known: set[int]) -> None:
        super().__init__()
        self.events: list[tuple[int, int]] = []
        self._known, self._count = known, 0

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = operator(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self._known:
                storage = tensor.untyped_storage()
                self._known.add(storage._cdata)
                self._count += 1
                self.events.append((self._count, storage.nbytes()))
                weakref.finalize(storage, self._gone, self._count, storage._cdata)
        return made

    def _gone(self, number: int, key: int) -> None:
        self._known.discard(key)
        self.events.append((-number, 0))


def _flash(module: Any, query: torch.Tensor, key: Any, value: Any, mask: Any, **options: Any) -> tuple[Any, None]:
    """Allocate what the flash kernel does: its output, and a 32-bit sum for every query."""
    batch, heads, tokens, width = query.shape
    out = query.new_empty(batch, tokens, heads, width).transpose(1, 2)
    sums = query.new_empty(batch, heads, tokens, dtype=torch.float32)  # freed on return
    del sums
    return out.transpose(1, 2).contiguous(), None


def _outline(layers: int) -> LlamaForCausalLM:
    """Return Llama-3.2-1B's shape, or so many layers of it, where tensors have no bytes."""
    AttentionInterface.register("outline", _flash)
    config = shape_config()
    config.num_hidden_layers = layers
    with torch.device("meta"):
        model = LlamaForCausalLM(config).half().eval()
    model.set_attn_implementation("outline")
    return model


def _llm_int8(model: LlamaForCausalLM, draw: Random, share: float) -> None:
    """Let the layers' products allocate what LLM.int8's do on a GPU, a `share` of them meeting outlier columns."""
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and "layers" in name:
            module.forward = partial(_product, module.out_features, draw.random() < share)


def _product(width: int, outliers: bool, hidden: torch.Tensor) -> torch.Tensor:
    """Allocate rows of 8 bits and their scales, the search for outliers, and a product in 32 bits made one in 16.

    That of outlier columns is added out of place, while the sum in 32 bits is held still: so a GPU's peak says.
    """
    rows = hidden.reshape(-1, hidden.shape[-1])
    scales, eight = rows.new_empty(len(rows), dtype=torch.float32), torch.empty_like(rows, dtype=torch.int8)
    found = rows.abs() >= 6
    del found
    sums = rows.new_empty(len(rows), width, dtype=torch.int32)
    product = torch.empty_like(sums, dtype=torch.float16)
    if outliers:
        product = torch.empty_like(product)
    del scales, eight, sums
    return product.reshape(*hidden.shape[:-1], width)


def _recorder(model: LlamaForCausalLM) -> _Recorder:
    return _Recorder({p.untyped_storage()._cdata for p in (*model.parameters(), *model.buffers())})


def _serve(memory: Allocator, events: Iterable[tuple[int, int]]) -> None:
    """Take and give back what was recorded: a number and its bytes, or its negative; and at the end all the rest."""
    held: dict[int, int] = {}
    for number, size in events:
        if number > 0:
            held[number] = memory.take(size)
        else:
            memory.give(held.pop(-number))
    for name in held.values():
        memory.give(name)


def _record(
    batch_size: int, prompt_tokens: int, new_tokens: int, layers: int, outliers: tuple[float, int] | None
) -> list[tuple[int, int]]:
    """Return the allocations of eager greedy decoding: whole prompts, then a token at a time, the cache growing."""
    model = _outline(layers)
    if outliers:
        _llm_int8(model, Random(outliers[1]), outliers[0])
    recorder = _recorder(model)
    with torch.inference_mode(), recorder:
        ids, kept = torch.empty(batch_size, prompt_tokens, dtype=torch.long, device="meta"), None
        for _ in range(new_tokens):
            out = model(input_ids=ids, past_key_values=kept, use_cache=True, logits_to_keep=1)
            kept = out.past_key_values
            scores = out.logits[:, -1].to(copy=True, dtype=torch.float32).clone()
            ids = torch.argmax(scores, -1)[:, None]
            del out, scores
        events = list(recorder.events)
    return events


@cache
def recorded(
    prompt_tokens: int, new_tokens: int, layers: int = 16, outliers: tuple[float, int] | None = None
) -> list[tuple[int, int, int]]:
    """Return allocations on Llama-3.2-1B's shape, (number, fixed bytes, bytes a row), and frees, (-number, 0, 0).

    With `outliers` products are LLM.int8's: the share of them that meet outlier columns, and the seed that says which.
    """
    two, four = (_record(batch_size, prompt_tokens, new_tokens, layers, outliers) for batch_size in (2, 4))
    events = []
    for (number, small), (other, large) in zip(two, four, strict=True):
        assert number == other
        events.append((number, 2 * small - large, (large - small) // 2))
    return events


def reading(prompt_tokens: int, new_tokens: int) -> Callable[[int, float], Allocator]:
    """Return a function of a batch size and a limit in MiB: the allocator after `Decoder` has read such a batch."""
    model = _outline(16)
    Decoder(model, 1, prompt_tokens, new_tokens)  # joins the weights

    def serve(batch_size: int, limit_mib: float) -> Allocator:
        recorder = _recorder(model)
        with torch.no_grad(), recorder:
            Decoder(model, batch_size, prompt_tokens, new_tokens).prefill([[5] * prompt_tokens] * batch_size)
            events = list(recorder.events)
        memory = Allocator(limit_mib * MIB)
        for size in (*(p.nbytes for p in model.parameters()), WORKSPACE):
            memory.take(size)
        _serve(memory, events)
        return memory

    return serve


def device(
    prompt_tokens: int,
    new_tokens: int,
    limit_mib: float,
    bits: float = 16,
    layers: int = 16,
    workspace_at: int = 0,
    outliers: tuple[float, int] | None = None,
) -> Callable[[int], Probe]:
    """Return a `try_batch` that serves the recorded allocations within `limit_mib`, linear weights taking `bits`.

    They are served twice, as a batch follows a batch: the second finds memory in the pieces that the first one left.
    The workspace is taken before them, or where `workspace_at` of the first batch's were. `outliers` as `recorded`'s.
    """
    config = shape_config()
    config.num_hidden_layers = layers
    with torch.device("meta"):
        weights = [
            int(p.numel() * (bits if p.ndim == 2 and "layers" in name else 16)) // 8
            for name, p in LlamaForCausalLM(config).named_parameters()
        ]
    events = recorded(prompt_tokens, new_tokens, layers, outliers)

    @cache
    def try_batch(batch_size: int) -> Probe:
        memory = Allocator(limit_mib * MIB)
        for size in weights:
            memory.take(size)

        def sizes(place: int = -1) -> Iterator[tuple[int, int]]:
            for number, fixed, row in events:
                if number == place:
                    memory.take(WORKSPACE)
                yield number, fixed + row * batch_size

        if not workspace_at:
            memory.take(WORKSPACE)
        idle_mib = memory.live / MIB
        try:
            _serve(memory, sizes(workspace_at))
            _serve(memory, sizes())
        except MemoryError:
            return Probe(batch_size, False, idle_mib=idle_mib, ended=OUT_OF_MEMORY)
        peaks = {"memory_mib": memory.peak_reserved / MIB, "live_mib": memory.peak_live / MIB}
        return Probe(batch_size, True, squeezed=memory.retries > 0, idle_mib=idle_mib, **peaks)

    return try_batch
