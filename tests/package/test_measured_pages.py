"""The pages about the real model say what the files of results/smollm2 say: every table cell, and the numbers in prose.

A table of a page is found by its header and compared whole, so that a row too many fails as well.
"""

import json
import pathlib
import re
import shutil

import pytest
from markdown_tables import not_said, tables_of

ROOT = pathlib.Path(__file__).resolve().parents[2]
RESULTS = ROOT / "results/smollm2"
SUMMARY = json.loads((RESULTS / "summary.json").read_text())
LENGTHS = (512, 1024, 2048, 4096, 8000)
METHODS = ("base", "SEAL-H", "SEAL-C", "LoRA", "DoRA")
TASKS = ("passkey", "needle", "multikey", "multivalue", "magic", "variables", "lines")
CELLS = {(c["task"], c["method"], c["length"]): c for c in SUMMARY["main"]["cells"]}
TESTS = {(t["task"], t["first"], t["second"], t["length"]): t for t in SUMMARY["main"]["tests"]}
TRANSFER = {(r["trained"], r["measured"], r["length"]): r for r in SUMMARY["transfer"]}
BEYOND = {(r["kind"], r["factor"], r["method"], r["length"]): r for r in SUMMARY["beyond"]}
PERPLEXITY = {r["scales"]: r for r in SUMMARY["elsewhere"]["perplexity"]}
BY_RATE = {(r["method"], r["lr"]): r for r in SUMMARY["curve"] if r["samples"] is None}
BY_SAMPLES = {(r["method"], r["samples"]): r for r in SUMMARY["curve"] if r["samples"] is not None}


def job(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text())


def of(value: float) -> str:
    """An accuracy or a p-value of at least .001 as the pages write it."""
    return f"{value:.2f}".lstrip("0")


def p(value: float) -> str:
    return f"{value:.3f}".lstrip("0") if value >= 0.001 else re.sub("e-0?", "e-", f"{value:.0e}")


def percent(change: float) -> str:
    return f"{100 * change:+.1f} %" if abs(change) < 0.05 else f"{100 * change:+,.0f} %"


def shown(row: dict) -> str:
    return f"{of(row['accuracy'])} [{of(row['low'])}, {of(row['high'])}]"


def signed(value: float) -> str:
    return f"{value:+.2f}".replace("0.", ".", 1)


def interval(test: dict) -> str:
    return f"{signed(test['difference'])} [{signed(test['low'])}, {signed(test['high'])}]".replace("[+", "[")


def scores(name: str, method: str, length: int) -> float:
    found = job(name)["measured"][method]["scores"][str(length)]
    return sum(found) / len(found)


# --------------------------------------------------------------------------------------------------------- the tables


def main_table():
    rows = []
    for task in TASKS:
        for method in METHODS:
            cells = [CELLS[task, method, n] for n in LENGTHS]
            last = cells[-1]
            test = TESTS.get((task, "base", method, 8000))
            rows.append(
                (
                    task if method == "base" else "", method, str(last["cases"]), *(of(c["accuracy"]) for c in cells),
                    f"{of(last['low'])} to {of(last['high'])}", p(test["p_adjusted"]) if test else "",
                )
            )  # fmt: skip
    return ("task", "", "cases", *(f"{n:,}" for n in LENGTHS), "95 % at 8,000", "p"), rows


def adapters_table():
    rows = []
    for task in TASKS:
        row = [task]
        for method in ("LoRA", "DoRA"):
            test = TESTS[task, "SEAL-C", method, 8000]
            row += [f"{interval(test)}, {test['better']} / {test['worse']}", p(test["p"]), p(test["p_adjusted"])]
        rows.append((*row[:1], str(test["cases"]), *row[1:]))
    return ("task", "cases", "LoRA − SEAL-C", "p", "Holm", "DoRA − SEAL-C", "p", "Holm"), rows


def cost_table():
    """Trained numbers, memory, and the seconds of the trainings that shared a card with five others."""
    second = set(job("environment")["runs"][1]["jobs"])
    rows = []
    for method in METHODS[1:]:
        kind = "main" if method.startswith("SEAL") else "adapters"
        mine = [r for r in SUMMARY["training"] if r["method"] == method and f"{kind}-{r['task']}-{r['seed']}" in second]
        seconds = [r["seconds"] for r in mine]
        memory = max(r["peak_memory"] for r in mine) / 2**30
        rows.append(
            (method, f"{mine[0]['parameters']:,}", f"{min(seconds):.0f} to {max(seconds):.0f}", f"{memory:.1f}")
        )  # noqa: E501
    return ("", "trained numbers", "seconds, six processes a card", "GiB at most"), rows


