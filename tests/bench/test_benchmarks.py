"""The benchmark harness on the CPU: its oracle, its gate, its registry, its files."""

import csv
import dataclasses
import json
import pathlib
import types

import pytest
import torch
from benchmark_scripts import load_script

import seal_ops
from seal_ops import bench, masks
from seal_ops.bench import contestants, gate, report, run, shapes, timing
from seal_ops.bench.host_time import host_times, sentence
from seal_ops.ops.backends import reference
from seal_ops.ops.visibility import Visibility

SEEN = [
    Visibility.of(),
    Visibility.of(True, 37),
    Visibility(*masks.streaming(3, 37).resolve(1)),
    Visibility(*masks.shifted_groups(40, shifted_heads=1, sinks=2).resolve(3)),
]

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("seen", SEEN, ids=str)
def test_the_block_oracle_agrees_with_the_reference(seen):
    """One key/value head with a group of 3: values and gradients against the library's whole-matrix oracle."""
    q, grad_out = torch.randn(2, 1, 150, 3, 16, dtype=torch.float64)
    k, v = torch.randn(2, 1, 150, 1, 16, dtype=torch.float64)
    scale = torch.randn(3, 16, dtype=torch.float64)
    out, lse = reference.attention(q, k, v, scale, mask=seen)
    grads = reference.attention_backward(
        grad_out, None, q, k, v, out, lse, scale, None, needs=(True,) * 4 + (False,), mask=seen
    )
    found = gate.attention_slice(q[0], k[0, :, 0], v[0, :, 0], grad_out[0], scale, seen)
    for name, expected in (
        ("out", out[0]),
        ("grad_q", grads[0][0]),
        ("grad_k", grads[1][0, :, 0]),
        ("grad_v", grads[2][0, :, 0]),
        ("grad_scale", grads[3]),
    ):
        torch.testing.assert_close(found[name], expected, rtol=1e-9, atol=1e-9)


def test_the_gate_sees_a_wrong_tail_and_a_nan():
    exact = torch.randn(1600, 4) / torch.arange(1, 1601)[:, None]
    wrong_tail = exact.clone()
    wrong_tail[-100:] *= 1.1
    assert (
        gate.error(wrong_tail, exact, by_section=False) < 1e-3 < 0.09 < gate.error(wrong_tail, exact, by_section=True)
    )
    broken = exact.clone()
    broken[3, 1] = torch.nan
    assert gate.error(broken, exact, by_section=True) == float("inf")


def test_a_wrong_contestant_is_reported_and_never_timed():
    (right,) = (c for c in contestants.all_contestants() if c.name == "seal-cpu")

    def unmasked(operation, p):
        wrong = right.prepare(operation, p)
        return contestants.Run(lambda: torch.cat((wrong.forward()[:, :-1], p.q[:, -1:]), 1), wrong.inputs)

    cheat = dataclasses.replace(right, name="cheat", prepare=unmasked)
    device = torch.device("cpu")
    session = run.Session(device, torch.float32, timing.Clock(device), None, row_ms=2)
    rows = run.measure_shape("attention", shapes.SUITES["smoke"][0], [right, cheat], session)
    assert [(r["contestant"], r["direction"], r["status"][:5]) for r in rows] == [
        ("cheat", "", "wrong"),
        ("seal-cpu", "forward", "ok"),
        ("seal-cpu", "backward", "ok"),
    ]
    assert rows[0]["ms"] == "" and rows[0]["worst_error"] > 0.1


def test_a_contestant_that_ignores_the_mask_is_wrong():
    (right,) = (c for c in contestants.all_contestants() if c.name == "seal-cpu")

    def causal(operation, p):
        return contestants.Run(lambda: seal_ops.attention(p.q, p.k, p.v, p.scale), (p.q, p.k, p.v, p.scale))

    device = torch.device("cpu")
    session = run.Session(device, torch.float32, timing.Clock(device), None, row_ms=2)
    for model, wrong in (("tiny-s2", ["cheat"]), ("tiny", [])):
        group = [right, dataclasses.replace(right, name="cheat", prepare=causal)]
        rows = run.measure_shape("attention", shapes.Shape(model, 1, 96), group, session)
        assert [r["contestant"] for r in rows if r["status"].startswith("wrong")] == wrong
        assert all(r["status"] == "ok" for r in rows if r["contestant"] == "seal-cpu")


