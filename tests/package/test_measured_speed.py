"""Pages with figures of a GPU say what benchmarks/results says: training steps, decoding, 4-bit training."""

import json
import pathlib

import pytest
from markdown_tables import tables_of

ROOT = pathlib.Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks/results"


def stored(name: str) -> dict:
    return json.loads((RESULTS / name).read_text())


def test_training_steps():
    rows = [r for r in stored("training-h200-92b295e.json")["rows"] if r["length"] == 31_744]
    long = [r for r in stored("training-h200-24c0260.json")["rows"] if r["length"] == 131_072]
    found = tables_of(ROOT / "docs/benchmarks.md")[("", "31k", "128k")]
    cell = {r["label"]: f"{r['seconds']:.3g}, {r['peak_bytes'] / 2**30:.1f}" for r in rows}
    cell = {label: text.replace("3.8,", "3.80,").replace("4.2,", "4.20,") for label, text in cell.items()}
    assert [row[:2] for row in found] == [(label, cell[label]) for label in cell]
    (auto,) = long
    assert [row[2] for row in found] == [f"{auto['seconds']:.1f}, {auto['peak_bytes'] / 2**30:.1f}", "", "", "", ""]
    seconds = {r["contestant"]: r["seconds"] for r in rows}
    page = (ROOT / "docs/benchmarks.md").read_text()
    for peer, words in (("ia3-tuned", "as PEFT by hand"), ("ia3", "as PEFT as written")):
        assert f"{seconds[peer] / seconds['auto']:.2f} times {'as fast ' if peer != 'ia3' else ''}{words}" in page
    training = (ROOT / "docs/training.md").read_text()
    for row in (rows[0], auto):
        assert f"{row['expected_peak'] / 1e9:.1f}" in training and f"{row['peak_bytes'] / 1e9:.1f} measured" in training


SHAPES = {
    "32/8 heads of 128": "llama-3.1-8b",
    "16/8 of 256": "gemma-2-9b",
    "64 of 64": "pythia-4096",
    "71/1 of 64": "falcon-7b",
}


def test_decoding():
    times: dict[tuple, dict[str, float]] = {}
    for row in stored("decode-h200-92b295e.json")["rows"]:
        if row["status"] == "ok":
            key = row["model"], f"{int(row['seqlen']) // 1024}k × {row['batch']}"
            times.setdefault(key, {})[row["contestant"]] = float(row["ms"])
    found = tables_of(ROOT / "docs/kernel_notes_decode.md")[("keys × batch", *SHAPES)]
    for size, *cells in found:
        for cell, model in zip(cells, SHAPES.values(), strict=True):
            known = times.get((model, size))
            best = known and min(ms for name, ms in known.items() if name.startswith("decode-"))
            assert cell == ("" if known is None else f"{best / known['seal-cuda']:.2f}"), (size, model)


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


def test_serving():
    (row,) = stored("serving-h200-92b295e.json")["rows"]
    page, times = (ROOT / "docs/serving.md").read_text(), row["milliseconds a token"]
    assert f"{times['one']:.1f} ms with one adapter, {times['mixed']:.1f} ms with three mixed" in page
    assert f"{times['untouched']:.1f} ms without scales" in page


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.name)
def test_no_result_names_a_machine(path):
    content = path.read_text()
    assert "/root" not in content and "/home/" not in content and "/tmp/" not in content
