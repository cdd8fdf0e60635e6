"""The Triton kernels that split the keys, with any number of splits."""

import pytest
import torch
from cases import Case
from decode_cases import CASES, assert_every_row, inputs_of
from devices import device_of

import seal_ops
from seal_ops.ops.dispatch import why_not

if (_reason := why_not("triton", "attention", device_of("triton"), torch.float16, 64)) is not None:
    pytest.skip(_reason, allow_module_level=True)

from seal_ops.ops.backends.triton import decode  # noqa: E402


@pytest.mark.parametrize("splits", [1, 2, 3, 7, 40])
@pytest.mark.parametrize("case", [CASES[1], CASES[6], CASES[7]], ids=str)
def test_any_number_of_splits(case, splits, monkeypatch):
    """Also more splits than there are blocks of keys: the others contribute nothing."""
    chosen = []
    monkeypatch.setattr(decode, "splits_for", lambda *_: chosen.append(splits) or splits)
    inputs = inputs_of(case, torch.float16, device_of("triton"))
    assert_every_row(*seal_ops.attention(**inputs, backend="triton", return_lse=True), inputs)
    assert chosen, "another kernel ran"


def test_more_queries_than_promised_are_computed_all_the_same(monkeypatch):
    """On a GPU nobody looks whether max_seqlen is true; on the CPU the op does, so the promise is made behind it."""
    by_splits = decode.attention
    monkeypatch.setattr(decode, "preferred", lambda *_: True)
    monkeypatch.setattr(decode, "attention", lambda *arguments, **terms: by_splits(*arguments[:-1], 2, **terms))
    case = Case((9, 0, 30), (60, 20, 90), heads=(4, 2), scale="row-channel", offset=True)
    monkeypatch.setattr(decode, "splits_for", lambda *_: 2)
    inputs = inputs_of(case, torch.float16, device_of("triton"))
    assert_every_row(*seal_ops.attention(**inputs, backend="triton", return_lse=True), inputs)


def test_splits_fill_the_gpu():
    for multiprocessors in (108, 132):
        for tiles in (1, 3, 8, 64, 100, 256, 1000):
            for keys in (1, 255, 4096, 32768, 131072):
                splits = decode.splits_for(tiles, keys, multiprocessors)
                assert 1 <= splits <= max(1, keys // 256)
                if keys == 131072:
                    slots = 2 * multiprocessors
                    waves = tiles * splits / slots
                    assert waves / -(-waves // 1) > 0.9 or tiles * 4 > 3 * slots, (tiles, splits)


def test_decoding_goes_through_these_kernels_and_training_does_not():
    """The same calls as in tests/gpu/test_gpu_decode.py, where the CUDA kernels are asked."""
    from seal_ops.ops.backends.triton.host import Geometry

    def preferred(heads, kv_heads, queries, keys, window=None, batch=1):
        q, k = (torch.empty(batch, n, h, 64, device="meta") for n, h in ((queries, heads), (keys, kv_heads)))
        return decode.preferred(Geometry.of(q, k, None, True, window, None, None, None), queries)

    assert (
        preferred(32, 8, 1, 32768)
        and preferred(32, 8, 8, 32768)
        and preferred(32, 32, 64, 32768)
        and preferred(71, 1, 1, 100)
    )
    assert (
        not preferred(32, 8, 2048, 2048)
        and not preferred(32, 8, 17, 32768)
        and not preferred(32, 32, 64, 64)
        and not preferred(4, 4, 1, 3)
    )
    assert not preferred(32, 8, 8, 32768, window=10) and not preferred(32, 32, 64, 512, batch=32)
