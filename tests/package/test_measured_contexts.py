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


def test_what_the_page_says_of_retrieval_holds():
    def score(method, task, length):
        content = json.loads((ROOT / f"results/smollm2-context/retrieval-{method}-0.json").read_text())
        scores = content["measured"][task]["scores"][str(length)]
        return sum(scores) / len(scores)

    assert [score(f"{m}-16384", "multikey", 16384) for m in ("ntk", "yarn")] == [0.15, 0.20]
    assert [score(f"{m}-16384", "passkey", 16384) for m in ("ntk", "yarn")] == [0.15, 0.15]
    assert score("none-32768", "multikey", 16384) == score("none-32768", "passkey", 16384) == 0.0
    assert not any(score("linear-32768", t, n) for t in ("multikey", "passkey") for n in (2048, 8192, 32768))
