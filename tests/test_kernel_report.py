"""kernels_cu/README.md and the budgets at the heads of kernel files: what the tool would write
today, and what the simulator counts."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))

from kernel_report import budget, code, measure, page, results, streams, work
from kernel_report.measure import Case

from cumla.jit.occupancy import limits
from cumla.kernels import catalogue
from cumla.layouts import BF16, FP16, V4_FP8, V32_FP8

README = page.PAGE.read_text(encoding="utf-8")
WRITE = "python -m tools.kernel_report --write"


# ------------------------------------------------------------------------------ what is written


@pytest.mark.parametrize("one", budget.budgets(), ids=lambda one: one.path)
def test_budget_at_the_head(one: budget.Budget) -> None:
    text = one.read()
    assert text == one.put_into(text), f"{WRITE} budgets"


@pytest.mark.parametrize("name", page.FORMULAS)
def test_formulas_in_the_readme(name: str) -> None:
    assert page.part(README, name) == page.formulas(name).strip("\n"), f"{WRITE} budgets"


def test_budgets_name_what_binds() -> None:
    for one in budget.budgets():
        for _, spent in one.lines:
            assert getattr(spent, spent.binds) == max(vars(spent).values())
        assert one.comment().count("*") >= len(one.lines)


def test_16_bit_keys_are_bound_by_dram_up_to_64_rows() -> None:
    for kernel in ("dense", "sparse"):
        for (keys, _, rows, _), spent in budget.decode_budget(kernel).lines:
            if keys == "16-bit rows" and int(rows) <= 64:
                assert spent.binds == "DRAM"


def test_the_prose_has_the_numbers_of_the_tables() -> None:
    def of(kernel: str, *labels: str) -> budget.Cost:
        [found] = [
            spent for names, spent in budget.decode_budget(kernel).lines if names[:3] == labels
        ]
        return found

    def time(keys: str, gpu: str, rows: str) -> float:
        spent = of("sparse", keys, gpu, rows)
        return max(vars(spent).values())

    dense, fp8 = of("dense", "16-bit rows", "A100", "64"), of("sparse", "V32_FP8", "A100", "64")
    faster = [
        time("16-bit rows", gpu, "64") / time("V32_FP8", gpu, "64")
        for gpu in ("A100", "H100", "RTX 4090")
    ]
    small = [
        time(keys, "A100", "16") / time("16-bit rows", "A100", "16")
        for keys in ("V32_FP8", "V4_FP8")
    ]
    bound = [of("sparse", keys, "H100", "128").binds for keys in ("16-bit rows", "V32_FP8")]
    assert bound == ["shared", "shared"]
    text = " ".join(README.split())
    for said in (
        f"tensor cores busy for {100 * dense.tensor / dense.DRAM:.0f} % of that time",
        f"a token costs {small[0]:.2f} of a 16-bit one (V4_FP8: {small[1]:.2f})",
        f"an A100 needs {fp8.tensor / 64:.0f} cycles a token where DRAM needs {fp8.DRAM / 64:.0f}",
        f"needs {fp8.shared / 64:.0f} and binds",
        "by {:.2f} on an A100, {:.2f} on an H100, {:.2f} on an RTX 4090".format(*faster),
        f"16 of the {dense.shared / 64:.0f} wavefronts a token takes",
    ):
        assert said in text


def test_a_head_is_replaced_and_no_more() -> None:
    one = budget.decode_budget("dense")
    plain = "// What it does.\n#pragma once\n\n#pragma unroll\n"
    once = one.put_into(plain)
    assert once.startswith("// What it does.\n//\n// Budget: ")
    assert once.endswith("\n#pragma once\n\n#pragma unroll\n")
    assert one.put_into(once) == once
    assert max(map(len, once.splitlines())) <= 100
    with pytest.raises(ValueError, match="pragma"):
        one.put_into("// nothing\n")


def test_a_part_is_replaced_and_no_more() -> None:
    text = page.replaced(README, "tiles", "new")
    assert page.part(text, "tiles") == "new"
    assert page.part(text, "gpus") == page.part(README, "gpus")
    assert page.replaced(text, "tiles", page.part(README, "tiles")) == README
    with pytest.raises(ValueError, match="no part"):
        page.part(README, "nothing")


def test_the_readme_has_every_kernel() -> None:
    """Names only: what the figures are, the compiler decides."""
    text = page.part(README, "code")
    for target in code.TARGETS:
        assert target in text
        for instance in catalogue.programs(target):
            kernel, variant = code.short_name(instance.program.expression)
            rows = [row for row in text.splitlines() if f"| `{kernel}` |" in row]
            variants = [one for row in rows for one in row.split(" | ")[1].split("; ")]
            assert variant in variants, f"{kernel} {variant}: {WRITE} all"


def test_the_readme_marks_what_is_missed() -> None:
    rows = [row.strip("| ").split(" | ") for row in page.part(README, "figures").splitlines()[2:]]
    assert len(rows) == 13
    for name, target, value, mark in rows:
        met = float(value) <= float(target.removeprefix("<= "))
        assert mark == ("yes" if met else "**missed**"), name


# ------------------------------------------------------------------------------ what is counted

CASES = [
    Case("dense", BF16, 16, "sm_90a"),
    Case("dense", FP16, 48, "sm_80"),
    Case("dense", BF16, 64, "sm_80"),
    Case("dense", BF16, 48, "sm_89"),
    Case("sparse", BF16, 32, "sm_90a"),
    Case("sparse", V32_FP8, 16, "sm_80"),
    Case("sparse", V32_FP8, 64, "sm_90a"),
    Case("sparse", V32_FP8, 128, "sm_89"),
    Case("sparse", V4_FP8, 16, "sm_89"),
    Case("sparse", V4_FP8, 64, "sm_80"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_counters_of_decode(case: Case) -> None:
    counts = measure.measure(case, short=128, long=256)
    seen = counts.loop
    shared = limits(case.target).shared_bytes_per_block
    want = work.decode_work(case.kernel, case.layout, case.rows, shared)
    assert seen["tensor_flops"] == want.flops
    assert counts.whole["tensor_flops"] == counts.flops_needed
    assert seen["shared_wavefronts"] == pytest.approx(want.wavefronts, rel=0.02)
    assert seen["shared_wavefronts_least"] == pytest.approx(want.wavefronts, rel=0.02)
    assert seen["global_sectors"] == pytest.approx(want.sectors, rel=0.02)
    assert seen["dram_bytes"] == pytest.approx(want.dram_bytes, rel=0.02)
    assert counts.whole["dram_bytes"] == counts.dram_needed
    assert seen["warp_instructions"] == pytest.approx(want.instructions, rel=0.10)


@pytest.mark.parametrize("target", results.STREAM_TARGETS)
@pytest.mark.parametrize(("kernel", "of"), work.STREAM_INSTRUCTIONS)
def test_counters_of_streams(kernel: str, of: str, target: str) -> None:
    seen = streams.stream_counts(kernel, of, target)
    want = work.stream_work(kernel, of, target)
    assert seen["tensor_flops"] == seen["shared_wavefronts"] == 0
    assert seen["dram_bytes"] == pytest.approx(want.dram_bytes, rel=0.02)
    assert seen["global_sectors_least"] >= want.sectors - 1
    assert seen["warp_instructions"] == pytest.approx(want.instructions, rel=0.10)


@pytest.mark.parametrize("case", [CASES[0], CASES[5]], ids=str)
def test_the_readme_has_the_counters_of_today(case: Case) -> None:
    """Two rows of it; the others come the same way."""
    seen = measure.measure(case, short=128, long=256).loop
    tables = page.part(README, "counters").split("`decode_")[1:]
    [table] = [one for one in tables if one.startswith(f"{case.kernel}`, {case.layout.name}")]
    rows = [row.strip("| ").split(" | ") for row in table.splitlines() if row.startswith("| ")]
    [row] = [one for one in rows if one[0] == str(case.rows) and case.target in one[2]]
    for cell in row[3].split(", "):
        assert float(cell) == pytest.approx(seen["warp_instructions"], rel=0.10)
    assert row[4] == f"{seen['tensor_flops']:,.0f}"
    assert float(row[5]) == pytest.approx(seen["shared_wavefronts"], rel=0.02)
    assert float(row[7].replace(",", "")) == pytest.approx(seen["dram_bytes"], rel=0.02)


def test_results_are_kept(tmp_path: Path) -> None:
    case = CASES[0]
    made = results.Results()
    made.counts[case] = measure.measure(case, short=64, long=128)
    made.streams["merge", "2 results", "sm_80"] = {"dram_bytes": 1.5}
    made.code.append(code.Code("a.cuh", "cumla::a<1>", "sm_80", 8, 0, 0, 16, 32, 4, 128, 0.25))
    made.call_us = (31.5, 620.0)
    results.save(tmp_path / "kept.json", made)
    assert results.load(tmp_path / "kept.json") == made