def samples_table():
    rows = [(str(n), *(shown(BY_SAMPLES[method, n]) for method in ("SEAL-H", "SEAL-C"))) for n in (5, 10, 25, 50, 100)]
    return ("samples", "SEAL-H", "SEAL-C"), rows


def rates_table():
    rows = []
    for (method, rate), row in sorted(BY_RATE.items(), key=lambda item: (item[0][0] == "SEAL-C", item[0][1])):
        test, short = row["against_base"], row["shortest_against_base"]
        rows.append(
            (
                method, f"{rate:g}", shown(row), f"{test['better']} / {test['worse']}", p(test["p"]),
                of(row["shortest"]), f"{short['better']} / {short['worse']}", f"{row['validation_loss']:.3f}",
                percent(row["perplexity_change"]),
            )
        )  # fmt: skip
    head = ("", "rate", "8,000", "better / worse", "p", "512", "better / worse", "validation loss", "perplexity")
    return head, rows


def length_table():
    rows = []
    for method, trained in [("base", "")] + [(m, n) for m in ("SEAL-H", "SEAL-C") for n in (1024, 2048, 4096, 8000)]:
        found = {r["length"]: r for r in SUMMARY["length"] if (r["method"], r["train_length"]) == (method, trained)}
        rows.append((method, f"{trained:,}" if trained else "", *(of(found[n]["accuracy"]) for n in LENGTHS)))
    return ("", "trained at", *(f"{n:,}" for n in LENGTHS)), rows


def beyond_table():
    rows = []
    for kind, factor, length in (("NTK", 2, 16000), ("YaRN", 2, 16000), ("NTK", 4, 32000), ("YaRN", 4, 32000)):
        for method in ("base", "SEAL-C of 8000", f"SEAL-C of {length}"):
            near, far = (BEYOND[kind.lower(), factor, method, n] for n in (8000, length))
            name = re.sub(r"of (\d+)000", r"of \1,000 tokens", method)
            gained = "" if method == "base" else interval(far["against_base"])
            rows.append(
                (f"{kind} × {factor}, {name}", of(near["accuracy"]), f"{length:,}", of(far["accuracy"]), gained)
            )  # noqa: E501
    return ("", "at 8,000", "further", "there", "against the base there"), rows


def quadrants_table():
    found = {(r["variant"], r["length"]): r for r in SUMMARY["heads"]["quadrants"]}
    rows = []
    for variant in ("base", "harmful x0.9", "helpful x1.1", "both"):
        near, far = found[variant, 1024], found[variant, 8000]
        test = far["against_base"]
        better = "" if variant == "base" else f"{test['better']} / {test['worse']}, p = {p(test['p'])}"
        rows.append((variant.replace("x", "× "), of(near["accuracy"]), of(far["accuracy"]), better))
    return ("heads", "1,024", "8,000", "at 8,000, better / worse"), rows


def wordings_table():
    rows = []
    for task in TASKS:
        row = [task]
        for name in (task, f"reworded {task}"):
            trained = TRANSFER[task, name, 4096]
            row += [of(TRANSFER["base", name, 4096]["accuracy"]), of(trained["accuracy"])]
        test = trained["against_base"]
        rows.append((*row, f"{test['better']} / {test['worse']}", p(test["p"]), p(test["p_adjusted"])))
    head = ("trained on", "base", "SEAL-C", "other wording, base", "SEAL-C", "better / worse", "p", "Holm")
    return head, rows


def perplexity_table():
    rows = []
    for task in TASKS:
        rates = {m: job(f"main-{task}-0")["training"][m]["lr"] for m in ("SEAL-H", "SEAL-C")}
        rows.append(
            (task, *(f"{percent(PERPLEXITY[f'{task}-{m}-0']['change'])} ({rate:g})" for m, rate in rates.items()))
        )
    return ("scales of", "SEAL-H (rate)", "SEAL-C (rate)"), rows


