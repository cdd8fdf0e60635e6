"""docs/context_extension.md says what results/smollm2-context, -cpu and times of masks say: tables, tests, prose."""

import itertools
import json

import pytest
from context_results import (
    BASE,
    LENGTHS,
    PAGE,
    ROOT,
    SCALED,
    SHOWN,
    STUDY,
    TEXT,
    WINDOW,
    accuracy,
    compared,
    named,
    of,
    right_by_distance,
    variants_of,
    with_spread,
)
from markdown_tables import tables_of

from seal_ops.evaluation.statistics import holm
from seal_ops.experiments.context_study.plan import SECTIONS, Plan
from seal_ops.experiments.context_study.plan import jobs as planned

RESULTS = ROOT / "results/smollm2-context-cpu"
METHODS = (
    "none", "linear", "ntk", "dynamic_ntk", "yarn", "self_extend", "dual_chunk", "lm_infinite", "streaming",
)  # fmt: skip


def measured() -> dict:
    """Perplexity and options by method and length: of `seal extend`'s files, and of the study's jobs."""
    found = {}
    for path in sorted(RESULTS.glob("*.json")):
        content = json.loads(path.read_text())
        rows = content.get("rows", [content] if path.name.startswith(SECTIONS) else [])
        for row in rows:
            for length, value in row["perplexity"].items():
                value = value["perplexity"] if isinstance(value, dict) else value
                found[row["method"], int(length)] = value, row["options"]
    return found


def table():
    found = measured()
    lengths = sorted({length for _, length in found})
    rows = []
    for method in METHODS:
        cells = [found.get((method, n)) for n in lengths]
        options = {json.dumps(cell[1]) for cell in cells if cell is not None}
        said = {f"{k} {v:g}" for one in options for k, v in json.loads(one).items() if not k.startswith("beta")}
        rows.append(
            (
                "plain" if method == "none" else f"`{method}`", ", ".join(sorted(said)),
                *("" if cell is None else f"{cell[0]:.2f}" for cell in cells),
            )
        )  # fmt: skip
    return ("perplexity", "options", *(f"{n:,}" for n in lengths)), rows


def test_the_table_says_what_was_measured():
    head, rows = table()
    found = tables_of(PAGE)
    assert head in found, f"no table {' | '.join(head)}"
    wrong = [f"{a} should be {b}" for a, b in zip(found[head], rows) if a != b]
    assert found[head] == rows, "\n".join(wrong) or "rows are missing, or too many"


def test_what_the_page_says_of_the_plain_model_holds():
    """Where nothing lies beyond the trained length these methods read as the plain model does."""
    found = measured()
    for method in ("dual_chunk", "streaming"):
        for length in (2048, 8192):
            plain, extended = found["none", length][0], found[method, length][0]
            assert abs(plain - extended) <= 1e-4 * plain, (method, length)


def test_the_table_of_a_gpu_says_what_was_measured():
    found = {}
    for path in STUDY.glob("perplexity-*-*.json"):
        content = json.loads(path.read_text())
        name = f"`{content['method']}`, for {content['reach']:,}" if content["method"] != "none" else "plain"
        found[name] = {int(n): f"{value['perplexity']:.2f}" for n, value in content["perplexity"].items()}
    lengths = sorted({n for cells in found.values() for n in cells})
    head = ("perplexity on an H200", *(f"{n:,}" for n in lengths))
    said = tables_of(PAGE)[head]
    assert {row[0] for row in said} == set(found) and len(said) == 14
    for name, *cells in said:
        assert cells == [found[name].get(n, "") for n in lengths], name


def retrieval_rows(task: str) -> dict[str, tuple]:
    cell = lambda name, n: with_spread(BASE[task, name, n]) if (task, name, n) in BASE else ""
    return {name: tuple(cell(name, n) for n in LENGTHS) for name in variants_of(BASE)}


