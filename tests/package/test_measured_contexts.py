"""docs/context_extension.md says what the files of results/smollm2-context-cpu say: the table of perplexities."""

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
