"""PagedKVCache: one pool of KV pages, and the sequences that share it.

A sequence is a list of pages, its block table, and a length. Its token i lives in page
`table[i // page_size]` at offset `i % page_size`; the token's slot is page * page_size + offset.
`fork` shares pages, and the first `append` into a shared page copies it (copy-on-write).

A method checks all of its arguments and the page count first, then moves bytes to places that no
sequence can see yet, and changes the tables last: an error, whoever raises it, leaves the cache as
it was. Tables and lengths are kept on the host, also for pages on a GPU, and no lock guards them:
one thread at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from cumla.backends import Backend, load_backend
from cumla.backends.arrays import Arrays, is_on_gpu
from cumla.checks import bad_type, bad_value, check_array, check_dtype, check_int, check_shape
from cumla.fp8 import BF16, ScaleRule
from cumla.layouts import KVLayout, check_layout, check_scale_rule

Array = NDArray[Any]
Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]

_MAX_TOKENS = 2**31 - 1  # every slot must fit the int32 indices of the sparse ops


class OutOfPages(RuntimeError):
    """An append needs more pages than are free; nothing has changed.

    Attributes:
        needed: pages that the append would have taken, copies of shared ones included.
        free: pages that were free.
        missing: needed - free.
    """

    def __init__(self, needed: int, free: int) -> None:
        super().__init__(needed, free)
        self.needed, self.free, self.missing = needed, free, needed - free

    def __str__(self) -> str:
        return (
            f"append needs {self.needed} pages and {self.free} are free: {self.missing} missing. "
            "Free or truncate sequences and append again, or make the cache with a larger "
            "num_pages; nothing has changed."
        )


@dataclass(eq=False)  # a sequence is itself, whatever it holds
class _Sequence:
    length: int = 0
    table: Int32 = field(default_factory=lambda: np.empty(1, np.int32))
    """The page of every block; entries past the last block mean nothing."""

    def reserve(self, blocks: int) -> None:
        """Make room for `blocks` entries. Doubling keeps growth by single pages linear."""
        if blocks > len(self.table):
            table = np.empty(max(blocks, 2 * len(self.table)), np.int32)
            table[: len(self.table)] = self.table
            self.table = table


class PagedKVCache:
    """A pool of KV pages in one buffer, with the sequences that live in it (one KV head).

    Args:
        layout: one of `cumla.layouts`.
        num_pages: pages of the pool; num_pages * page_size must be at most 2**31 - 1.
        page_size: tokens a page.
        backend: where the buffer lives and rows are encoded; the one in force by default.

    Raises:
        ArgumentError, ArgumentTypeError (ValueError, TypeError): naming the argument.
        BackendUnavailable: the backend cannot run on this machine.

    Attributes:
        pages: [num_pages, page_size, 1, row_elements], what the ops take. Zeroed when made; a page
            that goes back to the pool keeps its bytes until it is written again, and so do the
            tokens of a page past the end of its sequences.
        layout, num_pages, page_size: as given.
        backend: the loaded backend.
    """

    def __init__(
        self, layout: KVLayout, num_pages: int, page_size: int, *, backend: str | None = None
    ) -> None:
        self.layout: Final = check_layout("layout", layout)
        self.num_pages: Final = check_int("num_pages", num_pages, low=1)
        self.page_size: Final = check_int("page_size", page_size, low=1)
        if self.num_pages * self.page_size > _MAX_TOKENS:
            raise bad_value(
                "num_pages",
                f"{self.num_pages} pages of {self.page_size} tokens",
                f"num_pages * page_size must be <= {_MAX_TOKENS}, so that slots fit int32",
                f"Pass num_pages <= {_MAX_TOKENS // self.page_size}, or use several caches.",
            )
        self.backend: Final[Backend] = load_backend(backend)
        self.pages: Final = self.backend.empty_pages(self.layout, self.num_pages, self.page_size)
        self._sequences: dict[int, _Sequence] = {}
        self._next_id = 0
        self._owners = np.zeros(self.num_pages, np.int64)  # sequences whose table has the page
        # A stack of free pages, the next one to take last. Last in, first out takes and gives back
        # many pages with one slice, and hands out memory that was touched a moment ago.
        self._free = np.arange(self.num_pages, dtype=np.int32)[::-1].copy()
        self._num_free = self.num_pages

    @property
    def num_free_pages(self) -> int:
        return self._num_free

    @property
    def num_used_pages(self) -> int:
        return self.num_pages - self._num_free

    @property
    def sequences(self) -> tuple[int, ...]:
        """The ids of the live sequences, oldest first."""
        return tuple(self._sequences)

    def __repr__(self) -> str:
        return (
            f"PagedKVCache({self.layout}, num_pages={self.num_pages}, page_size={self.page_size}, "
            f"backend={self.backend.name!r}): {len(self._sequences)} sequences, "
            f"{self.num_used_pages} pages used, {self.num_free_pages} free"
        )

    def allocate(self) -> int:
        """Start an empty sequence, which takes no page yet; returns its id, never used again."""
        return self._add(_Sequence())

    def fork(self, sequence: int) -> int:
        """Start a sequence with the same tokens; returns its id.

        It shares all pages, the partly filled last one too, and takes none. Whichever of the
        sharers next appends into a shared page gets a copy of it.
        """
        parent = self._find("sequence", sequence)
        table = self._table(parent).copy()
        self._owners[table] += 1
        return self._add(_Sequence(parent.length, table))

    def free(self, sequence: int) -> None:
        """End a sequence; its pages that nobody shares go back to the pool, uncleared."""
        found = self._find("sequence", sequence)
        self._release(self._table(found))
        del self._sequences[int(sequence)]

    def truncate(self, sequence: int, new_length: int) -> None:
        """Drop the tokens from `new_length` on, such as rejected speculative ones.

        new_length is at most the length. Pages that the sequence no longer needs and nobody shares
        go back to the pool, uncleared.
        """
        found = self._find("sequence", sequence)
        new_length = check_int("new_length", new_length, low=0, high=found.length)
        self._release(self._table(found)[self._blocks(new_length) :])
        found.length = new_length

    def append(
        self,
        sequences: Sequence[int] | Array,
        kv: Array,
        lengths: Sequence[int] | Array,
        *,
        scale_rule: ScaleRule | None = None,
    ) -> Int64:
        """Append rows to many sequences in one call, encoding them on the way.

        A partly filled page that other sequences share is copied first. If all its sharers append
        in one call, the last of them in `sequences` keeps the page.

        Args:
            sequences: n ids, all different.
            kv: [sum(lengths), d_qk], bfloat16, float16 or float32, rounded to the layout's compute
                dtype first; the rows of sequence i come after those of sequence i - 1. On the GPU
                for a cache there.
            lengths: [n] rows for each sequence; 0 is allowed.
            scale_rule: as for `cumla.pack_kv`.

        Returns:
            int64 [sum(lengths)]: the slot of every row.

        Raises:
            OutOfPages: not enough free pages, counted for the whole call.
            ArgumentError, ArgumentTypeError (ValueError, TypeError): naming the argument.
        """
        found = self._find_all(sequences)
        if len(set(found)) < len(found):
            raise bad_value(
                "sequences",
                f"{sequences}",
                "the sequences of one append must all be different",
                "Append the rows of a sequence together, or call append again.",
            )
        counts = _check_lengths(lengths, len(found))
        kv = self._own_array("kv", kv)
        check_dtype("kv", kv, [BF16, np.float16, np.float32])
        check_shape("kv", kv, [sum(counts), self.layout.d_qk])
        rule = check_scale_rule(self.layout, scale_rule)
        pages, bounds, copies = self._place(found, counts)
        is_fresh = pages < 0
        needed = int(is_fresh.sum())
        if needed > self._num_free:
            raise OutOfPages(needed, self._num_free)
        if not len(kv):
            return np.empty(0, np.int64)

        fresh = self._free[self._num_free - needed : self._num_free][::-1].copy()
        pages[is_fresh] = fresh
        # Row j belongs to sequence owner[j] and is token at[j] of the pages of its tail.
        owner = np.repeat(np.arange(len(found)), counts)
        filled = np.array([one.length % self.page_size for one in found])
        at = np.arange(len(kv)) + (filled - np.cumsum(counts) + counts)[owner]
        block, offset = np.divmod(at, self.page_size)
        slots: Int64 = pages[bounds[owner] + block].astype(np.int64) * self.page_size + offset
        for one, count in zip(found, counts, strict=True):
            one.reserve(self._blocks(one.length + count))
        # Until the tables change, these bytes lie in free pages or past the end of a sequence. All
        # copies come before the rows: where one sharer copies a page, another may write into it.
        for source, place in copies:
            self.backend.copy_page(self.pages, self.layout, source, int(pages[place]))
        self.backend.write_rows(self.pages, self.layout, slots, kv, rule)

        self._num_free -= needed
        self._owners[fresh] = 1
        for source, _ in copies:
            self._owners[source] -= 1
        for i, one in enumerate(found):
            tail, first = pages[bounds[i] : bounds[i + 1]], one.length // self.page_size
            one.table[first : first + len(tail)] = tail
            one.length += counts[i]
        return slots

    def length(self, sequence: int) -> int:
        """Tokens that the sequence holds."""
        return self._find("sequence", sequence).length

    def cache_seqlens(self, sequences: Sequence[int] | Array) -> Int32:
        """int32 [n]: the lengths of n sequences, where the pages are."""
        return self.backend.as_array(self._lengths_of(sequences))

    def block_table(self, sequences: Sequence[int] | Array) -> Int32:
        """int32 [n, max_blocks]: the pages of n sequences, then -1; max_blocks is at least 1.

        Where the cache's pages are: a CuPy array for a cache on the GPU.
        """
        return self.backend.as_array(self._tables_of(sequences))

    def slot_ids(self, sequence: int, positions: Array) -> Int64:
        """Where tokens of one sequence are in the pool.

        Args:
            sequence: an id.
            positions: int32 or int64, any shape, each in [0, length).

        Returns:
            int64, positions' shape: page * page_size + offset.

        Raises:
            ArgumentError, ArgumentTypeError (ValueError, TypeError): naming the argument.
        """
        found = self._find("sequence", sequence)
        _check_positions(positions)
        outside = positions[(positions < 0) | (positions >= found.length)]
        if outside.size:
            raise _bad_position(outside[0], sequence, found.length)
        block, offset = np.divmod(positions.astype(np.int64), self.page_size)
        return np.asarray(found.table[block].astype(np.int64) * self.page_size + offset)

    def token_indices(self, sequences: Sequence[int] | Array, positions: Array) -> Int32:
        """Turn tokens chosen per sequence into the indices that `cumla.sparse_decode` takes.

        Args:
            sequences: n ids.
            positions: [n, s_q, topk] int32 or int64, counted from the start of each sequence and
                less than its length; a negative one selects nothing. On the GPU, which only a cache
                there takes, int32, and nobody looks whether they are less than the lengths: one
                beyond a sequence's last page selects nothing.

        Returns:
            int32 [n, s_q, topk]: slots, and -1 in place of every negative position; where the pages
            are.

        Raises:
            ArgumentError, ArgumentTypeError (ValueError, TypeError): naming the argument.
        """
        table, lengths = self._tables_of(sequences), self._lengths_of(sequences)
        if is_on_gpu("positions", positions):
            return self._token_indices_on_gpu(table, positions)
        _check_positions(positions)
        check_shape("positions", positions, [len(table), "s_q", "topk"])
        beyond = np.argwhere(positions >= lengths[:, None, None])
        if beyond.size:
            i, *_ = at = tuple(beyond[0])
            raise _bad_position(positions[at], sequences[i], lengths[i])
        selected = positions >= 0
        block, offset = np.divmod(np.where(selected, positions, 0), self.page_size)
        page = table[np.arange(len(table))[:, None, None], block]
        slots = np.where(selected, page * self.page_size + offset, -1).astype(np.int32)
        return self.backend.as_array(slots)

    def _token_indices_on_gpu(self, table: Int32, positions: Any) -> Int32:
        positions = self._own_array("positions", positions)
        check_dtype("positions", positions, [np.int32])
        check_shape("positions", positions, [len(table), "s_q", "topk"])
        backend: Any = self.backend  # on a GPU there is no other than KernelBackend
        slots: Int32 = backend.token_slots(positions, table, self.num_pages, self.page_size)
        return slots

    def read(self, sequence: int) -> Array:
        """The decoded rows of a sequence, [length, d_qk] in the layout's compute dtype."""
        slots = self.slot_ids(sequence, np.arange(self.length(sequence)))
        return self.backend.read_rows(self.pages, self.layout, slots)

    def _own_array(self, argument: str, value: Any) -> Array:
        """`value` as an array of the library and the device that the pages are on, else raise."""
        arrays = Arrays(**{argument: value})
        mine = self.backend.name == "cupy"
        if arrays.on_gpu != mine:
            places = ("the CPU", "the GPU")
            raise bad_value(
                argument,
                f"an array on {places[arrays.on_gpu]}",
                f"this cache is on {places[mine]}",
                f"Copy {argument} over, or make the cache with backend='cupy'."
                if arrays.on_gpu
                else f"Copy it with cupy.asarray({argument}).",
            )
        return arrays[argument]

    def _lengths_of(self, sequences: Sequence[int] | Array) -> Int32:
        return np.array([one.length for one in self._find_all(sequences)], np.int32)

    def _tables_of(self, sequences: Sequence[int] | Array) -> Int32:
        tables = [self._table(one) for one in self._find_all(sequences)]
        result = np.full((len(tables), max([1, *map(len, tables)])), -1, np.int32)
        for row, table in zip(result, tables, strict=True):
            row[: len(table)] = table
        return result

    def _blocks(self, length: int) -> int:
        return -(-length // self.page_size)

    def _table(self, sequence: _Sequence) -> Int32:
        """The pages that a sequence uses, a view."""
        return sequence.table[: self._blocks(sequence.length)]

    def _add(self, sequence: _Sequence) -> int:
        self._sequences[self._next_id] = sequence
        self._next_id += 1
        return self._next_id - 1

    def _release(self, pages: Int32) -> None:
        """Give up one sequence's share of `pages`, which are all different."""
        self._owners[pages] -= 1
        # Reversed, so that they are taken again in the order that the sequence had them.
        freed = pages[self._owners[pages] == 0][::-1]
        self._free[self._num_free : self._num_free + len(freed)] = freed
        self._num_free += len(freed)

    def _place(
        self, found: list[_Sequence], counts: list[int]
    ) -> tuple[Int32, Int64, list[tuple[int, int]]]:
        """Decide which pages an append fills, without a change.

        The tail of a sequence is the run of its blocks that get rows. Returns the pages of all
        tails, -1 for one to take; the bounds [n + 1] of the tails in it; and the copies to make,
        each a shared page and the place of its copy among the pages.
        """
        pages: list[int] = []
        bounds, copies = [0], []
        owners_left: dict[int, int] = {}
        for one, count in zip(found, counts, strict=True):
            first, filled = divmod(one.length, self.page_size)
            tail = [-1] * (self._blocks(one.length + count) - first if count else 0)
            if tail and filled:
                page = int(one.table[first])
                owners = owners_left.get(page, int(self._owners[page]))
                # A sharer takes a copy, unless all others have: then the page is its own.
                if owners > 1:
                    copies.append((page, len(pages)))
                    owners_left[page] = owners - 1
                else:
                    tail[0] = page
            pages += tail
            bounds.append(len(pages))
        return np.array(pages, np.int32), np.array(bounds), copies

    def _find(self, argument: str, number: Any) -> _Sequence:
        number = check_int(argument, number, low=0)
        if number in self._sequences:
            return self._sequences[number]
        freed = number < self._next_id
        rule = "that sequence was freed" if freed else "this cache never gave out that id"
        raise bad_value(argument, number, rule, "See .sequences for the live ones.")

    def _find_all(self, sequences: Any) -> list[_Sequence]:
        _check_list("sequences", sequences, "sequence ids")
        return [self._find(f"sequences[{i}]", one) for i, one in enumerate(sequences)]


def _check_positions(positions: Any) -> None:
    check_array("positions", positions)
    check_dtype("positions", positions, [np.int64, np.int32])


def _bad_position(position: int, sequence: int, length: int) -> ValueError:
    return bad_value(
        "positions",
        position,
        f"sequence {sequence} holds {length} tokens, so a token is one of [0, {length})",
        "Positions count from the start of the sequence; append before you select.",
    )


def _check_list(argument: str, value: Any, what: str) -> None:
    if isinstance(value, np.ndarray):
        check_shape(argument, value, ["n"])
    elif not isinstance(value, Sequence):
        raise bad_type(argument, repr(value), f"it must be a list of {what}", "Make it a list.")


def _check_lengths(lengths: Any, n: int) -> list[int]:
    """Return `lengths` as n ints >= 0, else raise."""
    _check_list("lengths", lengths, "row counts")
    if len(lengths) != n:
        raise bad_value(
            "lengths",
            f"{len(lengths)} entries",
            f"it must have one for each of the {n} sequences",
            "Pass 0 for a sequence that gets no rows.",
        )
    return [check_int(f"lengths[{i}]", one, low=0) for i, one in enumerate(lengths)]
