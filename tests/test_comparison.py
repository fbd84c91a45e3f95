"""The comparison catches what it is there to catch, and the poison helpers poison."""

from __future__ import annotations

import dataclasses
import math

import comparison
import ml_dtypes
import numpy as np
import pytest
from comparison import DENSE_OUT, Tolerance, assert_close
from numpy.typing import DTypeLike
from poison import ABSURD_ID, poison, scattered, with_page_stride

from cumla import layouts
from cumla.checks import ArgumentError, ArgumentTypeError
from cumla.cli.comparison import compare

BF16 = np.dtype(ml_dtypes.bfloat16)
FP8 = np.dtype(ml_dtypes.float8_e4m3fn)


def reference() -> np.ndarray:
    """float64 [3, 4, 5], about 0.03 in size as attention outputs are, with all three oddities."""
    values = np.random.default_rng(1).standard_normal((3, 4, 5)) * 0.03
    values[0, 1, 2], values[1, 0, 0], values[2, 3, 4] = np.inf, -np.inf, np.nan
    return values


def changed(**at: float) -> np.ndarray:
    """The reference as float32 with elements replaced; a key is "i" and a coordinate's digits."""
    values = reference().astype(np.float32)
    for key, value in at.items():
        values[tuple(int(digit) for digit in key[1:])] = value
    return values


def rejects(result: np.ndarray, *needles: str, wanted: np.ndarray | None = None) -> None:
    with pytest.raises(AssertionError) as caught:
        assert_close(
            "out", result, reference() if wanted is None else wanted, DENSE_OUT, dtype=np.float32
        )
    for needle in ("out: NOT close", *needles):
        assert needle in str(caught.value)


def test_the_reference_itself_passes() -> None:
    assert_close("out", changed(), reference(), DENSE_OUT, dtype=np.float32)
    assert_close("out", reference().astype(BF16), reference(), DENSE_OUT, dtype=BF16)


def test_a_wrong_shape_is_caught() -> None:
    rejects(changed()[:, :, :4], "shape (3, 4, 4)", "(3, 4, 5)")
    # Shapes that would broadcast are no better.
    rejects(changed()[:1], "shape (1, 4, 5)")
    rejects(changed()[None], "shape (1, 3, 4, 5)")


def test_a_wrong_dtype_is_caught() -> None:
    rejects(changed().astype(np.float64), "dtype float64", "float32")
    rejects(changed().astype(BF16), "dtype bfloat16", "float32")


def test_a_moved_infinity_is_caught() -> None:
    rejects(changed(i012=0.0), "1 of 60", "(0, 1, 2)", "got 0.0", "reference inf")
    rejects(changed(i012=-np.inf), "(0, 1, 2)", "got -inf", "reference inf")
    rejects(changed(i100=np.inf), "(1, 0, 0)", "got inf", "reference -inf")
    rejects(changed(i012=0.0, i013=np.inf), "2 of 60")


def test_a_moved_nan_is_caught() -> None:
    rejects(changed(i234=0.0), "1 of 60", "(2, 3, 4)", "got 0.0", "reference nan")
    rejects(changed(i000=np.nan), "(0, 0, 0)", "got nan")
    rejects(changed(i012=np.nan), "(0, 1, 2)", "got nan", "reference inf")
    rejects(changed(i234=np.inf), "(2, 3, 4)", "got inf", "reference nan")


def test_an_all_zero_output_is_caught() -> None:
    rejects(np.where(np.isfinite(reference()), 0.0, changed()).astype(np.float32))
    # Even where every element is within the absolute tolerance: the cosine sees it.
    small = np.full((8, 8), 5e-4)
    zeros = np.zeros((8, 8), np.float32)
    rejects(zeros, "0 of 64 elements fail", "cosine difference 1 ", wanted=small)


