"""docs/benchmarks.md, the README and the kernel notes say what the suites of `seal bench` measured, cell by cell.

A table is found by its header and compared whole, so that a row too many fails as well.
"""

import functools
import json
import math
import pathlib
import re

import pytest
from markdown_tables import not_said, tables_of

ROOT = pathlib.Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks/results"
PAGE, README = ROOT / "docs/benchmarks.md", ROOT / "README.md"
WAYS = ("forward", "backward")
FA = ("fa3", "fa4")


@functools.cache
def stored(suite: str) -> dict:
    return json.loads((RESULTS / f"{suite}-h200-a22c778.json").read_text())


@functools.cache
def timed(suite: str, operation: str = "attention") -> dict[tuple, dict]:
    """``{(model, batch, tokens): {(contestant, direction): row}}`` of what was timed, by model, then by length."""
    found: dict[tuple, dict] = {}
    for row in stored(suite)["rows"]:
        if row["status"] == "ok" and row["operation"] == operation:
            shape = found.setdefault((row["model"], row["batch"], row["seqlen"]), {})
            shape[row["contestant"], row["direction"]] = row
    order = list(dict.fromkeys(key[0] for key in found))
    return dict(sorted(found.items(), key=lambda item: (order.index(item[0][0]), item[0][2])))


def ms(cells: dict, contestant: str, way: str) -> float:
    return float(cells[contestant, way]["ms"])


def ratio(cells: dict, peer: str, way: str) -> float:
    """Times faster ours is."""
    return ms(cells, peer, way) / ms(cells, "seal-cuda", way)


def better(cells: dict, way: str) -> float:
    """Beside the better of FlashAttention-3 and -4."""
    return min(ratio(cells, peer, way) for peer in FA)


def both(cells: dict, peer: str) -> str:
    return " / ".join(f"{ratio(cells, peer, way):.2f}" for way in WAYS)


def ours(cells: dict) -> str:
    return " / ".join(f"{t:.3f}" if t < 100 else f"{t:.1f}" for t in (ms(cells, "seal-cuda", way) for way in WAYS))


def rate(cells: dict, contestant: str = "seal-cuda") -> str:
    return " / ".join(f"{cells[contestant, way]['tflops']:.0f}" for way in WAYS)


def heads(cells: dict) -> str:
    row = next(iter(cells.values()))
    return f"{row['heads']}/{row['kv_heads']} of {row['head_dim']}"


def size(batch: int, tokens: int) -> str:
    return f"{batch} × {tokens // 1024}k"


# --------------------------------------------------------------------------------------------------------- the tables


def beside_peers(suite: str):
    """Attention beside both peers: the suites headline and hard."""
    rows = [
        (f"{heads(cells)}, {size(batch, tokens)}", both(cells, "fa3"), both(cells, "fa4"), ours(cells))
        for (_, batch, tokens), cells in timed(suite).items()
    ]
    return (f"`{suite}`", "FlashAttention-3", "FlashAttention-4", "ours, ms"), rows


NAMES = {
    "llama-2-7b": "Llama-2-7B", "llama-3.1-8b": "Llama-3.1-8B", "qwen3-14b": "Qwen3-14B", "gemma-7b": "Gemma-7B",
    "gemma-2-9b": "Gemma-2-9B", "gemma-3-4b-local": "Gemma-3-4B, window 1,024",
}  # fmt: skip


def models():
    rows = []
    for (model, batch, tokens), cells in timed("models").items():
        first = f"{NAMES[model]}, {heads(cells)}" if tokens == 1024 else ""
        cudnn = both(cells, "sdpa-cudnn") if ("sdpa-cudnn", "forward") in cells else ""
        rows.append((first, size(batch, tokens), both(cells, "fa3"), both(cells, "fa4"), cudnn, ours(cells)))
    return ("`models`", "batch × length", "FlashAttention-3", "FlashAttention-4", "SDPA cuDNN", "ours, ms"), rows


def lengths():
    rows = []
    for (model, batch, tokens), cells in timed("lengths").items():
        turned = timed("lengths", "rope_attention")[model, batch, tokens]
        rows.append(
            (
                size(batch, tokens), *(both(cells, peer) for peer in (*FA, "sdpa-cudnn")), ours(cells),
                both(turned, "hf-cudnn"), ours(turned),
            )
        )  # fmt: skip
    head = ("`lengths`", "FlashAttention-3", "FlashAttention-4", "SDPA cuDNN", "ours, ms")
    return (*head, "`rope_attention`: hand-written on cuDNN", "ours, ms"), rows


