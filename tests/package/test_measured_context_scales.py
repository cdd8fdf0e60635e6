"""What pages say of scales trained under a context extension is what results/smollm2-context holds."""

import itertools
import json
import math
import re

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
    accuracy,
    compared,
    named,
    of,
    p_value,
    retrieved,
    right_by_distance,
    variants_of,
    with_spread,
)  # fmt: skip
from markdown_tables import tables_of

from seal_ops.evaluation.statistics import holm, wilson

THIRTY = retrieved("thirty-samples/scaled")
TASKS = ("multikey", "passkey")
# The page's order; set up for 16,384 tokens where a method is set up for a length.
METHODS = ("dual_chunk", "yarn", "dynamic_ntk", "self_extend", "ntk", "lm_infinite", "streaming", "linear")
REACH = {method: 32768 if method in ("dual_chunk", "lm_infinite", "streaming") else 16384 for method in METHODS}
NAMED = {method: named(method, REACH[method]) for method in METHODS}


def jobs(folder=STUDY) -> dict[str, list[dict]]:
    """The draws of every method, in their order."""
    found: dict[str, list[dict]] = {}
    for path in sorted(folder.glob("scaled-*.json")):
        job = json.loads(path.read_text())
        found.setdefault(job["method"], []).append(job)
    return found


JOBS = jobs()


def rate(number: float) -> str:
    return f"{number:.0e}".replace("e-0", "e-")


def rows_of_accuracy() -> dict[str, tuple]:
    """Without and with scales, and their tests, adjusted together."""
    tests = {key: compared(BASE[key], SCALED[key]) for key in sorted(SCALED)}
    adjusted = dict(zip(tests, holm([test.p for test in tests.values()])))
    assert f"Holm over the {len(tests)}" in TEXT

    def cell(key):
        if key not in tests:
            return ""
        before, test = of(accuracy(BASE[key])), tests[key]
        return f"{before} → {with_spread(SCALED[key])}; {test.better} / {test.worse}, {p_value(adjusted[key])}"

    return {
        f"{task}, `{method}`": tuple(cell((task, NAMED[method], n)) for n in LENGTHS)
        for task in TASKS
        for method in METHODS
    }


def rows_of_pairs() -> dict[str, tuple]:
    """Dual chunk attention with scales against the others with theirs on multikey, adjusted together."""
    others, shown = METHODS[1:], LENGTHS[:-1]
    tests = {
        (method, n): compared(SCALED["multikey", NAMED[method], n], SCALED["multikey", NAMED["dual_chunk"], n])
        for method in others
        for n in shown
    }
    adjusted = dict(zip(tests, holm([test.p for test in tests.values()])))
    assert f"Holm over the {len(tests)}" in TEXT
    cell = lambda key: f"{tests[key].better} / {tests[key].worse}, {p_value(adjusted[key])}"
    return {f"`dual_chunk` to `{method}`": tuple(cell((method, n)) for n in shown) for method in others}


def costs() -> dict[tuple, dict[int, float]]:
    """Perplexity with the scales of a task over that under the method alone, by (method, task): mean loss of the
    draws."""
    found = {}
    for method, draws in JOBS.items():
        alone = json.loads((STUDY / f"perplexity-{method}-{REACH[method]}.json").read_text())["perplexity"]
        for task in TASKS:
            found[method, task] = {
                int(n): math.exp(sum(draw["perplexity"][task][n]["nats"] for draw in draws) / len(draws))
                / alone[n]["perplexity"]
                - 1
                for n in alone
            }
    return found


def rates() -> dict[tuple, float]:
    found = {}
    for method, draws in JOBS.items():
        for task in TASKS:
            (found[method, task],) = {draw["training"][task]["lr"] for draw in draws}
    return found


def rows_of_costs() -> dict[str, tuple]:
    found, chosen = costs(), rates()
    rows = {}
    for method in METHODS:
        cells = [
            " / ".join(f"{100 * found[method, task][n]:.0f}" for task in TASKS)
            if n in found[method, "multikey"]
            else ""
            for n in LENGTHS
        ]
        rows[f"`{method}`"] = (" / ".join(rate(chosen[method, task]) for task in TASKS), *cells)
    return rows


def rows_of_samples() -> dict[str, tuple]:
    rows = {}
    earlier = jobs(STUDY / "thirty-samples")
    for method, task in itertools.product(("self_extend", "yarn", "ntk"), TASKS):
        key = task, NAMED[method], 16384
        cells = []
        for found, made in ((THIRTY, earlier), (SCALED, JOBS)):
            (lr,) = {draw["training"][task]["lr"] for draw in made[method]}
            cells += [rate(lr), with_spread(found[key])]
        rows[f"{task}, `{method}`"] = tuple(cells)
    return rows