def test_one_bad_element_is_caught_and_named() -> None:
    # Among 10,000 elements the cosine does not notice it.
    wanted = np.random.default_rng(2).standard_normal((100, 100)) * 0.03
    wanted[41, 7] = 0.03
    result = wanted.astype(np.float32)
    result[41, 7] += 2e-3
    found = compare("out", result, wanted, DENSE_OUT, dtype=np.float32)
    assert not found.passed
    assert found.cosine_difference < DENSE_OUT.cos
    assert found.max_abs_error == pytest.approx(2e-3, rel=1e-4)
    assert found.max_rel_error == pytest.approx(2e-3 / 0.030001, rel=1e-4)
    rejects(result, "1 of 10000", "(41, 7)", "got 0.03199", "reference 0.03,", wanted=wanted)


def test_the_worst_is_a_failing_element() -> None:
    wanted = np.array([1e-9, 0.5, 1.0, 100.0])
    # Element 0 has by far the largest relative error and passes by its absolute one.
    result = np.array([1e-4, 0.5, 1.1, 105.0], np.float32)
    rejects(result, "2 of 4", "worst at (2,)", wanted=wanted)


def test_a_small_scale_error_is_caught_by_the_cosine_alone() -> None:
    wanted = np.random.default_rng(3).standard_normal((64, 64))
    found = compare("out", (wanted * 1.005).astype(np.float32), wanted, DENSE_OUT, dtype=np.float32)
    assert not found.passed
    assert found.max_rel_error < DENSE_OUT.rel
    # (1 - s)^2 / (1 + s^2) for a scale error s.
    assert found.cosine_difference == pytest.approx(0.005**2 / (1 + 1.005**2), rel=1e-3)
    assert "0 of 4096" in found.message
    # The same size of error without a system is rounding, and passes.
    noise = wanted * (1 + 0.002 * np.random.default_rng(4).standard_normal(wanted.shape))
    assert_close("out", noise.astype(np.float32), wanted, DENSE_OUT, dtype=np.float32)


def test_an_element_passes_by_either_error() -> None:
    tolerance = Tolerance(abs=0.125, rel=0.25, cos=1.0)

    def passes(result: float, wanted: float) -> bool:
        arrays = np.array([result], np.float32), np.array([wanted])
        return compare("x", *arrays, tolerance, dtype=np.float32).passed

    assert passes(2.4375, 2.0)  # rel 0.22
    assert not passes(2.5, 2.0 - 1e-3)  # rel 0.2506, abs 0.5
    assert passes(0.109375, 0.0)  # abs below 0.125, rel enormous
    assert not passes(0.125, 0.0)  # not below it
    # The floor under the relative error: 1e-7 against 0 is 0.1, not infinite.
    assert compare(
        "x", np.array([1e-7]), np.zeros(1), Tolerance(1e-9, 0.2, 1.0), dtype=np.float64
    ).passed


def test_the_cosine_is_left_out_for_a_vanishing_reference() -> None:
    tiny = np.full(4, 4e-7)  # sum of squares 6.4e-13
    assert_close("x", np.zeros(4), tiny, DENSE_OUT, dtype=np.float64)
    rejects(np.zeros(4, np.float32), "cosine difference 1 ", wanted=np.full(4, 6e-7))


def test_empty_and_scalar_arrays() -> None:
    found = compare("x", np.zeros((0, 3)), np.zeros((0, 3)), DENSE_OUT, dtype=np.float64)
    assert found.passed
    assert found.max_abs_error == 0
    assert "no elements" in found.message
    assert_close("x", np.array(1.0), np.array(1.0), DENSE_OUT, dtype=np.float64)
    rejects(np.array(2.0, np.float32), "worst at ()", wanted=np.array(1.0))
    rejects(np.array(2.0, np.float32), "first at ()", wanted=np.array(np.nan))


def test_all_figures_are_nan_where_nothing_was_measured() -> None:
    found = compare("x", np.zeros(2), np.zeros(3), DENSE_OUT, dtype=np.float64)
    figures = found.max_abs_error, found.max_rel_error, found.cosine_difference
    assert all(math.isnan(one) for one in figures)


def test_bad_arguments() -> None:
    with pytest.raises(ArgumentTypeError, match="result"):
        compare("x", [1.0], np.zeros(1), DENSE_OUT, dtype=np.float64)  # type: ignore[arg-type]
    with pytest.raises(ArgumentTypeError, match="reference"):
        compare("x", np.zeros(1), 0.0, DENSE_OUT, dtype=np.float64)  # type: ignore[arg-type]
    for field in ("abs", "rel", "cos"):
        for value in (0.0, -1.0, math.inf, math.nan):
            with pytest.raises(ArgumentError, match=f"{field}: got"):
                dataclasses.replace(DENSE_OUT, **{field: value})


