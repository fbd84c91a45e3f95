"""Paged caches for `cumla smoke`: filled the way a server fills them, with what must be in them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

import cumla
from cumla.layouts import BF16, FP16, V4_FP8, V32_FP8, KVLayout

Array = NDArray[Any]


@dataclass(frozen=True)
class StorageSpec:
    """One cache: its format, its page size and the lengths that its sequences grow to."""

    layout: KVLayout
    page_size: int
    lengths: tuple[int, ...]


# The first sequence is freed again, the second forked, the third cut; see `fill`.
_LENGTHS = (300, 1027, 3001, 4096, 2048, 61, 1, 0)
MAIN = {layout.name: StorageSpec(layout, 64, _LENGTHS) for layout in (BF16, FP16, V32_FP8)} | {
    V4_FP8.name: StorageSpec(V4_FP8, 256, _LENGTHS)
}
# DeepSeek V4's compressed entries: one per 4 tokens in 64-entry pages, one per 128 in pairs.
CSA = StorageSpec(V4_FP8, 64, (300, 512, 2001, 3000, 1024, 15, 1, 0))
HCA = StorageSpec(V4_FP8, 2, (8, 61, 500, 1020, 16, 3, 1, 0))


@dataclass(frozen=True)
class Storage:
    """A filled cache, and the same rows by another way: appended to nothing, one after the other.

    Sequence i's rows begin at slot first_slots[i] of `flat_pages`, the start of a page, and fill
    the pages of flat_table[i]. An op that gets either pool must give the same result.
    """

    cache: cumla.PagedKVCache
    sequences: list[int]
    lengths: NDArray[np.int32]
    rows: list[Array]
    """Of each sequence, [length, d_qk] in the compute dtype, as they were before any encoding."""
    flat_rows: Array
    """`rows` at their slots in the flat pool, zeros between them: [slots, d_qk]."""
    flat_pages: Array
    flat_decoded: Array
    """`flat_rows` as they come back from `flat_pages`."""
    flat_table: NDArray[np.int32]
    first_slots: NDArray[np.int64]

    def flat_indices(self, positions: Array) -> NDArray[np.int32]:
        """Positions [b, s_q, topk] as slots of the flat pool, -1 for a negative one."""
        slots = self.first_slots[:, None, None] + positions
        return np.where(positions < 0, -1, slots).astype(np.int32)


def fill(spec: StorageSpec, rng: np.random.Generator) -> Storage:
    """Build a cache with appends of several sequences, a fork, a truncation and a freed one."""
    layout, page_size = spec.layout, spec.page_size
    pages = sum(-(-length // page_size) + 2 for length in spec.lengths) + 2
    cache = cumla.PagedKVCache(layout, pages + -(-spec.lengths[1] // page_size), page_size)
    # What nobody stored must not reach a result: NaN in numbers, codes and scales alike.
    cache.pages[...] = 0xFF if layout.is_fp8 else np.nan
    expected: dict[int, list[Array]] = {}

    def append(wanted: dict[int, int]) -> None:
        # Of the size that FlashMLA's tests have, whose tolerances are absolute.
        rows = rng.standard_normal((sum(wanted.values()), layout.d_qk), np.float32) / 10
        rows = rows.astype(layout.compute_dtype)
        cache.append(list(wanted), rows, list(wanted.values()))
        bounds = np.cumsum(list(wanted.values()))[:-1]
        for sequence, part in zip(wanted, np.split(rows, bounds), strict=True):
            expected.setdefault(sequence, []).append(part)

    ids = [cache.allocate() for _ in spec.lengths]
    first = {one: length // 2 for one, length in zip(ids, spec.lengths, strict=True)}
    append(first)
    freed, forked, cut, *_ = ids
    cache.free(freed)
    rest = {
        one: length - first[one]
        for one, length in zip(ids, spec.lengths, strict=True)
        if one != freed
    }
    append({one: count for one, count in rest.items() if one % 2})
    append({one: count for one, count in rest.items() if one % 2 == 0})
    # Both sides write into the page that they share: one of them must get a copy.
    child = cache.fork(forked)
    expected[child] = list(expected[forked])
    append({forked: 1, child: 5})
    kept = cache.length(cut) - cache.length(cut) // 3
    cache.truncate(cut, kept)
    expected[cut] = [np.concatenate(expected[cut])[:kept]]
    append({cut: 2, child: 1})

    sequences = list(cache.sequences)
    rows = [np.concatenate(expected[one]) for one in sequences]
    return _beside(cache, sequences, rows)


def _beside(cache: cumla.PagedKVCache, sequences: list[int], rows: list[Array]) -> Storage:
    layout, page_size = cache.layout, cache.page_size
    lengths = np.array([len(one) for one in rows], np.int32)
    blocks = -(-lengths.astype(np.int64) // page_size)
    first_pages = np.cumsum(blocks) - blocks
    flat_rows = np.zeros((int(blocks.sum()) * page_size, layout.d_qk), layout.compute_dtype)
    for first, one in zip(first_pages * page_size, rows, strict=True):
        flat_rows[first : first + len(one)] = one
    table = np.arange(max(int(blocks.max()), 1)) + first_pages[:, None]
    shape = (-1, page_size, 1, layout.d_qk)
    pages = cumla.pack_kv(flat_rows.reshape(shape), layout, page_size)
    return Storage(
        cache=cache,
        sequences=sequences,
        lengths=lengths,
        rows=rows,
        flat_rows=flat_rows,
        flat_pages=pages,
        flat_decoded=cumla.unpack_kv(pages, layout, page_size).reshape(flat_rows.shape),
        flat_table=table.astype(np.int32),
        first_slots=first_pages * page_size,
    )


class Storages:
    """The caches of one smoke run, each filled when a case first asks for it."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._filled: dict[StorageSpec, Storage] = {}

    def __getitem__(self, spec: StorageSpec) -> Storage:
        if spec not in self._filled:
            number = [*MAIN.values(), CSA, HCA].index(spec)
            self._filled[spec] = fill(spec, np.random.default_rng([self._seed, number]))
        return self._filled[spec]