@pytest.mark.parametrize("task", ("multikey", "passkey"))
def test_the_table_of_retrieval_says_what_was_measured(task):
    assert all(
        len(draws) == 3 and {len(scores) for scores in draws} == {20} for draws in (*BASE.values(), *SCALED.values())
    )
    said, wanted = tables_of(PAGE)[(task, *SHOWN)], retrieval_rows(task)
    assert len(said) == len(wanted) == 14 and {row[0] for row in said} == set(wanted)
    for name, *cells in said:
        assert tuple(cells) == wanted[name], name


def test_draws_hold_the_same_cases():
    """Paired tests ask for it; of each cell the files keep the first three questions' answers."""
    first: dict[tuple, list[str]] = {}
    for path in [p for s in ("retrieval", "scaled") for p in STUDY.glob(f"{s}-*.json")]:
        job = json.loads(path.read_text())
        for task, measured in job["measured"].items():
            for length, shown in measured["outputs"].items():
                answers = [one["answer"] for one in shown]
                assert len(answers) == 3
                assert first.setdefault((task, length, job["seed"]), answers) == answers, path.name


def test_the_table_to_choose_from_says_what_was_measured():
    """The column of multikey: set up for the length, or for the next longer one where that is the only set-up."""
    (head,) = [head for head in tables_of(PAGE) if head[0] == "method" and "options" in head]
    column = next(i for i, name in enumerate(head) if name.startswith("multikey"))
    found = {row[0].strip("`"): row[column] for row in tables_of(PAGE)[head]}
    for method, said in found.items():
        shares = []
        for n in (16384, 32768):
            draws = [BASE.get(("multikey", named(method, reach), n)) for reach in (n, 32768)]
            shares += [of(accuracy(next(d for d in draws if d)))] if any(draws) else []
        scales = [SCALED.get(("multikey", named(method, reach), 16384)) for reach in (16384, 32768)]
        scales = next((draws for draws in scales if draws), None)
        wanted = ", ".join(shares) + (f"; {of(accuracy(scales))}" if scales else "")
        assert said == wanted, method
    assert [method for method, said in found.items() if not said] == ["giraffe", "minference"]


def decided() -> dict[tuple, float]:
    """Adjusted p of all pairs of variants at the two longer lengths, the better one first."""
    tests = {}
    for task, n in itertools.product(("multikey", "passkey"), LENGTHS[3:]):
        names = [name for name in variants_of(BASE) if (task, name, n) in BASE]
        for a, b in itertools.combinations(names, 2):
            test = compared(BASE[task, a, n], BASE[task, b, n])
            tests[(task, n, b, a) if test.better > test.worse else (task, n, a, b)] = test.p
    return dict(zip(tests, holm(list(tests.values()))))


def test_what_the_page_says_is_decided_holds():
    p = decided()
    assert f"{len(p)} pairs" in TEXT
    beaten = lambda task, n, name: {b for t, m, a, b in p if (t, m, a) == (task, n, name) and p[t, m, a, b] < 0.05}
    nothing = {"plain", "`linear`, for 16,384", "`linear`, for 32,768"}
    answering = set(variants_of(BASE)) - nothing
    won = {name for name in answering if beaten("multikey", 16384, name)}
    assert all(beaten("multikey", 16384, name) == nothing for name in won)
    assert answering - won == {"`ntk`, for 16,384"}  # the exception that the page names
    nothing = {"plain", "`linear`, for 32,768", "`ntk`, for 32,768", "`dynamic_ntk`, for 32,768"}
    for method in ("self_extend", "yarn", "dual_chunk"):
        assert beaten("multikey", 32768, f"`{method}`, for 32,768") == nothing
    for method in ("lm_infinite", "streaming"):
        assert not beaten("multikey", 32768, f"`{method}`, for 32,768")
    assert not any(beaten("passkey", 32768, name) for name in variants_of(BASE))
    ahead = {name for name in variants_of(BASE) if beaten("passkey", 16384, name)}
    assert ahead == {"`dynamic_ntk`, for 32,768", "`ntk`, for 32,768"}
    assert all("plain" in beaten("passkey", 16384, name) for name in ahead)
    same = [accuracy(BASE["passkey", named(m, 32768), 2048]) for m in ("dual_chunk", "lm_infinite", "streaming")]
    words = "{} became {} to {}".format(*map(of, (accuracy(BASE["passkey", "plain", 2048]), min(same), max(same))))
    assert words in TEXT


