"""docs/qeft.md says what was measured: the quality study of results/smollm2-4bit, and the run on an 8B shape."""

import json
import pathlib
import shutil

import pytest
from markdown_tables import not_said, tables_of

from seal_ops.evaluation.statistics import paired
from seal_ops.experiments.quantized_study.driver import summarise, write_summary
from seal_ops.experiments.quantized_study.plan import Plan, jobs
from seal_ops.training.recipe import columns_rate

ROOT = pathlib.Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs/qeft.md"
RESULTS = ROOT / "results/smollm2-4bit"
SIXTEEN_BITS = ROOT / "results/smollm2"  # the same cases: the first 40 of its 70
ROWS = {(r["method"], r["columns"], r["data"]): r for r in summarise(str(RESULTS))}
SPEED = json.loads((ROOT / "benchmarks/results/quantized-8b-h200-a295152.json").read_text())["cells"]
TRAINED = ("QLoRA, autocast", "QLoRA, bf16 adapters", "weak columns", "weak columns + SEAL-C", "SEAL-C")
SHAPES = ("8 x 2048", "1 x 8192", "1 x 31744")
GIB = 2**30


def of(value: float) -> str:
    return f"{value:.2f}".lstrip("0")


def p(value: float) -> str:
    return f"{value:.3f}".lstrip("0") if value >= 0.001 else f"{value:.0e}".replace("e-0", "e-")


def measured(job: str) -> dict:
    return json.loads((RESULTS / f"{job}.json").read_text())["measured"]


def perplexities(key: tuple) -> list[float]:
    """Of every draw, unrounded."""
    done = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*trained-*.json"))]
    mine = [j["measured"] for j in done if (j["method"], j["columns"], j["data"]) == key]
    return [found["perplexity"]["perplexity"] for found in mine]


def perplexity(*key) -> str:
    found = perplexities(key)
    return f"{sum(found) / len(found):.2f}"


def least_to_most(shown) -> str:
    shown = sorted(shown, key=float)
    return f"{shown[0]} to {shown[-1]}"


def spread(mean: float, low: float, high: float, draws: int, text) -> str:
    return text(mean) if draws == 1 or low == high else f"{text(mean)} ({text(low)} to {text(high)})"


# --------------------------------------------------------------------------------------------------------- the tables


def quality_table():
    rows = []
    for (method, columns, data), row in ROWS.items():
        draws = row["seeds"]
        cells = [spread(row["accuracy"][n], row["lowest"][n], row["highest"][n], draws, of) for n in ("2048", "8000")]
        found = perplexities((method, columns, data))
        assert len(found) == draws
        rows.append(
            (
                method.replace("columns", f"{columns} columns") if columns else method, data or "",
                f"{row['parameters']:,}" if data else "", str(draws),
                spread(sum(found) / draws, min(found), max(found), draws, lambda value: f"{value:.2f}"), *cells,
                row["rates"].replace("e-0", "e-"), f"{row['peak_memory'] / GIB:.2f}" if data else "",
            )
        )  # fmt: skip
    head = ("", "trained on", "trained numbers", "draws", "perplexity", "at 2,048", "at 8,000", "rate", "GiB")
    return head, rows


def speed_table():
    rows = []
    for method in TRAINED:
        cells = [SPEED[f"training: {method}, {shape}"] for shape in SHAPES]
        shown = [f"{c['seconds']:.3f}, {c['peak'] / GIB:.2f}" for c in cells]
        rows.append((method, f"{cells[0]['trained']:,}", *shown))
    return ("seconds a step, peak in GiB", "trained numbers", "8 × 2,048", "1 × 8,192", "1 × 31,744"), rows


@pytest.mark.parametrize("build", [quality_table, speed_table], ids=lambda build: build.__name__)
def test_table_says_what_was_measured(build):
    head, rows = build()
    found = tables_of(PAGE)
    assert head in found, f"no table {' | '.join(head)}"
    wrong = [f"{a} should be {b}" for a, b in zip(found[head], rows, strict=False) if a != b]
    assert found[head] == rows, "\n".join(wrong) or "rows are missing, or too many"


def test_summary_is_of_the_stored_jobs(tmp_path):
    shutil.copytree(RESULTS, tmp_path / "study", ignore=shutil.ignore_patterns("quantized.*"))
    for name in write_summary(str(tmp_path / "study")):
        assert (tmp_path / "study" / name).read_text() == (RESULTS / name).read_text()


# ---------------------------------------------------------------------------------------------------------- the prose


def job(method: str, data: str | None = None) -> str:
    return f"trained-{method}-{data}" if data else f"untrained-{method}"


