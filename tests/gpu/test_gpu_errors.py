"""Every sentence of csrc/ops, provoked with CUDA tensors, each in a process of its own. A check that crashes takes
its process with it, and the test names it. One table (fixtures/wrong_calls.py) serves this and the CPU's tests."""

import concurrent.futures
import multiprocessing
import os
import pathlib

import pytest
import torch
from wrong_calls import SECOND_DERIVATIVE, WRONG_CALLS, origin, provoke, unprovoked

from seal_ops.ops.dispatch import has_cuda_kernels

SOURCES = pathlib.Path(__file__).resolve().parents[2] / "csrc/ops"


def _speak(pipe, number: int, device: str) -> None:
    error, message = provoke(WRONG_CALLS[number] if number >= 0 else None, device)
    pipe.send((error.__name__, message.splitlines()[0], origin(message)))


def _outcome(number: int, device: str):
    """(error's name, sentence, file and line) of one call in a fresh process, or how that process died."""
    context = multiprocessing.get_context(
        "forkserver"
    )  # forks from a process that has imported torch and touched no GPU
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_speak, args=(there, number, device))
    process.start()
    there.close()
    try:
        found = here.recv() if here.poll(120) else ("no answer", "after 120 s", None)
    except EOFError:
        process.join()
        found = ("died", f"exit code {process.exitcode}", None)
    process.kill()
    process.join()
    return found


@pytest.mark.skipif(not has_cuda_kernels(), reason="the extension was built without CUDA kernels")
def test_every_sentence_of_the_sources_is_said_and_nothing_dies(monkeypatch):
    """All calls of the table, and the second derivative (-1). Then the device still works, and no check is left out."""
    monkeypatch.setenv(
        "TORCH_SHOW_CPP_STACKTRACES", "1"
    )  # for the processes that are forked: messages name file and line
    multiprocessing.get_context("forkserver").set_forkserver_preload(["torch", "seal_ops", "wrong_calls"])
    calls = [(n, "cpu" if wrong.on == "cpu" else "cuda:0") for n, wrong in enumerate(WRONG_CALLS)] + [(-1, "cuda:0")]
    with concurrent.futures.ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        outcomes = list(pool.map(lambda call: _outcome(*call), calls))
    faults = []
    for (n, device), (error, sentence, _) in zip(calls, outcomes):
        wrong = WRONG_CALLS[n] if n >= 0 else None
        wanted = (wrong.error.__name__, wrong.expected(device)) if wrong else ("NotImplementedError", SECOND_DERIVATIVE)
        if (error, sentence) != wanted:
            faults.append(f"{wrong.name if wrong else 'second derivative'}: got {error}: {sentence}, not {wanted}")
    assert not faults, "\n".join(faults)
    silent = unprovoked(SOURCES, {place for _, _, place in outcomes if place})
    assert not silent, f"never provoked: {silent}"
    q = torch.randn(1, 8, 2, 64, device="cuda", dtype=torch.bfloat16)
    assert torch.ops.seal.attention(q, q, q)[0].isfinite().all()