TABLES = {
    "accuracy": (("SEAL-C trained at 16,384", *SHOWN), rows_of_accuracy),
    "pairs": (("better / worse, p", *SHOWN[:-1]), rows_of_pairs),
    "costs": (("per cent of perplexity", "rates", *SHOWN), rows_of_costs),
    "samples": (("at 16,384", "rate, 30 samples", "accuracy", "rate, 50 samples", "accuracy"), rows_of_samples),
}


@pytest.mark.parametrize("name", TABLES)
def test_the_tables_say_what_was_measured(name):
    head, rows = TABLES[name]
    said, wanted = tables_of(PAGE)[head], rows()
    assert [row[0] for row in said] == list(wanted)
    for label, *cells in said:
        assert tuple(cells) == wanted[label], label


def test_every_method_has_three_draws_of_twenty_cases():
    assert set(JOBS) == set(METHODS) and all([d["seed"] for d in draws] == [0, 1, 2] for draws in JOBS.values())
    for draws in SCALED.values():
        assert len(draws) == 3 and {len(scores) for scores in draws} == {20}
    plan = json.loads((STUDY / "plan.json").read_text())
    assert plan["samples"] == 50 and f"{plan['samples']} samples of the task" in TEXT
    assert f"chosen among {', '.join(map(rate, plan['rates'][:-1]))} and {rate(plan['rates'][-1])}" in TEXT


def test_what_the_page_says_of_retrieval_holds():
    at = lambda found, task, method, n=16384: of(accuracy(found[task, NAMED[method], n]))
    both = lambda task, method, n=16384: f"{at(BASE, task, method, n)} to {at(SCALED, task, method, n)}"
    assert (
        f"lifts multikey from {both('multikey', 'dual_chunk')} at 16,384 tokens and from "
        f"{both('multikey', 'dual_chunk', 32768)} at 32,768, passkey from {both('passkey', 'dual_chunk')} and from "
        f"{both('passkey', 'dual_chunk', 32768)}" in TEXT
    )
    # Beyond the window of the mask, nothing: by the distances of the multikey cases.
    for method in ("lm_infinite", "streaming"):
        (before, _), missed = right_by_distance(BASE, NAMED[method], 16384)
        (near, of_near), far = right_by_distance(SCALED, NAMED[method], 16384)
        assert far == missed == (0, 30)
        words = f"{near} of the {of_near} numbers within the window, {before}"
        assert f"{words} without scales, and none of the {far[1]} before it" in TEXT
    # The exceptions that the page names: what is not significant.
    weak = {
        (row, length) for row, cells in rows_of_accuracy().items() for length, cell in zip(SHOWN, cells)
        if cell and float(cell.rpartition(" ")[2]) >= 0.05
    }  # fmt: skip
    said = {("multikey, `linear`", n) for n in SHOWN[:4]} | {("multikey, `ntk`", n) for n in SHOWN[:3]}
    said |= {(f"multikey, `{m}`", n) for m in ("lm_infinite", "streaming") for n in SHOWN[2:]}
    assert weak == said | {("multikey, `self_extend`", "16,384")}
    near = rows_of_accuracy()["multikey, `self_extend`"][3].rpartition(" ")[2]
    assert f"`self_extend` at 16,384 ({near})" in TEXT
    assert all(accuracy(SCALED[key]) > accuracy(BASE[key]) or key[1] in (NAMED["linear"],) for key in SCALED), (
        "every cell but linear's rises"
    )


def test_what_the_page_says_of_the_methods_with_scales_holds():
    """Which pairs are decided at 16,384 on multikey, Holm over all pairs of methods."""
    names = variants_of(SCALED)
    tests = {}
    for a, b in itertools.combinations(names, 2):
        test = compared(SCALED["multikey", a, 16384], SCALED["multikey", b, 16384])
        tests[(b, a) if test.better > test.worse else (a, b)] = test.p
    won = {pair for pair, p in zip(tests, holm(list(tests.values()))) if p < 0.05}
    short = {name: method for method, name in NAMED.items()}
    beaten = lambda method: {short[b] for a, b in won if short[a] == method}
    windows = {"lm_infinite", "streaming"}
    assert f"all {len(tests)} pairs" in TEXT
    assert beaten("dual_chunk") == {"linear", "ntk", "self_extend"} | windows
    assert beaten("yarn") == beaten("dynamic_ntk") == {"linear", "ntk"} | windows
    assert beaten("self_extend") == {"linear"} | windows and beaten("ntk") == {"linear"}


