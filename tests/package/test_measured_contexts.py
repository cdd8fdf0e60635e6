"""docs/context_extension.md says what the files of results/smollm2-context and -cpu say: the tables of perplexities."""

import json
import pathlib

from markdown_tables import tables_of

from seal_ops.experiments.context_study.plan import SECTIONS

ROOT = pathlib.Path(__file__).resolve().parents[2]
PAGE, RESULTS = ROOT / "docs/context_extension.md", ROOT / "results/smollm2-context-cpu"
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
    for path in (ROOT / "results/smollm2-context").glob("perplexity-*-*.json"):
        content = json.loads(path.read_text())
        name = f"`{content['method']}`, for {content['reach']:,}" if content["method"] != "none" else "plain"
        found[name] = {int(n): f"{value['perplexity']:.2f}" for n, value in content["perplexity"].items()}
    lengths = sorted({n for cells in found.values() for n in cells})
    head = ("perplexity on an H200", *(f"{n:,}" for n in lengths))
    said = tables_of(PAGE)[head]
    assert {row[0] for row in said} == set(found) and len(said) == 14
    for name, *cells in said:
        assert cells == [found[name].get(n, "") for n in lengths], name


def test_the_table_of_retrieval_says_what_was_measured():
    jobs: dict[str, list[dict]] = {}
    for path in sorted((ROOT / "results/smollm2-context").glob("retrieval-*.json")):
        content = json.loads(path.read_text())
        name = f"`{content['method']}`, for {content['reach']:,}" if content["method"] != "none" else "plain"
        jobs.setdefault(name, []).append(content["measured"])
    lengths = ("8,192", "16,384", "32,768")
    head = ("", "draws", f"multikey, {lengths[0]}", *lengths[1:], f"passkey, {lengths[0]}", *lengths[1:])
    said = tables_of(PAGE)[head]
    assert [row[0] for row in said] == sorted(jobs, key=[row[0] for row in said].index) and len(said) == len(jobs)
    for name, draws, *cells in said:
        assert draws == str(len(jobs[name]))
        wanted = []
        for task in ("multikey", "passkey"):
            for length in lengths:
                found = [s for job in jobs[name] for s in job[task]["scores"].get(length.replace(",", ""), [])]
                assert len(found) in (0, 20 * len(jobs[name]))
                wanted.append(f"{sum(found) / len(found):.2f}".removeprefix("0") if found else "")
        assert cells == wanted, name


def test_the_table_of_fine_tuning_says_what_was_measured():
    head = ("", "rate", "at 8,192", "at its length", "of full attention's gain there", "s")
    wanted = []
    for length in ("16384", "32768"):
        jobs = {}
        for path in sorted((ROOT / "results/smollm2-context").glob(f"tuned-*-{length}.json")):
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


def test_what_the_page_says_of_scales_beyond_the_context_holds():
    """By the other study: YaRN alone, and with SEAL-C trained there."""
    found = json.loads((ROOT / "results/smollm2/beyond-yarn-x2.json").read_text())["measured"]
    shares = {name: sum(one["scores"]["16000"]) / len(one["scores"]["16000"]) for name, one in found.items()}
    assert {f"{share:.2f}" for share in shares.values()} >= {"0.32", "0.88"}