def operation(name: str, peers: dict[str, str]):
    rows = [
        (f"{heads(cells)}, {size(batch, tokens)}", *(both(cells, peer) for peer in peers), ours(cells))
        for (_, batch, tokens), cells in timed("headline-ops", name).items()
    ]
    return (f"`{name}`", *peers.values(), "ours, ms"), rows


def rope_attention():
    return operation(
        "rope_attention",
        {
            "hf-fa3": "on FlashAttention-3", "hf-cudnn": "on SDPA cuDNN", "hf-fa2": "on SDPA FlashAttention-2",
            "hf-compiled-cudnn": "on SDPA cuDNN, compiled", "seal-triton": "our Triton kernels",
        },
    )  # fmt: skip


def attention_o_proj():
    return operation(
        "attention_o_proj",
        {
            "scaled-fa3": "FlashAttention-3, a multiplication", "scaled-cudnn": "cuDNN, a multiplication",
            "peft-ia3-cudnn": "cuDNN, PEFT's (IA)³ on `o_proj`", "seal-triton": "our Triton kernels",
        },
    )  # fmt: skip


ROPE = {"seal-cuda": "ours", "seal-triton": "our Triton kernel", "hf-rotary": "Hugging Face's rotary", "hf-rotary-compiled": "compiled"}  # fmt: skip # noqa: E501


def rope():
    """Percent of a copy's bandwidth."""
    rows = [
        (
            f"{heads(cells)}, {size(batch, tokens)}",
            *(f"{100 * float(cells[c, 'forward']['copy_share']):.0f}" for c in ROPE),
            f"{ms(cells, 'seal-cuda', 'forward'):.3f}",
        )
        for (_, batch, tokens), cells in timed("headline-ops", "rope").items()
    ]
    return ("`rope`, % of the copy's bandwidth", *ROPE.values(), "ours, ms"), rows


MASKS = {"llama-3.1-8b-s2": "shifted groups of a quarter (LongLoRA)", "llama-3.1-8b-streaming": "streaming(4, 4096)"}


def step(cells: dict, contestant: str) -> float:
    return sum(ms(cells, contestant, way) for way in WAYS)


def pairs(cells: dict) -> float:
    """Scores that the mask leaves, up to a factor: counted operations are proportional to them."""
    return cells["seal-cuda", "forward"]["tflops"] * ms(cells, "seal-cuda", "forward")


def share(value: float) -> str:
    return f"{value:.2f}".removeprefix("0")


def masked():
    found, rows = timed("masks"), []
    for model, name in MASKS.items():
        for tokens in (32 * 1024, 128 * 1024):
            cells, full = found[model, 1, tokens], found["llama-3.1-8b", 1, tokens]
            rows.append(
                (
                    f"{name}, {tokens // 1024}k", share(pairs(cells) / pairs(full)),
                    *(share(step(cells, c) / step(full, c)) for c in ("seal-cuda", "seal-triton")),
                    *(both(cells, peer) for peer in ("flex", "flex-mask", "flex-fa4")), ours(cells),
                )
            )  # fmt: skip
    head = ("mask", "pairs left", "CUDA", "Triton", "FlexAttention, mask made before", "mask made in the call")
    return (*head, "on FlashAttention-4", "ours, ms"), rows


SUITES = ("headline", "hard", "models", "lengths")


def all_cells(suites: tuple[str, ...] = SUITES) -> list[tuple[tuple, dict]]:
    """Shapes and times of causal attention in several suites."""
    return [item for suite in suites for item in timed(suite).items()]


