"""What a kernel writes beside a view of memory that `poison.scattered` made."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cumla.backends.simulated import SimulatedArray, SimulatedCall

Array = NDArray[Any]


def place_in(view: Array) -> int:
    """The bytes from the start of the memory to the view's first element."""
    assert view.base is not None
    return int(view.__array_interface__["data"][0] - view.base.__array_interface__["data"][0])


def written_with_gaps(call: SimulatedCall, view: Array) -> SimulatedArray:
    """As call.write, which brings only the view back, but with all the memory around it."""
    assert view.base is not None
    whole = SimulatedCall.write(call, view.base)
    offset = whole.offset + place_in(view)
    return SimulatedArray(whole.memory, offset, view.shape, view.strides, view.dtype)


def assert_gaps_untouched(view: Array) -> None:
    """All real numbers around the view are still NaN."""
    assert view.base is not None
    around = view.base.copy()
    np.ndarray(view.shape, view.dtype, around, place_in(view), view.strides)[...] = np.nan
    assert np.isnan(around).all()
