"""Pages with figures of a GPU say what benchmarks/results says: training steps, decoding, 4-bit training."""

import json
import pathlib
import re

import pytest
from markdown_tables import tables_of

ROOT = pathlib.Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks/results"


def stored(name: str) -> dict:
    return json.loads((RESULTS / name).read_text())


def test_training_steps():
    rows = [r for r in stored("training-h200-92b295e.json")["rows"] if r["length"] == 31_744]
    (long,), (longer,) = (stored(f"{name}-h200-f78eab2.json")["rows"] for name in ("training", "training-long"))
    assert (long["length"], longer["length"]) == (131_072, 262_144)
    found = tables_of(ROOT / "docs/benchmarks.md")[("", "31k", "128k", "256k")]
    cell = {r["label"]: f"{r['seconds']:.3g}, {r['peak_bytes'] / 2**30:.1f}" for r in rows}
    cell = {label: text.replace("3.8,", "3.80,").replace("4.2,", "4.20,") for label, text in cell.items()}
    beyond = [f"{r['seconds']:.3g}, {r['peak_bytes'] / 2**30:.1f}" for r in (long, longer)]
    assert [tuple(row) for row in found] == [
        (label, cell[label], *(beyond if n == 0 else ("", ""))) for n, label in enumerate(cell)
    ]
    seconds = {r["contestant"]: r["seconds"] for r in rows}
    page = (ROOT / "docs/benchmarks.md").read_text()
    for peer, words in (("ia3-tuned", "as PEFT by hand"), ("ia3", "as PEFT as written")):
        assert f"{seconds[peer] / seconds['auto']:.2f} times {'as fast ' if peer != 'ia3' else ''}{words}" in page
    assert f"the utilisation is {100 * long['utilisation']:.0f} and {100 * longer['utilisation']:.0f} %" in page
    training = (ROOT / "docs/training.md").read_text()
    assert (
        f"{rows[0]['expected_peak'] / 1e9:.1f} GB were expected and {rows[0]['peak_bytes'] / 1e9:.1f} measured"
        in training
    )
    far = (
        [f"{r['expected_peak'] / 1e9:.1f}" for r in (long, longer)],
        [f"{r['peak_bytes'] / 1e9:.1f}" for r in (long, longer)],
    )
    assert f"{far[0][0]} were expected and {far[1][0]} measured, at 262,144 {far[0][1]} and {far[1][1]}" in training
    assert f"steps of {long['seconds']:.1f} and {longer['seconds']:.0f} s" in training


def test_the_recipe_from_end_to_end():
    run = stored("recipe-h200-483d201.json")
    assert (run["settings"]["sizes"], run["settings"]["samples"], run["settings"]["length"]) == ("7b", 50, 31_744)
    whole, training = run["seconds"], run["seconds of training"]
    benchmarks, page = ((ROOT / f"docs/{name}.md").read_text() for name in ("benchmarks", "training"))
    assert f"{whole:.0f} s, of which {training:.0f} are training, {run['seconds a step']:.2f} a step" in benchmarks
    assert f"on a 7B shape, {whole:.0f} s on one H200" in page


SHAPES = {
    "32/8 heads of 128": "llama-3.1-8b",
    "16/8 of 256": "gemma-2-9b",
    "64 of 64": "pythia-4096",
    "71/1 of 64": "falcon-7b",
}


def test_decoding():
    times: dict[tuple, dict[str, float]] = {}
    for row in stored("decode-h200-3204aa2.json")["rows"]:
        if row["status"] == "ok":
            key = row["model"], f"{int(row['seqlen']) // 1024}k × {row['batch']}"
            times.setdefault(key, {})[row["contestant"]] = float(row["ms"])
    found = tables_of(ROOT / "docs/kernel_notes_decode.md")[("keys × batch", *SHAPES)]
    for size, *cells in found:
        for cell, model in zip(cells, SHAPES.values(), strict=True):
            known = times.get((model, size))
            best = known and min(ms for name, ms in known.items() if name.startswith("decode-"))
            assert cell == ("" if known is None else f"{best / known['seal-cuda']:.2f}"), (size, model)
    taken = [k["seal-cuda"] / min(ms for name, ms in k.items() if name.startswith("decode-")) for k in times.values()]
    sentence = f"takes {min(taken):.2f} to {max(taken):.2f} times the time of the better of FlashAttention-3 and SDPA"
    assert f"{sentence} in {len(taken)} shapes" in " ".join((ROOT / "README.md").read_text().split())


