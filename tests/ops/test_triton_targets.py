"""compile_triton_targets.py: a few kernels compile for GPUs that are not here, and what does not fit is said."""

import dataclasses
import os
import pathlib
import subprocess
import sys
import types

import pytest

pytest.importorskip("triton")

from compile_triton_targets import SHARED, Use, chosen, failures, markdown  # noqa: E402

SCRIPT = pathlib.Path(__file__).parents[1] / "compile_triton_targets.py"


def test_the_forward_compiles_for_ampere_and_blackwell():
    import triton.backends.nvidia

    if not (pathlib.Path(triton.backends.nvidia.__file__).parent / "bin" / "ptxas").exists():
        pytest.skip("this Triton brings no assembler")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    done = subprocess.run([sys.executable, SCRIPT, "--quick", "--all"], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("sm_")]
    assert {line.split()[0] for line in lines} == {"sm_80", "sm_120"}
    assert all(" registers, " in line and "KB shared" in line for line in lines)


def uses(*shared):
    """A kernel on sm_86 whose tiles need so many KB."""
    return [
        Use(86, "dq", "bfloat16", 64, "plain", (64, 64, 4, n, None), n, kb << 10, 4, 128, 0, "too much" * (kb > 99))
        for n, kb in enumerate(shared)
    ]


def test_a_kernel_without_a_tile_that_fits_is_a_failure():
    assert SHARED[86] == 99 << 10
    assert not failures(uses(120, 60, 30)) and [u.number for u in chosen(uses(120, 60, 30))] == [1]
    (sentence,) = failures(uses(120, 110))
    assert sentence.startswith("no tile fits: sm_86 dq bfloat16 head_dim 64 plain 64x64 w4 s0: 120.0 KB shared")
    assert not chosen(uses(120, 110))


def test_the_table_shows_what_is_chosen():
    spilling = [dataclasses.replace(use, stack=48) for use in uses(30)]
    assert "| dq bfloat16 64 | 64×64 w4 s0: 30 KB, 128 r, 48 B stack |" in markdown(spilling)


@pytest.mark.parametrize("major, hopper", [(8, False), (9, True), (10, True), (12, False)])
def test_tiles_go_by_where_products_take_their_operands(monkeypatch, major, hopper):
    """Graphics cards of Blackwell (12) have TMA, but Hopper's way of reading and its tiles spill kilobytes there."""
    from seal_ops.ops.backends.triton import configs, host

    monkeypatch.setattr(host, "_capability", lambda device: major)
    like = types.SimpleNamespace(is_cuda=True, shape=(1, 8, 2, 128), device="cuda:0", element_size=lambda: 2)
    assert host.uses_tma(like) == hopper
    assert (configs.candidates("dkdv", like) == configs._HOPPER["dkdv"][128]) == hopper