@pytest.mark.parametrize(
    ("name", "numbers"),
    [
        ("DENSE_OUT", (8e-4, 2.01 / 128, 5e-6)),
        ("SPARSE_OUT", (1e-3, 2.01 / 128, 5e-6)),
        ("PREFILL_OUT", (8e-4, 3.01 / 128, 7e-6)),
        ("MHA_OUT", (1e-3, 8.01 / 128, 7e-6)),
        ("LSE_DECODE", (1e-6, 8.01 / 65536, 1e-7)),
        ("LSE_PREFILL", (1e-6, 2.01 / 65536, 1e-7)),
        ("LSE_MHA", (1e-6, 2.01 / 65536, 1e-7)),
    ],
)
def test_nobody_loosens_a_tolerance(name: str, numbers: tuple[float, float, float]) -> None:
    assert dataclasses.astuple(getattr(comparison, name)) == numbers


# --- poison ---------------------------------------------------------------------------------------


def test_poison_by_dtype() -> None:
    for dtype in (np.float64, np.float32, np.float16, BF16):
        assert np.isnan(poison(np.zeros((3, 4), dtype)).astype(np.float64)).all()
    assert (poison(np.zeros((3, 4), np.int32)) == ABSURD_ID).all()
    for dtype in (np.uint8, np.int8, FP8):
        rows = poison(np.zeros((3, 4), dtype)).view(np.uint8)
        assert rows[:2].tolist() == [[0xFF, 0x7F, 0xFF, 0x7F], [0x7F, 0xFF, 0x7F, 0xFF]]
    view = np.zeros((4, 6), np.float32)
    poison(view[1::2, ::3])
    assert np.isnan(view).sum() == 4


@pytest.mark.parametrize("dtype", [np.float32, BF16, np.int32, np.uint8])
@pytest.mark.parametrize("shape", [(5,), (2, 5), (2, 3, 1, 7)])
def test_scattered_keeps_the_values_and_nothing_else(
    dtype: DTypeLike, shape: tuple[int, ...]
) -> None:
    values = np.arange(math.prod(shape)).reshape(shape).astype(dtype)
    view = scattered(values, pad=32)
    np.testing.assert_array_equal(view, values)
    assert view.dtype == values.dtype
    assert view.strides[-1] == values.itemsize
    assert view.flags.c_contiguous == (len(shape) == 1)
    # All of the memory behind it but the view is poison.
    memory = view.base
    assert isinstance(memory, np.ndarray)
    assert memory.shape == (*(size + 1 for size in shape[:-1]), shape[-1] + 32)
    expected = poison(np.empty(memory.shape, values.dtype))
    inside = [slice(1, None)] * (len(shape) - 1) + [slice(16, 16 + shape[-1])]
    expected[tuple(inside)] = values
    assert memory.tobytes() == expected.tobytes()


def test_scattered_strides_stay_multiples_of_16_bytes() -> None:
    view = scattered(np.zeros((2, 3, 1, 576), BF16))
    assert all(stride % 16 == 0 for stride in view.strides[:-1])


def test_with_page_stride() -> None:
    layout = layouts.V4_FP8
    pages = layout.empty_pages(3, 2)
    content = np.random.default_rng(5).integers(0, 256, (3, 1168), dtype=np.uint8)
    assert pages.strides[0] == 1728
    memory = np.lib.stride_tricks.as_strided(pages, (3, 1728), (1728, 1))
    memory[:, :1168] = content
    moved = with_page_stride(pages, 1168, 1184)
    assert moved.shape == pages.shape
    assert moved.strides == (1184, 584, 584, 1)
    memory = np.lib.stride_tricks.as_strided(moved, (3, 1184), (1184, 1))
    assert (memory[:, :1168] == content).all()
    assert np.isin(memory[:, 1168:], (0x7F, 0xFF)).all()