def test_the_table_of_masks_says_what_was_measured():
    """Forward and backward: pairs and time as shares of full causal attention's, FlexAttention by our CUDA kernels."""
    times: dict[tuple, dict[str, float]] = {}
    pairs: dict[tuple, float] = {}
    for row in json.loads((ROOT / "benchmarks/results/masks-h200-a22c778.json").read_text())["rows"]:
        if row["status"] == "ok":
            mine = times.setdefault((row["model"].removeprefix("llama-3.1-8b"), int(row["seqlen"])), {})
            mine[row["contestant"]] = mine.get(row["contestant"], 0) + float(row["ms"])
            if (row["contestant"], row["direction"]) == ("seal-cuda", "forward"):  # the operations that were counted
                pairs[row["model"].removeprefix("llama-3.1-8b"), int(row["seqlen"])] = row["ms"] * row["tflops"]
    head = (
        "mask",
        "tokens",
        "pairs",
        "CUDA",
        "Triton",
        "FlexAttention",
        "its mask made in the call",
        "on FlashAttention-4",
    )
    wanted = []
    for name, suite in (("shifted groups of a quarter", "-s2"), ("streaming(4, 4096)", "-streaming")):
        for n in (32768, 131072):
            mine, full = times[suite, n], times["", n]
            shares = [pairs[suite, n] / pairs["", n]]
            shares += [mine[f"seal-{backend}"] / full[f"seal-{backend}"] for backend in ("cuda", "triton")]
            flex = [mine[peer] / mine["seal-cuda"] for peer in ("flex", "flex-mask", "flex-fa4")]
            wanted.append(
                (name, f"{n:,}", *(f"{s:.3f}".removeprefix("0") for s in shares), *(f"{f:.2f}" for f in flex))
            )
    assert [tuple(row) for row in tables_of(PAGE)[head]] == wanted
    over = {key: (pairs[key] / pairs["", key[1]], key) for key in pairs if key[0]}
    more = lambda backend: [times[k][backend] / times["", k[1]][backend] / share - 1 for share, k in over.values()]
    assert max(more("seal-cuda")) < 0.08
    streaming = [f"{100 * m:.0f}" for m, k in zip(more("seal-triton"), over) if k[0] == "-streaming"]
    assert f"takes {' and '.join(streaming)} % more" in TEXT


def test_the_table_of_fine_tuning_says_what_was_measured():
    head = ("", "rate", "at 8,192", "at its length", "of full attention's gain there", "s")
    wanted = []
    for length in ("16384", "32768"):
        jobs = {}
        for path in sorted(STUDY.glob(f"tuned-*-{length}.json")):
            content = json.loads(path.read_text())
            jobs[content["recipe"]] = content
        full = jobs["full_attention"]
        at = lambda which, job=full: [f"{job[which][n]['perplexity']:.2f}" for n in ("8192", length)]
        gain = lambda job: job["extended"][length]["perplexity"] - job["perplexity"][length]["perplexity"]
        wanted.append((f"for {int(length):,}: plain", "", *at("untrained"), "", ""))
        wanted.append(("extended", "", *at("extended"), "", ""))
        for recipe, job in jobs.items():
            name = "full attention" if recipe == "full_attention" else f"`{recipe}`"
            rate, share = f"{job['training']['lr']:.0e}".replace("e-0", "e-"), f"{100 * gain(job) / gain(full):.0f} %"
            wanted.append((name, rate, *at("perplexity", job), share, f"{job['training']['seconds']:.0f}"))
    assert [tuple(row) for row in tables_of(PAGE)[head]] == wanted