def compared(first: str, second: str, length: int, draws=(0, 1, 2)):
    """Paired over the cases of the draws that both have."""
    one, other = ([s for d in draws for s in measured(f"{n}-{d}")["scores"][str(length)]] for n in (first, second))
    return paired(one, other)


def counts(test) -> str:
    return f"{test.better} better, {test.worse} worse, p = {p(test.p)}"


def low_rank_of_16_bits(length: int, draws=(0, 1, 2)) -> list[float]:
    """LoRA of rank 4 on the 16-bit model, on the cases of this study."""
    scores = []
    for draw in draws:
        base = json.loads((SIXTEEN_BITS / f"main-multikey-{draw}.json").read_text())["measured"]["base"]["scores"]
        mine = measured(f"untrained-16bits-{draw}")["scores"][str(length)]
        assert base[str(length)][: len(mine)] == mine, "these are other cases"
        found = json.loads((SIXTEEN_BITS / f"adapters-multikey-{draw}.json").read_text())["measured"]["LoRA"]
        scores += found["scores"][str(length)][: len(mine)]
    return scores


def rate_taken(columns: int, data: str) -> float:
    return json.loads((RESULTS / f"trained-columns-{columns}-{data}-0.json").read_text())["training"]["column_lr"]


def steps_shorter(method: str) -> str:
    found = []
    for shape in SHAPES:
        best = min(SPEED[f"training: {m}, {shape}"]["seconds"] for m in TRAINED[:2])
        found.append(round(100 * (1 - SPEED[f"training: {method}, {shape}"]["seconds"] / best)))
    return f"{min(found)} to {max(found)} %"


def through_the_model(piece: str) -> str:
    """Milliseconds of a piece in all 32 layers."""
    kinds = [cell for name, cell in SPEED.items() if name.startswith("pieces: ")]
    return f"{32 * sum(cell['per_layer'] * cell[piece] for cell in kinds):.0f}"


def quality():
    done, planned = len(list(RESULTS.glob("*trained-*.json"))), len(jobs(Plan(text="english_long.txt")))
    yield f"{done} of the study's {planned} jobs"
    nf4 = perplexity("NF4", 0, None)
    yield f"perplexity rises from {perplexity('16 bits', 0, None)} to {nf4}"
    before, after = (of(ROWS[m, 0, None]["accuracy"]["2048"]) for m in ("16 bits", "NF4"))
    yield f"accuracy at 2,048 tokens falls from {before} to {after}"
    yield f"(of 120 common cases {counts(compared(job('16bits'), job('NF4'), 2048))})"
    sizes = (8, 32, 128)
    untrained, retrieval = ({k: ROWS["columns", k, data] for k in sizes} for data in (None, "retrieval"))
    starts = [perplexity("columns", k, None) for k in sizes]
    yield "perplexity {}, {} and {} with 8, 32 and 128".format(*starts)
    yield f"{least_to_most(of(r['accuracy']['2048']) for r in untrained.values())} at 2,048 tokens"
    yield f"start at {starts[-1]} and QLoRA at {nf4}"
    qlora, scales = ROWS["QLoRA", 0, "retrieval"], ROWS["SEAL-C", 0, "retrieval"]
    yield (
        f"columns reach {least_to_most(of(r['accuracy']['8000']) for r in retrieval.values())} at 8,000 tokens, "
        f"QLoRA {of(qlora['accuracy']['8000'])}, SEAL-C {of(scales['accuracy']['8000'])}"
    )
    for k in sizes:
        yield f"{k}: {counts(compared(job('QLoRA', 'retrieval'), job(f'columns-{k}', 'retrieval'), 8000))}"
    theirs = [perplexity(method, 0, "retrieval") for method in ("QLoRA", "SEAL-C")]
    yield f"{least_to_most(perplexity('columns', k, 'retrieval') for k in sizes)}, against {' and '.join(theirs)}"
    test = compared(job("columns-8", "retrieval"), job("columns-128", "retrieval"), 8000)
    yield f"8 and 128 columns can't be told apart at 8,000 tokens ({test.better} better, {test.worse} worse)"
    at_2048 = [p(compared(job("QLoRA", "retrieval"), job(f"columns-{k}", "retrieval"), 2048).p) for k in sizes]
    yield "at 2,048 tokens p is {}, {} and {}".format(*at_2048)
    both = ROWS["columns + SEAL-C", 128, "retrieval"]
    test = compared(job("columns-128", "retrieval"), job("columns-and-SEAL-C-128", "retrieval"), 8000)
    both_there, alone_there = (of(row["accuracy"]["8000"]) for row in (both, retrieval[128]))
    yield f"{both_there} at 8,000, and the columns alone {alone_there} ({counts(test)})"
    together = perplexity("columns + SEAL-C", 128, "retrieval")
    yield f"perplexity is {together} against {perplexity('columns', 128, 'retrieval')}"
    yield f"128 columns reach {perplexity('columns', 128, 'text')} and QLoRA {perplexity('QLoRA', 0, 'text')}"
    windows = {
        name: measured(f"trained-{name}-text-0")["perplexity"]["window_nats"]
        for name in ("columns-128", "columns-8", "QLoRA")
    }
    lower = {n: sum(a < b for a, b in zip(w, windows["QLoRA"], strict=True)) for n, w in windows.items()}
    assert lower["columns-128"] == len(windows["QLoRA"]) == 40
    yield "in all 40 windows"
    yield f"8 columns, at a sixteenth of the numbers, {perplexity('columns', 8, 'text')}"
    yield f"lower in {lower['columns-8']} of 40 windows of the same draw"
    on_text = (of(row["accuracy"][n]) for row in ROWS.values() if row["data"] == "text" for n in ("2048", "8000"))
    yield f"Accuracy on retrieval is then {least_to_most(on_text)}"
    for length, shown in ((2048, "2,048"), (8000, "8,000")):
        found = low_rank_of_16_bits(length)
        yield f"{of(sum(found) / len(found))} at {shown}"
    least = min(
        paired(low_rank_of_16_bits(n), [s for d in (0, 1, 2) for s in measured(f"{name}-{d}")["scores"][str(n)]]).p
        for n in (2048, 8000) for name in (job(f"columns-{k}", "retrieval") for k in (8, 32, 128))
    )  # fmt: skip
    yield f"(each p ≥ {p(least)})"
    peaks = least_to_most(f"{r['peak_memory'] / GIB:.2f}" for r in retrieval.values())
    yield f"peaks at {peaks} GiB, QLoRA's at {qlora['peak_memory'] / GIB:.2f}"
    at_the_edge = [job("QLoRA", "text"), job("QLoRA", "retrieval"), job("SEAL-C", "retrieval")]
    for name in (*at_the_edge, *(job(f"columns-{k}", "text") for k in sizes)):
        training = json.loads((RESULTS / f"{name}-0.json").read_text())["training"]
        tried = [next(iter(json.loads(rate).values())) for rate in training["tried"]]
        assert max(tried) == training.get("column_lr", training.get("lr")), name
    factors = [
        {round(rate_taken(k, data) / columns_rate(k)) for k in sizes} for data in ("retrieval", "text")
    ]  # fmt: skip
    assert [len(found) for found in factors] == [1, 1]
    yield "({} times on retrieval, {} times on text)".format(*(found.pop() for found in factors))
    yield "QLoRA, SEAL-C and the columns on text took the highest rate that was tried"