def targets():
    headline, hard = timed("headline"), timed("hard")
    k = 1024
    grouped = [headline["llama-3.1-8b", b, n * k] for b, n in ((16, 2), (4, 8), (1, 32))]
    plain = [hard[key] for key in (("llama-3.1-70b", 4, 8 * k), ("llama-2-7b", 8, 4 * k), ("llama-2-7b", 32, k))]
    small, wide = hard["pythia-4096", 8, 4 * k], [hard[m, 4, 8 * k] for m in ("gemma-7b", "qwen3.5-heads")]
    forward = [better(cells, "forward") for _, cells in all_cells()]
    met = sum(value >= 1.05 for value in forward)
    three = lambda values: ", ".join(f"{value:.3f}" for value in values)
    cases = (
        ("forward, every cell", 1.05, forward, f"{met} of {len(forward)} cells; lowest {min(forward):.3f}"),
        ("forward, 32/2 of 256, 4 × 8k", 1.03, [better(wide[1], "forward")], None),
        ("backward, 32/8 of 128, 16 × 2k, 4 × 8k, 1 × 32k", 1.05, [better(c, "backward") for c in grouped], None),
        ("backward, 64/8 4 × 8k, 32/32 8 × 4k, 32/32 32 × 1k", 1.0, [better(c, "backward") for c in plain], None),
        ("backward, 64/64 of 64, 8 × 4k", 1.03, [better(small, "backward")], None),
        (
            "backward, 16/16 and 32/2 of 256, 4 × 8k", 530, [c["seal-cuda", "backward"]["tflops"] for c in wide],
            "{} TFLOP/s".format(" and ".join(f"{c['seal-cuda', 'backward']['tflops']:.0f}" for c in wide)),
        ),
    )  # fmt: skip
    rows = [
        (what, f"{asked}" if asked != 530 else "530 TFLOP/s", words or three(values),
         "met" if all(v >= asked for v in values) else "missed")
        for what, asked, values, words in cases
    ]  # fmt: skip
    return ("target", "at least", "measured", ""), rows


def readme():
    rows = []
    for (model, _, tokens), cells in timed("headline").items():
        name = {"llama-3.1-8b": "head_dim 128, 32/8 heads, ", "gemma-7b": "head_dim 256, 16 heads, "}.get(
            model, "head_dim 64, 64 heads, "
        )
        first = tokens == min(n for m, _, n in timed("headline") if m == model)
        rows.append((f"{name if first else ''}{tokens // 1024}k", *(both(cells, peer) for peer in FA), rate(cells)))
    return ("", "of FlashAttention-3", "of FlashAttention-4", "ours, TFLOP/s"), rows


HINTS = stored("hints")
BUILDS = {
    "loads": "loads say nothing",
    "all": "loads and dQ's sums say nothing",
    "keys": "backward: K and V evict_first",
}


def hint_ratio(shape: str, build: str, way: str) -> float:
    """The landed build's time by the other's: above 1 the other is faster."""
    times = HINTS[f"{shape} {way}"]["ms"]
    return times["landed"] / times[build]


def hint_shapes() -> list[str]:
    return list(dict.fromkeys(name.rsplit(" ", 1)[0] for name in HINTS))


def hints(way: str):
    """One row a build: geometric mean, lowest, highest."""
    rows = []
    for build, name in BUILDS.items():
        found = [hint_ratio(shape, build, way) for shape in hint_shapes()]
        mean = math.exp(sum(map(math.log, found)) / len(found))
        same = way == "forward" and build == "keys"  # its forward kernels are the landed ones
        rows.append(
            ("the landed kernels once more" if same else name, *(f"{v:.3f}" for v in (mean, min(found), max(found))))
        )  # noqa: E501
    if way == "forward":
        rows[1] = ("the same kernels once more", *rows[1][1:])  # dQ's sums are the backward's
    return (f"{way}: what the copies say", "geometric mean", "lowest", "highest"), rows


TABLES = {
    "docs/benchmarks.md": [
        functools.partial(beside_peers, "headline"), functools.partial(beside_peers, "hard"), models, lengths,
        rope_attention, rope, attention_o_proj, masked, targets,
    ],
    "README.md": [readme],
    "docs/kernel_notes_forward.md": [functools.partial(hints, "forward")],
    "docs/kernel_notes_backward.md": [functools.partial(hints, "backward")],
}  # fmt: skip


def build_name(build) -> str:
    if isinstance(build, functools.partial):
        return f"{build.func.__name__}-{build.args[0]}"
    return build.__name__


@pytest.mark.parametrize(
    "page, build", [(page, build) for page, builders in TABLES.items() for build in builders],
    ids=lambda value: value if isinstance(value, str) else build_name(value),
)  # fmt: skip
def test_table_says_what_was_timed(page, build):
    head, rows = build()
    found = tables_of(ROOT / page)
    assert head in found, f"{page} has no table {' | '.join(head)}"
    wrong = [f"{a} should be {b}" for a, b in zip(found[head], rows, strict=False) if a != b]
    assert found[head] == rows, "\n".join(wrong) or "rows are missing, or too many"


