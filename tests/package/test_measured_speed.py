"""Pages with figures of a GPU say what benchmarks/results says: training steps, decoding, 4-bit training."""

import json
import pathlib
import re

import pytest
from markdown_tables import tables_of

from seal_ops.bench.training_sizes import SIZES

ROOT = pathlib.Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks/results"


def stored(name: str) -> dict:
    return json.loads((RESULTS / name).read_text())


PAGE = ROOT / "docs/benchmarks.md"


def steps_of(name: str) -> dict[int, dict]:
    """Rows of "auto" by their length."""
    return {r["length"]: r for r in stored(name)["rows"] if r["contestant"] == "auto" and r["status"] == "ok"}


def gib(peak) -> str:
    return f"{peak / 2**30:.1f}"


def fraction(value: float) -> str:
    return f"{value:.2f}".removeprefix("0")


def time_of(seconds: float) -> str:
    return f"{seconds:.2f}" if seconds < 10 else f"{seconds:.1f}" if seconds < 100 else f"{seconds:,.0f}"


def test_training_steps_beside_peers():
    rows = [r for r in stored("training-h200-92b295e.json")["rows"] if r["length"] == 31_744]
    found = tables_of(PAGE)[("31k tokens", "seconds a step", "peak, GiB", "utilisation")]
    assert found == [
        (r["label"], time_of(r["seconds"]), gib(r["peak_bytes"]), fraction(r["utilisation"])) for r in rows
    ]
    everything = rows[0]["keeps"].split(", ")[1].removesuffix(" x everything")
    assert f"{everything} of {rows[0]['layers']} layers keep everything" in PAGE.read_text()
    seconds = {r["contestant"]: r["seconds"] for r in rows}
    for peer, words in (("ia3-tuned", "as PEFT by hand"), ("ia3", "as PEFT as written")):
        ratio = f"{seconds[peer] / seconds['auto']:.2f} times {'as fast ' if peer != 'ia3' else ''}{words}"
        assert ratio in PAGE.read_text()


def several_cards(processes: int) -> dict:
    return stored(f"sequence-parallel-{processes}-h200-a22c778.json")


def kept(run: dict) -> str:
    """What the layers of a run of `benchmarks/sequence_parallel.py` kept, as the training suite writes it."""
    if run["gradient_checkpointing"] == "selective":
        return f"{run['layers']} × attention"
    plan = run["plan"]
    counts = ", ".join(f"{count} × {name}" for name, count in plan["layers"].items())
    return f"{counts}, tiles of {plan['tile']} tokens"


def training_rows():
    """Every step of a plan, and the one of four cards."""

    def cells(row: dict) -> tuple:
        peaks = gib(row["peak_bytes"]), gib(row["expected_peak"])
        return time_of(row["seconds"]), *peaks, fraction(row["utilisation"])

    plan, rows = lambda row: row["keeps"].replace(" x ", " × "), []
    for row in stored("training-fp8-h200-a22c778.json")["rows"]:
        setting = {"auto": "auto", "auto-fp8": "auto, linear layers in fp8"}[row["contestant"]]
        rows.append(("31k", "1", setting, plan(row), *cells(row), "a22c778"))
    for name in ("training", "training-long"):
        ((length, row),) = steps_of(f"{name}-h200-f78eab2.json").items()
        rows.append((f"{length // 1024}k", "1", "auto", plan(row), *cells(row), "f78eab2"))
    for count in (1, 4):
        run = several_cards(count)
        planned = gib(run["plan"]["expected_peak"]) if count == 1 else ""
        how = {1: "auto, `seal_ops.train`", 4: "selective, Ulysses"}[count]
        measured = time_of(run["seconds_a_step"]), gib(run["peak_bytes"]), planned, fraction(run["utilisation"])
        rows.append((f"{run['length'] // 1024}k", str(count), how, kept(run), *measured, "a22c778"))
    for length, row in steps_of("training-long-h200-a22c778.json").items():
        name = f"{length // 1024}k" if not row["extrapolated"] else f"1M, {row['layers_run']} of {row['layers']} layers"
        rows.append((name, "1", "auto", plan(row), *cells(row), "a22c778"))
    head = ("tokens", "cards", "setting", "layers keep", "seconds a step", "peak, GiB a card", "planned, GiB")
    return (*head, "utilisation", "run"), rows


def test_training_steps_by_length():
    head, rows = training_rows()
    assert tables_of(PAGE)[head] == rows


