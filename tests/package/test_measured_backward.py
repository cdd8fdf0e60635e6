"""What docs/kernel_notes_backward.md, docs/benchmarks.md and the README say of backward v7 is what was timed."""

import json
import math
import pathlib

import pytest
from markdown_tables import not_said, tables_of

ROOT = pathlib.Path(__file__).resolve().parents[2]
STORED = json.loads((ROOT / "benchmarks/results/backward-drift-h200-aba5592.json").read_text())
# By the run and the build's name in it.
VARIANTS = {
    ("first", "fold"): "fold",
    ("first", "fold_lh"): "fold, light, heads",
    ("first", "drift"): "drift, fold",
    ("first", "drift3_lh"): "drift3",
    ("second", "donly_h"): "drift, heads",
    ("second", "dord_h"): "drift, order, heads",
    ("second", "donly_lh"): "landed",
}
SHAPES = {
    "hd128-32/32-1k": "32 × 1k, 32/32 of 128",
    "hd128-32/8-2k": "16 × 2k, 32/8 of 128",
    "hd128-32/32-4k": "8 × 4k, 32/32 of 128",
    "hd128-32/8-8k": "4 × 8k, 32/8 of 128",
    "hd128-64/8-8k": "2 × 8k, 64/8 of 128",
    "hd128-32/8-32k": "1 × 32k, 32/8 of 128",
    "hd64-64/64-4k": "8 × 4k, 64/64 of 64",
    "hd64-64/64-16k": "2 × 16k, 64/64 of 64",
    "hd256-16/16-8k": "4 × 8k, 16/16 of 256",
    "hd256-32/2-8k": "4 × 8k, 32/2 of 256",
}
HEAD_64 = ("hd64-64/64-4k", "hd64-64/64-16k")


def ms(run: str, shape: str, build: str = "landed") -> float:
    """`landed` is v6 in these files."""
    return float(STORED[run]["cases"][f"{shape} backward"]["ms"][build])


def ratio(run: str, build: str, shape: str) -> float:
    """v6's time by the build's in the same run."""
    return ms(run, shape) / ms(run, shape, build)


def mean(values) -> float:
    values = list(values)
    return math.exp(sum(map(math.log, values)) / len(values))


def of(run: str, build: str, start: str = "hd") -> list[float]:
    return [ratio(run, build, shape) for shape in SHAPES if shape.startswith(start)]


def beside(build: str, other: str) -> list[float]:
    """How many times faster a build of the second run is than another one of it."""
    return [ratio("second", build, shape) / ratio("second", other, shape) for shape in SHAPES]


def landed_span() -> str:
    found = of("second", "donly_lh")
    return f"{min(found):.2f} to {max(found):.2f} times as fast"


def table():
    rows = []
    for shape, name in SHAPES.items():
        both = " / ".join(f"{ms(run, shape):.3f}" for run in STORED)
        rows.append((name, both, *(f"{ratio(*variant, shape):.3f}" for variant in VARIANTS)))
    rows.append(("geometric mean", "", *(f"{mean(of(*variant)):.3f}" for variant in VARIANTS)))
    return ("batch × length, heads", "v6, ms", *VARIANTS.values()), rows


def sentences():
    yield f"What landed is {landed_span()} as v6, {mean(of('second', 'donly_lh')):.3f} in the geometric mean of the ten"
    narrow = [r for start in ("hd128", "hd64") for r in of("second", "donly_lh", start)]
    yield f"{mean(narrow):.3f} over the eight up to head_dim 128"
    wide = [ratio(*variant, shape) for variant in VARIANTS for shape in SHAPES if shape.startswith("hd256")]
    yield f"the same kernels in every build: {min(wide):.3f} to {max(wide):.3f}"
    again = [ms("second", shape) / ms("first", shape) for shape in SHAPES]
    yield f"Of its time in the first run v6 takes {min(again):.3f} to {max(again):.3f} in the second"
    lost = [100 * (1 - ratio("first", "fold", shape)) for shape in HEAD_64]
    yield f"`fold` loses {min(lost):.0f} to {max(lost):.0f} % at head_dim 64 and up to {100 * (1 - min(of('first', 'fold', 'hd128'))):.1f} % at 128"  # noqa: E501
    many = "hd128-64/8-8k"
    yield f"64/8 heads: {ratio('first', 'fold', many):.3f} → {ratio('first', 'fold_lh', many):.3f}"
    third, without = mean(of("first", "drift3_lh")), mean(of("first", "drift"))
    yield f"{third:.3f} with it, light and heads, {without:.3f} without all three"
    order = beside("dord_h", "donly_h")
    yield f"{100 * (mean(order) - 1):.1f} % in the mean ({100 * (1 - min(order)):.1f} % slower to {100 * (max(order) - 1):.1f} % faster)"  # noqa: E501
    light = [ratio("second", "donly_lh", shape) / ratio("second", "donly_h", shape) for shape in HEAD_64]
    yield f"{100 * (min(light) - 1):.1f} and {100 * (max(light) - 1):.1f} %"


def test_the_table_of_variants():
    head, rows = table()
    found = tables_of(ROOT / "docs/kernel_notes_backward.md")
    assert head in found and found[head] == rows, rows


def test_all_shapes_and_no_errors():
    for run in STORED.values():
        assert list(run["cases"]) == [f"{shape} backward" for shape in SHAPES]
        assert not any(case["errors"] for case in run["cases"].values())


@pytest.mark.parametrize("name", ["docs/kernel_notes_backward.md", "docs/benchmarks.md", "README.md"])
def test_sentences(name):
    said = sentences() if name.endswith("backward.md") else [landed_span()]
    wrong = not_said(ROOT / name, said)
    assert not wrong, f"{name} does not say: " + " | ".join(wrong)