# ---------------------------------------------------------------------------------------------------------- the prose


def span(values) -> str:
    """ "low to high", or one of them where they read the same."""
    return " to ".join(dict.fromkeys(f"{value:.2f}" for value in (min(values), max(values))))


def suites() -> dict[tuple, dict[str, dict]]:
    """Attention at each shape, by the suites that timed it."""
    found: dict[tuple, dict[str, dict]] = {}
    for suite in (*SUITES, "masks"):
        for key, cells in timed(suite).items():
            found.setdefault(key, {})[suite] = cells
    return found


MACHINE = ("driver", "torch", "cuda", "cudnn", "triton", "commit")
LONG = ("llama-3.1-8b", 1, 32 * 1024)


def drift(way: str) -> list[float]:
    """How far a ratio differs from suite to suite: highest by lowest, for each shape and peer that two suites timed."""
    found = []
    for shapes in suites().values():
        for peer in FA:
            known = [ratio(cells, peer, way) for cells in shapes.values() if (peer, way) in cells]
            if len(known) > 1:
                found.append(max(known) / min(known))
    return found


def host(suite: str) -> list[int]:
    return [int(us) for us in re.findall(r"(\d+) µs", stored(suite)["environment"]["host_us"])]


def benchmarks():
    for way in WAYS:
        every = [better(cells, way) for _, cells in all_cells()]
        mean = math.exp(sum(map(math.log, every)) / len(every))
        yield f"the {way} {min(every):.2f} to {max(every):.2f} (geometric mean {mean:.2f})"
    yield f"Over these {len(every)} cells"
    short = [better(cells, "forward") for (*_, tokens), cells in all_cells() if tokens == 1024]
    yield f"behind at 1k ({span(short)})"
    alone = [better(timed("models")["gemma-7b", b, n * 1024], "backward") for b, n in ((16, 1), (1, 16))]
    yield "from {:.2f} at 1k to {:.2f} at 16k".format(*alone)
    known = [cells for _, cells in all_cells() if ("sdpa-cudnn", "forward") in cells]
    cudnn = [[ratio(cells, "sdpa-cudnn", way) for cells in known] for way in WAYS]
    yield f"Of SDPA's cuDNN ours is {span(cudnn[0])} times as fast forward and {span(cudnn[1])} backward"
    most = {way: 100 * (max(drift(way)) - 1) for way in WAYS}
    yield f"differ by up to {most['forward']:.0f} % forward and {most['backward']:.0f} % backward"
    middle = sorted(drift("forward") + drift("backward"))
    yield f"half of them by less than {100 * (middle[len(middle) // 2] - 1):.1f} %"
    at = [f"{ratio(cells, 'fa3', 'forward'):.2f} in `{suite}`" for suite, cells in suites()[LONG].items()]
    yield "The largest: 1 × 32k forward is beside FlashAttention-3 {}, {} and {}".format(*at)
    known = [ratio(cells, "fa3", "forward") for cells in suites()[LONG].values()]
    assert max(drift("forward") + drift("backward")) == max(known) / min(known)
    machine = {name: {stored(s)["environment"][name] for s in (*SUITES, "masks", "headline-ops")} for name in MACHINE}
    assert all(len(values) == 1 for values in machine.values())
    driver, torch, cuda, cudnn, triton, commit = (values.pop() for values in machine.values())
    torch, triton = (".".join(version.split(".")[:2]) for version in (torch, triton))
    cudnn = f"{int(cudnn) // 10_000}.{int(cudnn) // 100 % 100}"
    yield f"driver {driver}, torch {torch} + CUDA {cuda}, cuDNN {cudnn}, Triton {triton}), commit {commit};"
    wide = sorted(float(r["ms_p80"]) / float(r["ms_p20"]) - 1 for _, cells in all_cells() for r in cells.values())
    yield f"within {100 * wide[3 * len(wide) // 4]:.0f} % of each other in three quarters of these rows, {100 * wide[-1]:.0f} % at most"  # noqa: E501
    rates = [float(stored(suite)["environment"]["matmul_tflops"]) for suite in (*SUITES, "masks", "headline-ops")]
    yield f"matrix product between {min(rates):.0f} and {max(rates):.0f} TFLOP/s"
    full = [timed("masks")["llama-3.1-8b", 1, n * 1024] for n in (32, 128)]
    yield f"FlexAttention's full causal attention takes {both(full[0], 'flex')} times as long at 32k, {both(full[1], 'flex')} at 128k"  # noqa: E501
    of_fa3 = [[ms(c, "fa3", way) / ms(c, "seal-triton", way) for c in full] for way in WAYS]
    yield f"Our Triton kernels reach {span(of_fa3[0])} of FlashAttention-3 forward and {span(of_fa3[1])} backward"
    far = step(timed("masks")["llama-3.1-8b-streaming", 1, 128 * 1024], "seal-cuda") / step(full[1], "seal-cuda")
    yield f"streaming(4, 4096) at 128k takes {share(far)} of full attention (target: at most .10)"
    assert far <= 0.10