def test_what_the_page_says_of_fine_tuning_holds():
    jobs = [json.loads(path.read_text()) for path in STUDY.glob("tuned-*.json")]
    assert len(jobs) == 6
    at = lambda job, which, n: job[which][str(n)]["perplexity"]
    gain = {(j["recipe"], n): at(j, "extended", n) - at(j, "perplexity", n) for j in jobs for n in [j["length"]]}
    shares = [gain[key] / gain["full_attention", key[1]] for key in gain if key[0] != "full_attention"]
    assert f"full attention wins, {100 * min(shares):.0f} to {100 * max(shares):.0f} % of it" in TEXT
    near = [at(job, "perplexity", 8192) / at(job, "untrained", 8192) for job in jobs]
    assert f"at 8,192 tokens perplexity is {min(near):.1f} to {max(near):.1f} times" in TEXT
    far = [at(job, "perplexity", 16384) / at(job, "untrained", 8192) for job in jobs if job["length"] == 16384]
    assert f"for 16,384 it is {min(far):.1f} to {max(far):.1f} times the untouched model's at 8,192" in TEXT
    starts = sorted({f"{at(job, 'extended', 8192):.2f}" for job in jobs})
    (plain,) = {f"{at(job, 'untrained', 8192):.2f}" for job in jobs}
    assert f"is at {' and '.join(starts)} where the plain one is at {plain}" in TEXT
    extended, plain = (
        json.loads((STUDY / f"perplexity-{name}.json").read_text())["perplexity"][n]["perplexity"]
        for name, n in (("self_extend-16384", "16384"), ("none-32768", "8192"))
    )
    assert f"has {of(extended / plain)} of that at 16,384" in TEXT


def test_what_the_page_says_of_windows_holds():
    """Right answers of numbers within the last tokens that StreamingLLM's mask reads, and of those before."""
    right = lambda method, reach, n: right_by_distance(BASE, named(method, reach), n)
    for method in ("streaming", "lm_infinite"):
        (near, far), (near2, far2) = right(method, 32768, 16384), right(method, 32768, 32768)
        assert far[0] == far2[0] == 0
        words = f"{near[0]} of the {near[1]} numbers within the last {WINDOW:,} tokens and none of the {far[1]} before"
        assert f"at 16,384 tokens {words}, at 32,768 {near2[0]} of {near2[1]} and none of {far2[1]}." in TEXT
    far = [right(*setting)[1] for setting in (
        ("dual_chunk", 32768, 16384), ("dual_chunk", 32768, 32768), ("self_extend", 32768, 16384),
        ("self_extend", 32768, 32768), ("self_extend", 16384, 16384),
    )]  # fmt: skip
    assert (
        f"Dual chunk attention answers {far[0][0]} of the {far[0][1]} and {far[1][0]} of the {far[1][1]} farther ones "
        f"there, Self-Extend for 32,768 {far[2][0]} and {far[3][0]}, for 16,384 {far[4][0]} of the {far[4][1]}." in TEXT
    )


def test_every_job_of_the_study_is_here():
    folder = ROOT / "results/smollm2-context"
    settings = json.loads((folder / "plan.json").read_text())
    settings = {key: tuple(v) if isinstance(v, list) else v for key, v in settings.items() if key != "model"}
    names = [job.name for job in planned(Plan(**settings))]
    assert all((folder / f"{name}.json").exists() for name in names)
    readme = (folder / "README.md").read_text()
    assert f"All {len(names)} jobs are here" in readme
    for row in tables_of(folder / "README.md")["section", "jobs", "each"]:
        assert row[1] == str(sum(name.startswith(f"{row[0]}-") for name in names)), row[0]