def test_decoding_under_cache_hints():
    """The table of what the copies tell L2, against the log of the variants."""
    page, log = ROOT / "docs/kernel_notes_decode.md", (RESULTS / "decode-variants-h200-f78eab2.txt").read_text()
    sizes = ("1 × 128k", "8 × 32k", "32 × 32k", "8 × 128k")
    found = tables_of(page)[("what the copies say; bytes at a miss", *sizes)]
    first = log[: log.index("hd64:")]
    hints = {"nothing": 0, "evict_normal": 1, "evict_first": 2}
    for said, *cells in found:
        hint, _, promotion = said.partition("; ")
        number = hints.get(hint)
        name = "sdpa-cudnn" if number is None else f"(128, 64, 3, 1, 4, 2, {number}, {promotion[:3]})"
        name = {
            "(128, 64, 3, 1, 4, 2, 1, 128)": "(128, 64, 3, 1, 4, 2)",
            "(128, 64, 3, 1, 4, 2, 0, 128)": "(128, 64, 3, 1, 4, 2, 0)",
        }.get(name, name)
        (line,) = [row for row in first.splitlines() if row.strip().startswith(f"{name}  ")]
        times = {f"{b} × {k}": float(us) for b, k, us in re.findall(r"(\d+)x(\d+k): +([\d.]+) \(", line)}
        assert cells == [f"{times[size]:,.0f}" for size in sizes], said


def test_decoding_of_a_real_model():
    rows = stored("decoding-h200-24c0260.json")["rows"]
    head = ("tokens", "`generate`, 16,384 tokens a batch", "fixed cache", "CUDA graph")
    assert tables_of(ROOT / "docs/real_model.md")[head] == [
        (f"{r['tokens']:,}", *(f"{r[way]:.2f}" for way in ("generate", "fixed cache", "CUDA graph"))) for r in rows
    ]
    agree = sum(int(r["batched as alone"].split()[0]) for r in rows)
    assert f"in {agree} of {4 * len(rows)} prompts" in (ROOT / "docs/real_model.md").read_text()


def test_training_in_four_bits():
    cells = stored("quantized-8b-h200-24c0260.json")["cells"]
    found = tables_of(ROOT / "docs/qeft.md")[("seconds a step, peak in GiB", "8 × 2,048", "1 × 8,192")]
    for name, *said in found:
        method = name.removesuffix(", PyTorch's loss")
        rows = [cells[f"training: {method}, {size}"] for size in ("8 x 2048", "1 x 8192")]
        assert said == [f"{r['seconds']:.3f}, {r['peak'] / 2**30:.2f}" for r in rows]
    peak = {key: cell["peak"] for key, cell in cells.items() if "peak" in cell}
    page = (ROOT / "docs/qeft.md").read_text()
    for size in ("8 x 2048", "1 x 8192"):
        for method in ("weak columns", "SEAL-C"):
            share = peak[f"training: {method}, {size}"] / peak[f"training: QLoRA, bf16 adapters, {size}"]
            assert f"{share:.2f}".removeprefix("0") in page


def test_planned_training_in_four_bits():
    cells = stored("quantized-8b-h200-483d201.json")["cells"]
    sizes = ("8 x 2048", "1 x 8192", "1 x 31744")
    head = ("planned: seconds a step, peak in GiB", "8 × 2,048", "1 × 8,192", "1 × 31,744")
    of = lambda method: [cells[f"training: {method}, {size}"] for size in sizes]
    for name, *said in tables_of(ROOT / "docs/qeft.md")[head]:
        assert said == [f"{r['seconds']:.3f}, {r['peak'] / 2**30:.2f}" for r in of(name)]
    shares = [
        [f"{mine[what] / theirs[what]:.2f}".removeprefix("0") for mine, theirs in zip(of(planned), of(peer))]
        for planned, peer in (
            ("weak columns, planned", "QLoRA, autocast"),
            ("weak columns in bf16, planned", "QLoRA, bf16 adapters"),
        )
        for what in ("seconds", "peak")
    ]
    text = (ROOT / "docs/qeft.md").read_text()
    assert "step that is {}, {} and {}, of its peak {}, {} and {}".format(*shares[0], *shares[1]) in text
    assert "(in bf16 {}, {}, {} and {}, {}, {})".format(*shares[2], *shares[3]) in text


def test_serving():
    (row,) = stored("serving-h200-92b295e.json")["rows"]
    page, times = (ROOT / "docs/serving.md").read_text(), row["milliseconds a token"]
    assert f"{times['one']:.1f} ms with one adapter, {times['mixed']:.1f} ms with three mixed" in page
    assert f"{times['untouched']:.1f} ms without scales" in page


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.name)
def test_no_result_names_a_machine(path):
    content = path.read_text()
    assert "/root" not in content and "/home/" not in content and "/tmp/" not in content