def opening():
    """The README's."""
    ops = timed("headline-ops", "rope_attention")
    triton = [[ratio(c, "seal-triton", way) for c in ops.values()] for way in WAYS]
    yield f"Triton kernels take {span(triton[0])} times as long forward and {span(triton[1])} backward"
    total = [
        step(ops["llama-3.1-8b", b, n * 1024], "hf-cudnn") / step(ops["llama-3.1-8b", b, n * 1024], "seal-cuda")
        for b, n in ((16, 2), (4, 8), (1, 32))
    ]
    yield "`rope_attention` with its backward is {:.2f} / {:.2f} / {:.2f} times as fast at 2k / 8k / 32k".format(*total)
    of_copy = [100 * float(c["seal-cuda", "forward"]["copy_share"]) for c in timed("headline-ops", "rope").values()]
    yield f"moves {min(of_copy):.0f} to {max(of_copy):.0f} % of the card's measured copy bandwidth"
    found, full = timed("masks"), timed("masks")["llama-3.1-8b", 1, 32 * 1024]
    groups, stream = (found[model, 1, 32 * 1024] for model in MASKS)
    shares = [step(c, "seal-cuda") / step(full, "seal-cuda") for c in (groups, stream)]
    left = {f"{pairs(c) / pairs(full):.2f}" for c in (groups, stream)}
    yield f"take {shares[0]:.2f} of full causal attention, forward and backward, StreamingLLM's mask with 4,096 keys {shares[1]:.2f}"  # noqa: E501
    assert len(left) == 1
    yield f"({left.pop()} of the pairs are left in both)"
    hard = timed("hard")
    short, many = hard["llama-2-7b", 32, 1024], hard["llama-3.1-70b", 4, 8192]
    both_peers = lambda c: " and ".join(f"{ratio(c, peer, 'backward'):.2f}" for peer in FA)  # noqa: E731
    yield f"short sequences without GQA (32/32 heads, 1k: {both_peers(short)})"
    yield f"64/8 heads at 8k ({both_peers(many)})"
    most = max(max(drift(way)) for way in WAYS) - 1
    yield f"moves by up to {100 * most:.0f} % from run to run"
    low, high = host("lengths"), host("headline")
    every = [host(suite) for suite in (*SUITES, "masks", "headline-ops")]
    assert low == [min(column) for column in zip(*every)]
    yield f"costs the host {low[0]} µs without gradients and {low[2]} with (SDPA: {low[1]} and {low[3]}) when it is quiet"  # noqa: E501
    assert high[2] == max(times[2] for times in every)
    yield f"{high[0]} and {high[2]} (SDPA: {high[1]} and {high[3]}) when it is busy"


