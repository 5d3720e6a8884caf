"""Exact quartiles per parcel of series that never are in memory together: radix selection on the bits of float32.

The bits of a float32 number, with the sign bit turned and those of negative numbers complemented, are an integer that
orders like the number (M. Herf, Radix tricks, 2001). Three passes over the data count its digits, most significant
first: after each, every order statistic that a quartile needs is known to lie in one bin, and the next pass counts the
next digit within those bins alone (radix selection; Alabi et al. 2012, ACM J. Exp. Algorithmics 17). After the last
pass the bin *is* the number::

    pass 1    sign, exponent, 2 bits of the fraction    one row of counts per parcel
    pass 2    the next 11 bits                          one row per bin that pass 1 found, at most 6 per parcel
    pass 3    the last 10 bits                          one row per bin that pass 2 found, at most 6 per parcel

Counts are integers, so their sum depends neither on who counted what nor on the order of summation. There is no error
to bound: quartiles are those of numpy's default method (linear interpolation) on the whole data.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from brainlm.errors import DataError

DIGIT_BITS = (11, 11, 10)
NUM_PASSES = len(DIGIT_BITS)
BLOCK_VALUES = 2**15  # counted at a time: temporaries stay in the processor's cache, however long the recording
SIGN = np.int32(-(2**31))


@dataclass(frozen=True)
class Pass:
    """What to count in one pass; small enough to be sent to every worker.

    Attributes
    ----------
    num_parcels : int
    num_rows : int
        Rows of counts.
    tables : tuple of ndarray, int32
        For each earlier pass, its bins (row times digits + digit) to rows of the next pass; -1 where nothing is sought.
    """

    num_parcels: int
    num_rows: int
    tables: tuple[NDArray[np.int32], ...] = ()

    @property
    def num_digits(self) -> int:
        return 1 << DIGIT_BITS[len(self.tables)]

    def empty_counts(self) -> NDArray[np.int64]:
        return np.zeros((self.num_rows, self.num_digits), dtype=np.int64)

    def add_counts(self, counts: NDArray[np.int64], series: NDArray[np.float32], parcels: NDArray[np.intp]) -> None:
        """Count some parcels of one recording.

        Parameters
        ----------
        counts : ndarray, shape (num_rows, num_digits)
            Added to in place.
        series : ndarray, shape (N, num_parcels), float32
            Not modified. Finite in `parcels`.
        parcels : ndarray of int
            The columns to count.
        """
        assert counts.shape == (self.num_rows, self.num_digits)
        assert series.shape[1] == self.num_parcels
        assert series.dtype == np.float32
        flat = counts.reshape(-1)
        for first in range(0, len(series), BLOCK_VALUES):
            rows = series[first : first + BLOCK_VALUES]
            num_columns = BLOCK_VALUES // len(rows)
            for column in range(0, parcels.size, num_columns):
                self._add_block(flat, rows, parcels[column : column + num_columns])

    def _add_block(self, flat: NDArray[np.int64], series: NDArray[np.float32], parcels: NDArray[np.intp]) -> None:
        # Parcel by parcel: the counts of one parcel fit the cache, those of all do not (2.5 times the speed).
        keys = ordered_keys(np.ascontiguousarray(series[:, parcels].T)).reshape(-1)
        rows = np.repeat(parcels, len(series))
        shift = 32
        for bits, table in zip(DIGIT_BITS, self.tables):
            shift -= bits
            rows = table.take(_bins(rows, keys, shift, bits)).astype(np.intp)
            sought = rows >= 0
            rows, keys = rows[sought], keys[sought]
        bits = DIGIT_BITS[len(self.tables)]
        np.add.at(flat, _bins(rows, keys, shift - bits, bits), 1)


class QuartileSearch:
    """The quartiles of every parcel, found in `NUM_PASSES` rounds of counting.

    ::

        search = QuartileSearch(num_parcels)
        for _ in range(NUM_PASSES):
            counts = search.next_pass.empty_counts()
            ...  # search.next_pass.add_counts(counts, series, parcels) for each recording, anywhere, in any order
            search.narrow(counts)
        num_values, quartiles = search.num_values, search.quartiles()
    """

    def __init__(self, num_parcels: int) -> None:
        self.next_pass = Pass(num_parcels, num_rows=num_parcels)
        self.num_values = np.zeros(num_parcels, dtype=np.int64)
        self._parcels = np.arange(0)  # C parcels that have values
        self._rows = self._ranks = np.zeros((0, 6), dtype=np.int64)  # (C, 6): where each order statistic is sought
        self._keys = np.zeros((0, 6), dtype=np.uint32)  # (C, 6): its digits so far
        self._expected: NDArray[np.int64] | None = None  # values per row of the next pass
        self._found = False

    def narrow(self, counts: NDArray[np.int64]) -> None:
        """Take the counts of all recordings, and go on to the next pass.

        Raises
        ------
        DataError
            If these are not the counts of the same data as in the pass before.
        """
        this = self.next_pass
        assert not self._found
        assert counts.shape == (this.num_rows, this.num_digits)
        below = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])  # values before each bin, through all rows
        starts = below[:: this.num_digits]
        if self._expected is None:
            self._start(np.diff(starts))
        elif not np.array_equal(np.diff(starts), self._expected):
            raise DataError(
                f"expected to find the same series in every pass over the train recordings, found other values in pass "
                f"{len(this.tables) + 1}: staged recordings were changed meanwhile. Let one program at a time prepare "
                f"this data set, and run it again"
            )
        position = starts[self._rows] + self._ranks
        bins = np.searchsorted(below, position, side="right") - 1
        self._ranks = position - below[bins]
        self._keys = self._keys * np.uint32(this.num_digits) + (bins % this.num_digits).astype(np.uint32)
        if len(this.tables) + 1 == NUM_PASSES:
            self._found = True
            return
        sought = np.unique(bins)
        table = np.full(counts.size, -1, dtype=np.int32)
        table[sought] = np.arange(sought.size)
        self._rows = np.searchsorted(sought, bins)
        self._expected = counts.reshape(-1)[sought]
        self.next_pass = Pass(this.num_parcels, sought.size, (*this.tables, table))

    def quartiles(self) -> NDArray[np.float64]:
        """Return shape (P, 3): the 25th, 50th and 75th percentile; NaN where a parcel has no values."""
        assert self._found, "quartiles are known after the last pass"
        values = values_of_keys(self._keys).astype(np.float64)
        low, high = values[:, :3], values[:, 3:]
        weight = self._quarters()[1] / 4.0
        step = high - low
        # From the nearer end, as numpy does it: the same rounding.
        between = np.where(weight < 0.5, low + step * weight, high - step * (1.0 - weight))
        quartiles = np.full((self.num_values.size, 3), np.nan)
        quartiles[self._parcels] = between + 0.0  # no negative zero
        return quartiles

    def _start(self, num_values: NDArray[np.int64]) -> None:
        self.num_values = num_values
        self._parcels = np.flatnonzero(num_values)
        low, _ = self._quarters()
        high = np.minimum(low + 1, num_values[self._parcels, None] - 1)
        self._ranks = np.concatenate([low, high], axis=1)
        self._rows = np.repeat(self._parcels[:, None], 6, axis=1)
        self._keys = np.zeros(self._rows.shape, dtype=np.uint32)

    def _quarters(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return rank below each quartile, and the distance from it in quarters of a rank, each of shape (C, 3)."""
        position = (self.num_values[self._parcels, None] - 1) * np.array([1, 2, 3])
        return position // 4, position % 4


def ordered_keys(values: NDArray[np.float32]) -> NDArray[np.uint32]:
    """Return integers that order like the finite `values`; -0 comes just before 0."""
    bits = values.view(np.int32)
    return (bits ^ ((bits >> 31) | SIGN)).view(np.uint32)


def values_of_keys(keys: NDArray[np.uint32]) -> NDArray[np.float32]:
    """Undo `ordered_keys`."""
    bits = keys.view(np.int32)
    return (bits ^ (~(bits >> 31) | SIGN)).view(np.float32)


def _bins(rows: NDArray[np.intp], keys: NDArray[np.uint32], shift: int, bits: int) -> NDArray[np.intp]:
    return (rows << bits) + ((keys >> shift) & ((1 << bits) - 1))