def quantised_table():
    rows = [
        (f"bf16, {name}", *(of(scores("main-multikey-0", name, n)) for n in LENGTHS)) for name in ("base", "SEAL-C")
    ]
    for name, method in (("NF4, base", "NF4"), ("NF4, SEAL-C", "NF4, SEAL-C")):
        rows.append((name, *(of(scores("quantised-nf4", method, n)) for n in LENGTHS)))
    return ("weights", *(f"{n:,}" for n in LENGTHS)), rows


def format_table():
    lengths = (512, 2048, 8000)
    rows = []
    for task in ("multikey", "passkey", "magic"):
        plain = {r["length"]: r for r in SUMMARY["format"] if r["task"] == task}
        rows.append(
            (
                task,
                " / ".join(of(CELLS[task, "base", n]["accuracy"]) for n in lengths),
                " / ".join(of(plain[n]["accuracy"]) for n in lengths),
            )
        )
    return ("base at 512 / 2,048 / 8,000", "with the chat template", "without"), rows


def opening_table():
    """The README's."""
    rows = []
    for task, name in (("passkey", "passkey"), ("needle", "needle"), ("multikey", "multikey (8 keys)")):
        by_method = (of(CELLS[task, method, 8000]["accuracy"]) for method in METHODS)
        cases = {CELLS[task, m, 8000]["cases"] for m in METHODS}
        rows.append((f"{name}, {' or '.join(map(str, sorted(cases)))} cases", *by_method))
    far = [of(BEYOND["yarn", 2, m, 16000]["accuracy"]) for m in ("base", "SEAL-C of 16000")]
    rows.append(("multikey at 16,000 tokens with YaRN × 2, 60 cases", far[0], "", far[1], "", ""))
    head = ("task", "base", "SEAL-H, 270 numbers", "SEAL-C, 17,280", "LoRA, 460,800", "DoRA, 506,880")
    return head, rows


def paper_table():
    """The paper's columns on this model, task by task."""
    rows = [(task, *(shown(CELLS[task, method, 8000]) for method in METHODS)) for task in TASKS]
    return ("at 8,000 tokens", *METHODS), rows


TABLES = {
    "docs/real_model.md": [
        main_table, adapters_table, cost_table, samples_table, rates_table, length_table, beyond_table,
        quadrants_table, wordings_table, perplexity_table, quantised_table, format_table,
    ],
    "docs/reproduction.md": [paper_table, samples_table, rates_table, quadrants_table],
    "docs/does_seal_help.md": [length_table],
    "README.md": [opening_table],
}  # fmt: skip


def markdown(table) -> str:
    head, rows = table
    return "\n".join(["| " + " | ".join(row) + " |" for row in (head, ("---",) * len(head), *rows)])


def test_summary_is_of_the_stored_jobs(tmp_path, monkeypatch):
    """What the pages are held to follows from every case's score."""
    from seal_ops.experiments.pretrained_study import drawings, summary

    def rounded(path):
        content = json.loads(path.read_text(), parse_float=lambda text: f"{float(text):.4g}")
        return {key: value for key, value in content.items() if key != "similarity"}  # sums of floats, below

    shutil.copytree(RESULTS, tmp_path / "study", ignore=shutil.ignore_patterns("*.png", "*.md", "summary.json"))
    monkeypatch.setattr(drawings, "draw", lambda content, folder: [])
    assert summary.write_summary(str(tmp_path / "study")) == ["summary.json", "tables.md", "main.csv"]
    assert rounded(tmp_path / "study/summary.json") == rounded(RESULTS / "summary.json")
    for found, stored in zip(
        json.loads((tmp_path / "study/summary.json").read_text())["similarity"], SUMMARY["similarity"], strict=True
    ):
        assert found == {**stored, "r": pytest.approx(stored["r"], abs=1e-4)}
    assert (tmp_path / "study/tables.md").read_text() == (RESULTS / "tables.md").read_text()