def test_every_mask_of_the_suite_has_its_peers_and_a_missing_one_is_said(monkeypatch):
    """FlexAttention with its mask made before and in the call, and FlashAttention-4 with the mask as a callback."""
    peers_of_masks = ("flex", "flex-mask", "flex-fa4")
    found = {c.name: c for c in contestants.all_contestants() if c.name in peers_of_masks}
    masked = [shape for shape in shapes.SUITES["masks"] if shape.mask is not None]
    kinds = {(shape.model.removeprefix("llama-3.1-8b-"), shape.seqlen // 1024) for shape in masked}
    assert kinds == {(kind, length) for kind in ("s2", "streaming") for length in (32, 128)}
    assert masks.streaming(4, 4096) in [shape.mask for shape in masked if shape.seqlen == 128 * 1024]
    monkeypatch.setattr(contestants.peers, "missing_fa4", lambda: "FlashAttention-4 is not installed")
    for shape in masked:
        problem = types.SimpleNamespace(device=torch.device("cuda"), shape=shape)
        assert [c.why_not("attention", problem) for c in found.values()] == [
            None,
            None,
            contestants.peers.missing_fa4(),
        ]
    tiny = shapes.Shape("tiny-s2", 1, 48)
    device = torch.device("cpu")
    session = run.Session(device, torch.float32, timing.Clock(device), None, row_ms=2)
    rows = run.measure_shape("attention", tiny, list(found.values()), session)
    assert {r["contestant"]: r["status"] for r in rows} == dict.fromkeys(peers_of_masks, "runs on cuda")


@pytest.mark.parametrize("seen", SEEN, ids=str)
def test_the_work_of_a_mask_is_the_pairs_that_it_shows(seen):
    for heads, sq, sk in ((1, 150, 150), (6, 40, 90), (4, 90, 30)):
        assert seen.count(sq, sk, heads) == seen.allowed(sq, sk, heads).double().sum((1, 2)).mean()


def test_a_contestant_that_fails_gets_a_row_and_the_others_go_on():
    (right,) = (c for c in contestants.all_contestants() if c.name == "seal-cpu")

    def explode(operation, p):
        raise KeyError("no kernel image\nsecond line")

    device = torch.device("cpu")
    session = run.Session(device, torch.float32, timing.Clock(device), None, row_ms=2)
    rows = run.measure_shape(
        "rope", shapes.SUITES["smoke"][0], [dataclasses.replace(right, name="broken", prepare=explode), right], session
    )
    assert [(r["contestant"], r["status"]) for r in rows] == [
        ("broken", "failed: KeyError: 'no kernel image\\nsecond line'"),
        ("seal-cpu", "ok"),
    ]


def test_the_command_writes_rows_with_the_environment_and_a_plot(tmp_path, capsys):
    names = "seal-cpu,sdpa,hf-sdpa,hf-rotary,scaled-sdpa,peft-ia3"
    assert (
        bench.main(
            [
                "--suite",
                "smoke",
                "--only",
                names,
                "--row-ms",
                "2",
                "--output",
                str(tmp_path),
                "--name",
                "r",
                "--device",
                "cpu",
            ]
        )
        == 0
    )
    with open(tmp_path / "r.csv") as file:
        rows = list(csv.DictReader(file))
    timed = {(r["operation"], r["contestant"], r["direction"]) for r in rows if r["status"] == "ok"}
    for operation in set(contestants.OPERATIONS) - {"decode"}:
        assert (operation, "seal-cpu", "forward") in timed
    assert ("attention", "sdpa", "backward") in timed and ("rope_attention", "hf-sdpa", "backward") in timed
    assert ("attention_o_proj", "peft-ia3", "backward") in timed
    assert {r["torch"] for r in rows} == {torch.__version__} and all(
        r["command"].startswith("seal bench --suite smoke") for r in rows
    )
    assert all(
        float(r["ms_p20"]) <= float(r["ms"]) <= float(r["ms_p80"]) and float(r["worst_error"]) < 1e-4
        for r in rows
        if r["status"] == "ok"
    )
    stored = json.loads((tmp_path / "r.json").read_text())
    assert len(stored["rows"]) == len(rows) and stored["environment"]["torch"] == torch.__version__
    table = (tmp_path / "r.md").read_text()
    assert "--output FOLDER" in stored["command"]
    assert str(tmp_path) not in json.dumps(stored) + table, "a machine's folders are in the results"
    assert "Times faster seal_ops (cpu) is" in table and "PEFT (IA)³" in table
    forward, sdpa = (
        next(
            float(r["ms"])
            for r in rows
            if (r["operation"], r["contestant"], r["direction"]) == ("attention", name, "forward")
        )
        for name in ("seal-cpu", "sdpa")
    )
    assert f"| tiny 48 × 2 | {sdpa / forward:.2f} / " in table
    assert (tmp_path / "r.png").read_bytes()[:4] == b"\x89PNG"
    assert "seal-cpu" in capsys.readouterr().out


def test_decoding_is_counted_in_bytes_and_checked(tmp_path, monkeypatch):
    """The suite `decode` means the operation `decode`; a contestant that misses the last key is wrong."""
    monkeypatch.setitem(shapes.SUITES, "decode", [shapes.Shape("tiny", 2, 48)])
    honest = contestants.all_contestants()
    cheat = dataclasses.replace(
        next(c for c in honest if c.name == "decode-sdpa"),
        name="cheat",
        prepare=lambda operation, p: contestants.Run(lambda: p.v[:, -1:].repeat_interleave(2, 2)),
    )
    monkeypatch.setattr(run, "all_contestants", lambda folder=None: [*honest, cheat])
    assert (
        bench.main(
            [
                "--suite",
                "decode",
                "--only",
                "seal-cpu,decode-sdpa,cheat",
                "--row-ms",
                "2",
                "--out",
                str(tmp_path),
                "--name",
                "d",
                "--device",
                "cpu",
            ]
        )
        == 1
    )
    with open(tmp_path / "d.csv") as file:
        rows = {r["contestant"]: r for r in csv.DictReader(file)}
    assert rows["cheat"]["status"].startswith("wrong") and {rows[n]["status"] for n in ("seal-cpu", "decode-sdpa")} == {
        "ok"
    }
    assert {r["operation"] for r in rows.values()} == {"decode"} and {r["direction"] for r in rows.values()} == {
        "",
        "forward",
    }
    assert rows["seal-cpu"]["gbps"] and not rows["seal-cpu"]["tflops"]
    assert shapes.Shape("llama-3.1-8b", 3, 32768).moved_elements("decode") == 3 * 2 * 32768 * 8 * 128
    assert shapes.Shape("gemma-3-4b-local", 1, 32768).moved_elements("decode") == 2 * 1024 * 4 * 256
    assert "GB/s read" in (tmp_path / "d.md").read_text() and (tmp_path / "d.png").exists()


def test_parts_are_measured_one_by_one_resumed_and_merged(tmp_path, capsys):
    options = [
        "--shape",
        "tiny:48:1",
        "--shape",
        "tiny:33:2",
        "--only",
        "seal-cpu,sdpa,hf-sdpa,hf-rotary",
        "--row-ms",
        "2",
        "--output",
        str(tmp_path),
        "--device",
        "cpu",
    ]
    assert bench.main([*options, "--name", "cut", "--part", "1/2", "--ops", "attention"]) == 0
    first = json.loads((tmp_path / "cut-part1of2.json").read_text())["rows"]
    assert bench.main([*options, "--name", "cut", "--part", "1/2", "--resume"]) == 0
    rows = json.loads((tmp_path / "cut-part1of2.json").read_text())["rows"]
    assert (
        rows[: len(first)] == first
        and {r["operation"] for r in rows} == set(contestants.OPERATIONS) - {"decode"}
        and len({r["seqlen"] for r in rows}) == 1
    )
    assert bench.main([*options, "--name", "cut", "--part", "2/2"]) == 0
    parts = [str(tmp_path / f"cut-part{n}of2.json") for n in (1, 2)]
    assert bench.main(["--merge", *parts, "--name", "whole", "--output", str(tmp_path)]) == 0
    with open(tmp_path / "whole.csv") as file:
        merged = list(csv.DictReader(file))
    assert {(r["seqlen"], r["batch"]) for r in merged} == {("48", "1"), ("33", "2")} and "--part 1/2" in merged[0][
        "command"
    ]
    assert len(json.loads((tmp_path / "whole.json").read_text())["runs"]) == 2
    assert "| tiny 33 × 2 |" in (tmp_path / "whole.md").read_text() and (tmp_path / "whole.png").exists()
    capsys.readouterr()
    for arguments, expected in (
        (["--merge", parts[0], parts[0]], "must get every operation at a shape from one file"),
        (["--merge", str(tmp_path / "whole.md")], "expected a JSON file that seal bench wrote"),
    ):
        with pytest.raises(SystemExit):
            bench.main([*arguments, "--output", str(tmp_path)])
        assert expected in capsys.readouterr().err


@pytest.mark.parametrize("parts", [1, 2, 3, 4, 9])
def test_parts_cover_every_shape_once(parts):
    whole = shapes.SUITES["headline"]
    split = [shapes.part_of(whole, f"{n}/{parts}") for n in range(1, parts + 1)]
    assert sorted(map(str, sum(split, []))) == sorted(map(str, whole)) and (parts < 2 or split[0] == whole[-1:])


def test_no_time_left_means_no_rows_and_it_is_said(tmp_path, capsys):
    bench.main(["--suite", "smoke", "--budget-s", "0", "--output", str(tmp_path), "--device", "cpu", "--no-compiled"])
    assert "rows were left out" in capsys.readouterr().out and not list(tmp_path.iterdir())


ONE_ROW = "--shape tiny:16 --ops rope --only seal-cpu --row-ms 1 --device cpu".split()


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--shape", "gpt:8k"], "--shape must be MODEL:LENGTH"),
        (["--shape", "gemma-7b:8x"], "a length like 8192 or 8k"),
        (["--part", "3/2"], "--part must be I/N"),
        (["--part", "x"], "--part must be I/N"),
        (["--ops", "softmax"], "--ops must name some of"),
        (["--only", "fa9"], "--only must name some of"),
        (["--ops", ","], "--ops must name some of"),
        (["--device", "banana"], "--device must be cpu, cuda or cuda:N, got 'banana'"),
        (["--suite", "training", "--device", "banana"], "--device must be cpu, cuda or cuda:N, got 'banana'"),
        (["--device", "meta"], "--device must be cpu, cuda or cuda:N, got 'meta'"),
        (["--device", "cuda:99"], "--device must be one that torch sees, got cuda:99 with"),
        (["--budget-s", "nan"], "--budget-s must be at least 0, got nan"),
        (["--budget-s", "-1"], "--budget-s must be at least 0, got -1"),
        (["--row-ms", "0"], "--row-ms must be above 0 and finite, got 0"),
        ([*ONE_ROW, "--output", "/dev/null/x"], "a writable folder"),
    ],
)
def test_bad_arguments_get_one_sentence(arguments, sentence, capsys):
    with pytest.raises(SystemExit) as stopped:
        bench.main(arguments)
    assert stopped.value.code == 2 and sentence in capsys.readouterr().err