def test_training_steps_in_words():
    page, training = (" ".join((ROOT / f"docs/{name}.md").read_text().split()) for name in ("benchmarks", "training"))
    (short,) = (r for r in stored("training-h200-92b295e.json")["rows"][:1])
    long, longer = (steps_of(f"{n}-h200-f78eab2.json").popitem()[1] for n in ("training", "training-long"))
    half, million = steps_of("training-long-h200-a22c778.json").values()
    gb = lambda row: [f"{row[key] / 1e9:.1f}" for key in ("expected_peak", "peak_bytes")]  # noqa: E731
    assert "{} GB were expected and {} measured".format(*gb(short)) in training
    assert "At 131,072 tokens {} were expected and {} measured".format(*gb(long)) in training
    for row in (longer, half):
        assert f"at {row['length']:,} " + "{} and {}".format(*gb(row)) in training
    assert f"and a step took {short['seconds']:.1f} s" in training
    seconds = (time_of(row["seconds"]) for row in (long, longer, half))
    assert "steps of {}, {} and {} s".format(*seconds) in training

    offloaded = int(half["keeps"].split(" x offloaded")[0])
    assert f"at 512k the inputs of {offloaded} layers wait in pinned host memory and every layer's" in page
    assert f"those of {offloaded} layers in pinned host memory" in training
    operations = SIZES["8b"].step_operations(million["length"], million["layers"])
    rate = stored("training-long-h200-a22c778.json")["environment"]["matmul_tflops"] * 1e12
    all_layers, honest = million["seconds_all_layers"], operations / (half["utilisation"] * rate)
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert f"512k tokens in {time_of(half['seconds'])} s a step" in readme
    assert f"four train on 256k in {time_of(several_cards(4)['seconds_a_step'])} s" in readme
    assert f"4 of the 32 layers took {million['seconds']:.0f} s, times eight {all_layers:,.0f}" in page
    assert (
        f"At the utilisation of 512k, {fraction(half['utilisation'])}, a step of 32 layers would take {honest:,.0f} s"
        in page
    )  # noqa: E501
    assert f"(target: at most {2400:,})" in page and honest <= 2400

    plain, eighth = stored("training-fp8-h200-a22c778.json")["rows"]
    error = eighth["gradient_error"]
    times = plain["seconds"] / eighth["seconds"]
    words = f"{time_of(plain['seconds'])} to {time_of(eighth['seconds'])} s, {times:.2f} times as fast"
    assert words in page and words in training and f"first gradients were {fraction(error)} away" in training
    assert f"relative error of its first gradients against 16 bits is {fraction(error)}" in page


def test_one_sequence_on_four_cards():
    page = " ".join(PAGE.read_text().split())
    one, four = several_cards(1), several_cards(4)
    for name in ("model", "layers", "length", "labels", "status"):
        assert one[name] == four[name]
    how = [run["gradient_checkpointing"] for run in (one, four)]
    assert (one["length"], how) == (262_144, ["auto", "selective"])
    alone, together = one["seconds_a_step"], four["seconds_a_step"]
    times = alone / together
    words = f"{together:.1f} s a step against {alone:.0f} on one card, {times:.2f} times as fast"
    assert words in page and times >= 3.3 and "target: 3.3" in page
    assert f"a peak of {gib(four['peak_bytes'])} GiB a card" in page
    # the same step where a share of the layers recomputes attention too
    length, layers, size = one["length"], one["layers"], SIZES["8b"]
    attention = 4 * size.hidden * length**2 / 2
    linear = 2 * (2 * size.hidden**2 + 2 * size.hidden * size.kv_heads * 128 + 3 * size.hidden * size.inner) * length
    selective = size.step_operations(length, layers) + layers * linear
    again = one["plan"]["layers"]["input"]
    more = 1 + again * attention / selective
    assert f"recomputes attention in {again} of {layers} layers, which is {more:.2f} times the operations" in page
    errors = [f"{run['gradient_error']:.3f}".removeprefix("0") for run in (one, four)]
    assert one["check_length"] == four["check_length"] == 8192
    assert (
        "the gradients at 8,192 tokens were compared" in page and "relative errors of {} and {}".format(*errors) in page
    )
    assert one["seconds"] == [one["seconds_of_first_step"]] and four["seconds"] != [four["seconds_of_first_step"]]


def test_the_recipe_from_end_to_end():
    run = stored("recipe-h200-483d201.json")
    assert (run["settings"]["sizes"], run["settings"]["samples"], run["settings"]["length"]) == ("7b", 50, 31_744)
    settings, whole, training = run["settings"], run["seconds"], run["seconds of training"]
    benchmarks, page = ((ROOT / f"docs/{name}.md").read_text() for name in ("benchmarks", "training"))
    assert f"{settings['samples']} samples of {settings['length']:,} tokens made" in benchmarks
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