def test_results_name_no_machine():
    """Scales say which model they belong to, not where it lay; and the folder stays small."""
    files = [path for path in RESULTS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 4_000_000
    assert all(path.stat().st_size < 200_000 for path in files if path.suffix == ".png")
    configs = [json.loads(path.read_text()) for path in files if path.name == "adapter_config.json"]
    assert len(configs) == 52 and {config["base_model_name_or_path"] for config in configs} == {"smollm2"}


@pytest.mark.parametrize(
    "page, build", [(page, build) for page, builders in TABLES.items() for build in builders],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)  # fmt: skip
def test_table_says_what_was_measured(page, build):
    head, rows = build()
    found = tables_of(ROOT / page)
    assert head in found, f"{page} has no table {' | '.join(head)}"
    wrong = [f"{a} should be {b}" for a, b in zip(found[head], rows, strict=False) if a != b]
    assert found[head] == rows, "\n".join(wrong) or "rows are missing, or too many"


# ---------------------------------------------------------------------------------------------------------- the prose


def cell(task, method, length=8000):
    return CELLS[task, method, length]


def draws(task, method):
    found = cell(task, method)
    return f"({of(found['lowest_seed'])} to {of(found['highest_seed'])})"


def off_diagonal(length):
    """Scales of one task on another, in the trained wording."""
    return [
        r for r in SUMMARY["transfer"]
        if r["length"] == length and r["trained"] not in ("base", r["measured"]) and r["measured"] in TASKS
    ]  # fmt: skip


def lost_at_512():
    lost = [r for r in off_diagonal(512) if r["against_base"]["difference"] <= -0.03]
    return f"{len(lost)} of {len(off_diagonal(512))} pairs"


def gained(length, without=()):
    pairs = [r for r in off_diagonal(length) if r["measured"] not in without]
    up = [r for r in pairs if r["against_base"]["difference"] > 0 and r["against_base"]["p_adjusted"] < 0.05]
    return f"{len(up)} of {len(pairs)} pairs"


def span(method):
    found = [round(100 * r["change"]) for r in PERPLEXITY.values() if f"-{method}-" in r["scales"]]
    return f"+{min(found)} to +{max(found)} %"


def ahead_of_heads():
    """Where SEAL-C is ahead of SEAL-H, by how much."""
    tests = {task: TESTS[task, "SEAL-H", "SEAL-C", 8000] for task in TASKS}
    names = sorted((t for t in TASKS if tests[t]["p_adjusted"] < 0.001), key=lambda t: -tests[t]["difference"])
    return ", ".join(f"{t} {signed(tests[t]['difference'])}" for t in names)


def without_digits(task):
    """Stored failures of the base at 2,048 tokens and more, and how many of them hold no digit."""
    outputs = [
        output for seed in range(3) for length in ("2048", "4096", "8000")
        for output in job(f"main-{task}-{seed}")["measured"]["base"]["outputs"][length]
    ]  # fmt: skip
    failed = [output["output"] for output in outputs if output["score"] == 0]
    return len(outputs), len(failed), sum(not re.search(r"\d", text) for text in failed)


def moved():
    found = [
        r for name, r in SUMMARY["heads"]["correlations"].items() if name.startswith("moved by") and "rate-" not in name
    ]  # noqa: E501
    return f"between {signed(min(found))} and {of(max(found))} over {len(found)} trainings"


def alike(method, kind):
    found = [r["r"] for r in SUMMARY["similarity"] if (r["method"], r["kind"]) == (method, kind)]
    return of(sum(found) / len(found))


def steps(method, rate):
    row = BY_RATE[method, rate]
    test = row["against_base"]
    return test["better"], test["worse"], percent(row["perplexity_change"])


def real_model():
    multikey, heads = cell("multikey", "SEAL-C"), SUMMARY["heads"]
    ntk, yarn = (BEYOND[kind, 2, "SEAL-C of 16000", 16000]["against_base"] for kind in ("ntk", "yarn"))
    short = TESTS["passkey", "base", "SEAL-H", 512]
    lines = TESTS["lines", "SEAL-C", "LoRA", 512]
    agreement = heads["agreement"]
    merged = {r["method"]: r for r in SUMMARY["elsewhere"]["merged"]}
    low, mid, high = (steps("SEAL-C", rate) for rate in (1e-3, 5e-3, 2e-2))
    kept, failed, wordless = without_digits("passkey")
    passkey = [r["accuracy"] for r in off_diagonal(4096) if r["measured"] == "passkey"]
    best = heads["retrieval"]["best"]
    yield f"SEAL-C at least .90 | {shown(multikey)} over three draws {draws('multikey', 'SEAL-C')}"
    yield f"at least .60 | {shown(cell('multikey', 'SEAL-H'))} over three draws {draws('multikey', 'SEAL-H')}"
    yield f"SEAL-C at least .90 | {shown(cell('passkey', 'SEAL-C'))} |"
    yield f"{interval(ntk)} with NTK; {interval(yarn)} with YaRN".replace(", +", ", ")
    yield f"SEAL-H loses {of(-short['difference'])} on passkey"
    yield f"{short['worse']} of {short['cases']} cases at 512 tokens and gains none (p = {p(short['p'])}; adjusted {p(short['p_adjusted'])})"  # noqa: E501
    yield f"{lost_at_512()} of tasks lose more (SEAL-C)"
    yield f"{span('SEAL-C')} with SEAL-C"
    yield f"{span('SEAL-H')} with SEAL-H"
    base = BY_RATE["SEAL-C", 1e-3]["against_base"]["base"]
    yield f"from {of(base)} to {of(BY_RATE['SEAL-C', 1e-3]['accuracy'])} for {low[2]} perplexity"
    yield f"2e-2, it reaches {of(BY_RATE['SEAL-C', 2e-2]['accuracy'])} for {high[2]}"
    yield f"gains {low[0]} cases and loses {low[1]} for {low[2]}, at 5e-3 {mid[0]} and {mid[1]} for {mid[2]}"
    yield f"at 2e-2 {high[0]} and {high[1]} for {high[2]}"
    yield f"Holm-adjusted over the {len(SUMMARY['main']['tests'])} tests"
    yield f"{len(SUMMARY['seconds'])} jobs, bf16"
    yield f"Of the {failed} failures among {kept} stored answers at 2,048 tokens and more, {wordless} hold no digit"
    kept, failed, wordless = without_digits("multikey")
    yield f"all {failed} failures among its {kept} stored answers name a number"
    assert wordless == 0
    yield ahead_of_heads() + " at 8,000 tokens (each p < .001 adjusted)"
    yield f"SEAL-C ({lines['better']} cases better, {lines['worse']} worse, adjusted p = {p(lines['p_adjusted'])})"
    for name in ("SEAL-H", "SEAL-C"):
        row = merged[f"{name} merged"]
        yield f"{name} {of(row['accuracy'])} ({'unmerged ' if name == 'SEAL-H' else ''}{of(row['unmerged'])})"
    yield f"{of(agreement['gradient_ablation']['1024'])} at 1,024 tokens, {of(agreement['gradient_ablation']['4096'])} at 4,096"  # noqa: E501
    yield f"Removal at one length and at the other: {of(agreement['lengths']['1024,4096'])}"
    yield f"{heads['groups']['harmful']} heads whose removal helps at both lengths, {heads['groups']['helpful']} whose"
    yield ", ".join(f"layer {h['layer']} head {h['head']} ({of(h['score'])})" for h in best[:1])
    yield f"layer {best[1]['layer']} heads {best[1]['head']} and {best[2]['head']} ({of(best[1]['score'])}, {of(best[2]['score'])})"  # noqa: E501
    (near, next_near), (far, next_far) = ([-h["change"] for h in heads["largest"][n][:2]] for n in ("1024", "4096"))
    yield f"loses {near:.0f} nats at 1,024 tokens and {far:.0f} at 4,096; the next loses {next_near:.0f} and {next_far:.0f}"  # noqa: E501
    most = heads["largest"]["1024"][0]
    yield f"without layer {most['layer']} head {most['head']} the answer"
    yield f"Its retrieval score is {of(job('heads-retrieval')['scores'][most['layer']][most['head']])}"
    seconds = job("heads-importance")["seconds"]
    yield f"at {seconds['gradient']:.0f} s in the place of {seconds['ablation']:.0f}"
    yield moved()
    draw, other = (
        [alike(method, kind) for method in ("SEAL-H", "SEAL-C")] for kind in ("one task, two draws", "two tasks")
    )
    yield f"correlation {draw[0]} on average between two draws of one task for SEAL-H, {draw[1]} for SEAL-C"
    yield f"between two tasks {other[0]} and {other[1]}"
    yield f"to between {of(min(passkey))} and {of(max(passkey))} (each adjusted p < .001)"
    assert all(
        r["against_base"]["p_adjusted"] < 0.001 for r in SUMMARY["transfer"]
        if (r["measured"], r["length"]) == ("passkey", 4096) and r["trained"] != "base"
    )  # fmt: skip
    yield f"Apart from passkey, {gained(4096, ['passkey'])} of tasks gain significantly at 4,096 tokens"
    yield f"At 512 tokens {gained(512)} gain significantly"
    yield f"base {PERPLEXITY['base']['perplexity']:.2f}, with the first draw"


def readme():
    base = BY_RATE["SEAL-C", 1e-3]["against_base"]["base"]
    worst, best = span("SEAL-C").replace("+", ""), span("SEAL-H").replace("+", "")
    yield f"rises by {worst} with SEAL-C and by {best} with SEAL-H"
    yield f"{percent(BY_RATE['SEAL-C', 1e-3]['perplexity_change'])[1:]} and still lifts multikey from {of(base)} to {of(BY_RATE['SEAL-C', 1e-3]['accuracy'])} (100 cases)"  # noqa: E501
    differ = [t["p_adjusted"] for t in SUMMARY["main"]["tests"] if t["first"] == "SEAL-C" and t["length"] == 8000]
    assert len(differ) == 14 and min(differ) > 0.05
    yield "on no task do they differ significantly at this length"


def does_seal_help():
    by_method = ", ".join(f"{m} {of(cell('multikey', m)['accuracy'])}" for m in METHODS)
    yield f"{by_method} at 8,000 tokens; {', '.join(of(cell('multikey', m, 512)['accuracy']) for m in METHODS)} at 512"
    test = TESTS["multikey", "base", "SEAL-C", 8000]
    yield f"SEAL-C gains {test['better']} cases of {test['cases']} and loses {test['worse']} (adjusted p = {p(test['p_adjusted'])})"  # noqa: E501
    found = cell("multikey", "SEAL-C")
    yield f"the three of SEAL-C range from {of(found['lowest_seed'])} to {of(found['highest_seed'])}"
    rates = [BY_RATE["SEAL-C", rate] for rate in (1e-3, 5e-3, 2e-2)]
    yield f"{', '.join(of(r['accuracy']) for r in rates)} at 8,000 tokens, and the perplexity of English up by"
    yield "up by {}, {} and {} %".format(*(percent(r["perplexity_change"])[1:-2] for r in rates))
    hundred, fifty = (BY_SAMPLES["SEAL-C", n]["accuracy"] for n in (100, 50))
    yield f"A hundred samples gave {of(hundred)} with SEAL-C at 8,000 tokens where fifty gave {of(fifty)}"
    for task in ("needle", "multikey", "multivalue", "magic"):
        before, after = (TRANSFER[source, f"reworded {task}", 4096]["accuracy"] for source in ("base", task))
        yield f"{task} {of(before)} → {of(after)}"
    for task in ("multikey", "needle"):
        short, long = (scores(f"main-{task}-0", "base", n) for n in (512, 8000))
        yield f"{of(short)} at 512 tokens, {of(long)} at 8,000" if task == "multikey" else f"{of(short)} and {of(long)}"
    yield f"{lost_at_512()} of tasks lose .03 and more"


def reproduction():
    yield "base {}, SEAL-H {}, SEAL-C {} at 8,000 tokens".format(
        *(of(cell("needle", m)["accuracy"]) for m in METHODS[:3])
    )
    far = {
        (kind, factor, method): of(BEYOND[kind, factor, method, 8000 * factor]["accuracy"])
        for kind, factor, method, length in BEYOND if length == 8000 * factor
    }  # fmt: skip
    for kind, factor, name in (("ntk", 2, "NTK"), ("yarn", 2, "YaRN"), ("ntk", 4, "NTK"), ("yarn", 4, "YaRN")):
        yield f"{name} × {factor} {far[kind, factor, 'base']} → {far[kind, factor, f'SEAL-C of {8000 * factor}']}"
    yield f"({far['yarn', 4, 'SEAL-C of 8000']} with the scales of 8,000 tokens)"
    yield f"rises by {span('SEAL-C').replace('+', '')} with SEAL-C of 2e-2, by {percent(BY_RATE['SEAL-C', 1e-3]['perplexity_change'])[1:]} with SEAL-C of 1e-3"  # noqa: E501


PROSE = {
    "docs/real_model.md": real_model,
    "README.md": readme,
    "docs/does_seal_help.md": does_seal_help,
    "docs/reproduction.md": reproduction,
}


@pytest.mark.parametrize("page", PROSE)
def test_sentence_says_what_was_measured(page):
    wrong = not_said(ROOT / page, PROSE[page]())
    assert not wrong, f"{page} does not say: " + " | ".join(wrong)