def test_the_module_says_the_defaults_too(capsys):
    """`python -m seal_ops.bench` is `seal bench`."""
    with pytest.raises(SystemExit):
        bench.main(["--help"])
    assert "start no new rows after this time (default: 600)" in " ".join(capsys.readouterr().out.split())


def test_no_memory_is_said_where_none_is_counted(tmp_path, capsys):
    bench.main([*ONE_ROW, "--output", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "seal-cpu" in printed and "MiB" not in printed


def test_shapes_and_their_work():
    shape = shapes.parse_shape("llama-3.1-8b:8k")
    assert (shape.batch, shape.seqlen) == (4, 8192) and shape in shapes.SUITES["headline"]
    assert shape.forward_flops == 4 * 4 * 32 * 8192 * 8192 / 2 * 128
    windowed = shapes.Shape("gemma-3-4b-local", 1, 4096)
    exact = sum(min(i + 1, 1024) for i in range(4096))
    assert abs(windowed.pairs / exact - 1) < 1e-3
    assert {s.model for suite in shapes.SUITES.values() for s in suite} <= set(shapes.MODELS)


def test_times_are_the_median_and_every_call_is_taken_at_least_twice():
    times = timing.in_turn(
        {"a": lambda: None, "b": lambda: torch.ones(200, 200) @ torch.ones(200, 200)},
        timing.Clock(torch.device("cpu")),
        1,
    )
    assert all(t.calls >= 2 and t.p20 <= t.median <= t.p80 for t in times.values())
    assert timing.Times.of([3.0, 1.0, 2.0, 10.0, 2.0]) == timing.Times(2.0, 2.0, 10.0, 5)


def test_a_plot_of_nothing_is_no_plot(tmp_path):
    assert report.plot([], [], str(tmp_path / "x.png"), "", {}) is False and not list(tmp_path.iterdir())


def test_a_plot_of_what_has_no_backward_has_no_empty_panel(tmp_path, monkeypatch):
    figure = pytest.importorskip("matplotlib.figure")
    stored = pathlib.Path(__file__).parents[2] / "benchmarks/results/decode-h200-3204aa2.json"
    rows, drawn = json.loads(stored.read_text())["rows"], []
    save = figure.Figure.savefig
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, *a, **k: (drawn.extend(self.axes), save(self, *a, **k)))
    assert (
        report.plot(rows, contestants.all_contestants(), str(tmp_path / "x.png"), "", {})
        and (tmp_path / "x.png").exists()
    )
    assert drawn and all(axes.has_data() for axes in drawn)


def test_host_time_of_a_call_with_and_without_gradients():
    times = host_times(torch.device("cpu"), torch.float32, calls=1, rounds=1)
    assert list(times) == ["seal_ops, without", "SDPA, without", "seal_ops, with gradients", "SDPA, with gradients"]
    assert all(value > 1 for value in times.values())
    assert sentence(dict.fromkeys(times, 12.34)).count(" 12 µs") == 4


def test_decoding_speed_keeps_its_rows(monkeypatch, tmp_path, capsys):
    """The benchmark's file: rows with their environment, continued, and refused for other settings."""
    script = load_script("decoding_speed")
    output = tmp_path / "decoding.json"
    seen = []
    measured_row = script.measured_row
    monkeypatch.setattr(script, "measured_row", lambda *a: (seen.append(a[2]), measured_row(*a))[1])

    def run(*lengths, cases=3):
        words = f"decoding_speed --model {ROOT}/models/seal-tiny --cases {cases} --tokens 3 --compared 1".split()
        monkeypatch.setattr("sys.argv", [*words, "--output", str(output), "--lengths", *map(str, lengths)])
        script.main()
        return json.loads(output.read_text())

    first = run(96)
    (row,) = first["rows"]
    assert row["tokens"] == 96 and row["generate"] > 0 and row["fixed cache"] > 0 and row["at once"] >= 1
    assert first["settings"]["model"] == "seal-tiny" and "torch" in first["environment"]
    both = run(64, 96)
    assert [r["tokens"] for r in both["rows"]] == [64, 96] and both["rows"][1] == row and seen == [96, 64]
    with pytest.raises(ValueError, match="must be of the same settings, got another cases"):
        run(32, cases=4)