def speed():
    yield f"A step is {steps_shorter('weak columns')} shorter than the faster QLoRA's"
    yield f"whose attention is the fused one, {steps_shorter('weak columns + SEAL-C')}."
    yield (
        "the base's products {} ms, writing the weights out {}, picking the columns of `x` {}, the skinny products {} "
        "forward and {} backward, the columns' gradient {}, the addition into the input's gradient {}."
    ).format(
        *map(
            through_the_model,
            (
                "base's product", "base written out", "gather of x", "skinny product, forward",
                "skinny product, backward", "gradient of the columns", "index_add",
            ),
        )
    )  # fmt: skip
    choosing, starting, squares = (SPEED[f"calibration: {n}"] for n in ("choose", "residual", "least_squares"))
    size = [f"{c['peak'] / c['model_bytes']:.2f} times" for c in (choosing, starting)]
    yield f"takes {choosing['seconds']:.1f} s at {size[0]} the model's own memory"
    yield f"starting from the residual {starting['seconds']:.1f} s at {size[1]}"
    yield f"from least squares {squares['seconds']:.1f} s"


def readme():
    columns, qlora = ROWS["columns", 128, "retrieval"], ROWS["QLoRA", 0, "retrieval"]
    yield f"answer {of(columns['accuracy']['8000'])} of the 8-key questions at 8,000 tokens"
    yield f"8,000 tokens, at perplexity {columns['perplexity']:.1f};"
    yield f"QLoRA answers {of(qlora['accuracy']['8000'])}, at {qlora['perplexity']:.1f} (three draws, 120 cases)"
    yield f"a step is {steps_shorter('weak columns')} shorter"


@pytest.mark.parametrize("page, build", [(PAGE, quality), (PAGE, speed), (ROOT / "README.md", readme)])
def test_sentence_says_what_was_measured(page, build):
    wrong = not_said(page, build())
    assert not wrong, f"{page.name} does not say: " + " | ".join(wrong)