def backward_notes():
    headline, hard, k = timed("headline"), timed("hard"), 1024
    of = lambda cells: share(better(cells, "backward")) if better(cells, "backward") < 0.995 else f"{better(cells, 'backward'):.2f}"  # fmt: skip # noqa: E501,E731
    grouped = {n: of(headline["llama-3.1-8b", max(1, 32 // n), n * k]) for n in (2, 8, 32, 128)}
    yield f"8k ({grouped[8]}), 32k ({grouped[32]}), 128k ({grouped[128]})"
    small = [of(headline["pythia-4096", b, n * k]) for b, n in ((8, 4), (2, 16))]
    yield f"hd64 4k ({small[0]}) and 16k ({small[1]})"
    yield f"32/32 1k ({of(hard['llama-2-7b', 32, k])}) and 4k ({of(hard['llama-2-7b', 8, 4 * k])})"
    yield f"64/8 8k × 4 ({of(hard['llama-3.1-70b', 4, 8 * k])})"
    wide = [hard[m, 4, 8 * k] for m in ("gemma-7b", "qwen3.5-heads")]
    yield f"above at 2k ({grouped[2]}); level at hd256 ({of(wide[0])} and {of(wide[1])})"
    rates = [c["seal-cuda", "backward"]["tflops"] for c in (*wide, headline["gemma-7b", 4, 8 * k])]
    yield f"aimed at for hd256 are {min(rates):.0f} to {max(rates):.0f}"
    found = [hint_ratio(shape, build, "backward") - 1 for shape in hint_shapes() for build in BUILDS]
    yield f"single shapes move by up to {100 * max(map(abs, found)):.0f} % both ways"
    yield from hint_notes()
    yield f"at batch 4 ({hard['llama-3.1-70b', 4, 8 * k]['seal-cuda', 'backward']['tflops']:.0f} TFLOP/s)"


def rope_notes():
    rows = timed("lengths"), timed("lengths", "rope_attention")
    cell = lambda n: [ms(r["llama-3.1-8b", max(1, 32 // n), n * 1024], "seal-cuda", "forward") for r in rows]  # noqa: E731
    for n in (1, 2, 4, 8, 16, 32):
        plain, turned = cell(n)
        yield f"{n}k × {32 // n} {plain:.3f} → {turned:.3f} ({100 * (turned / plain - 1):.1f} %)"
    for n in (64, 128):
        plain, turned = cell(n)
        assert turned < plain
        yield f"{n}k {plain:.1f} → {turned:.1f}"
    alone = [c["seal-cuda", "forward"] for c in timed("headline-ops", "rope").values()]
    speeds = [row["gbps"] for row in alone]
    eager = [c["hf-rotary", "forward"]["gbps"] for c in timed("headline-ops", "rope").values()]
    yield f"{min(speeds):,.0f} to {max(speeds):,.0f} GB/s, {100 * min(float(r['copy_share']) for r in alone):.0f} to {100 * max(float(r['copy_share']) for r in alone):.0f} % of the copy"  # noqa: E501
    times = [
        ms(c, "hf-rotary", "forward") / ms(c, "seal-cuda", "forward") for c in timed("headline-ops", "rope").values()
    ]
    yield f"{min(eager):.0f} to {max(eager):.0f} GB/s of Hugging Face's eager rotary"
    yield f"eager rotary: {min(times):.0f} to {max(times):.0f} times faster"
    more = [turned - plain for plain, turned in (cell(n) for n in (1, 2, 4, 8, 16))]
    yield f"Up to 16k that is {span(more)} ms, a little less than RoPE alone takes ({alone[0]['ms']:.3f} ms at 32,768"


def hint_notes():
    assert all(not case["errors"] for case in HINTS.values()) and len(hint_shapes()) == 10
    yield "four builds in turn over ten shapes"


PROSE = {
    "docs/benchmarks.md": benchmarks,
    "README.md": opening,
    "docs/kernel_notes_backward.md": backward_notes,
    "docs/kernel_notes_rope.md": rope_notes,
    "docs/kernel_notes_forward.md": hint_notes,
}


@pytest.mark.parametrize("page", PROSE)
def test_sentence_says_what_was_timed(page):
    wrong = not_said(ROOT / page, PROSE[page]())
    assert not wrong, f"{page} does not say: " + " | ".join(wrong)


def test_where_the_backward_leads():
    """What docs/benchmarks.md says in words about the cells of all suites."""
    for key, cells in all_cells():
        row, found = cells["seal-cuda", "backward"], better(cells, "backward")
        grouped, tokens = row["heads"] > row["kv_heads"], row["seqlen"]
        if row["head_dim"] == 64 or (row["head_dim"] == 128 and (not grouped or tokens >= 8192)):
            assert found < 1, key
        elif row["head_dim"] == 128 and tokens <= 2048:
            assert found > 1.02, key
        elif row["head_dim"] == 128:
            assert 0.97 < found < 1.03, key
        elif grouped:
            assert found > 0.99, key