def test_what_the_page_says_of_costs_holds():
    found, chosen = costs(), rates()
    by_rate: dict[float, list[float]] = {}
    for key, lengths in found.items():
        by_rate.setdefault(chosen[key], []).extend(lengths.values())
    said = "At a rate of 5e-3 perplexity rises by {} to {} %, at 2e-2 by {} to {} %, at 5e-2 by {} to {} %".format(
        *(f"{100 * edge:.0f}" for lr in sorted(by_rate) for edge in (min(by_rate[lr]), max(by_rate[lr])))
    )
    assert said in TEXT, said
    every = [t for draws in JOBS.values() for draw in draws for t in draw["training"].values()]
    seconds, peaks = ([t[key] for t in every] for key in ("seconds", "peak_memory"))
    assert f"{min(seconds):.0f} to {max(seconds):.0f} s on a shared card" in TEXT
    assert f"{max(peaks) / 2**30:.1f} GiB at most" in TEXT


def test_what_the_page_says_of_samples_holds():
    """Self-Extend's rate was chosen by a hair, and the other one had more with fewer samples."""
    first, earlier = JOBS["self_extend"][0], jobs(STUDY / "thirty-samples")["self_extend"][0]
    tried = first["training"]["multikey"]["tried"]
    assert f"{p_value(tried['0.005'])} at 5e-3 against {p_value(tried['0.02'])} at 2e-2" in TEXT
    assert earlier["training"]["multikey"]["lr"] == 0.02 and first["training"]["multikey"]["lr"] == 0.005
    job = json.loads((ROOT / "results/smollm2/beyond-yarn-x2.json").read_text())
    scores, mine = (
        job["measured"]["SEAL-C of 16000"]["scores"]["16000"],
        SCALED["multikey", NAMED["yarn"], 16384],
    )
    share = sum(scores) / len(scores)
    assert f"gave {of(share)} under YaRN at 16,000 tokens, one draw of {len(scores)} cases" in TEXT
    assert f"where this one has {of(accuracy(mine))}" in TEXT
    assert wilson(sum(scores), len(scores))[0] < wilson(sum(map(sum, mine)), 60)[1]  # not told apart


def test_what_the_page_says_of_written_numbers_holds():
    """Of the answers that the files keep at 16,384 tokens: how many contain a number, with and without scales."""
    counts: dict[tuple, list[int]] = {}
    for section in ("retrieval", "scaled"):
        for path in STUDY.glob(f"{section}-*.json"):
            job = json.loads(path.read_text())
            if job["method"] == "none" or job["reach"] != REACH[job["method"]]:
                continue
            for task, measured in job["measured"].items():
                mine = counts.setdefault((section, task), [0, 0])
                mine[0] += sum(re.search(r"\d{3}", one["output"]) is not None for one in measured["outputs"]["16384"])
                mine[1] += len(measured["outputs"]["16384"])
    before, after = counts["retrieval", "passkey"], counts["scaled", "passkey"]
    assert f"{before[0]} of the {before[1]} answers kept without scales hold a number, {after[0]} with" in TEXT
    words = f"on multikey {counts['retrieval', 'multikey'][0]} and {counts['scaled', 'multikey'][0]}"
    assert words in TEXT, words


def test_other_pages_say_the_same():
    cells = {
        (task, method, n): tuple(of(accuracy(found[task, NAMED[method], n])) for found in (BASE, SCALED))
        for task, method, n in itertools.product(TASKS, METHODS, LENGTHS[3:])
        if (task, NAMED[method], n) in SCALED
    }
    said = {page: " ".join((ROOT / page).read_text().split()) for page in ("README.md", "docs/reproduction.md")}
    before, after = cells["multikey", "dual_chunk", 16384]
    assert f"under dual chunk attention lift multikey there from {before} to {after} (60 cases" in said["README.md"]
    arrow = lambda *key: "{} → {}".format(*cells[key])
    for method, name in (
        ("self_extend", "Self-Extend"),
        ("yarn", "YaRN"),
        ("ntk", "NTK"),
        ("dual_chunk", "dual chunk"),
    ):
        words = f"{name} {arrow('multikey', method, 16384)} and {arrow('passkey', method, 16384)}"
        assert words in said["docs/reproduction.md"], words
