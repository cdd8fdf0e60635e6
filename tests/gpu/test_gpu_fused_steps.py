"""Steps over part of a cache on a GPU, fused against the mask: padding, a static cache, a CUDA graph while it fills.

`SEAL_FUSED_STEPS=1` turns them on for users; these tests turn them on by themselves.
"""

import pytest
import torch
from families import FAMILIES, largest, randomise, tokens

import seal_ops
from seal_ops.huggingface import decoding
from seal_ops.ops.dispatch import why_not

SIZES = dict(hidden_size=512, head_dim=128, initializer_range=0.05, max_position_embeddings=512)  # 4 heads over 2


@pytest.fixture(params=["cuda", "triton"])
def backend(request, monkeypatch) -> str:
    reason = why_not(request.param, "attention", torch.device("cuda"), torch.bfloat16, 128)
    if reason is not None:
        pytest.skip(reason)
    monkeypatch.setattr(decoding, "DEVICES", {"cuda"})
    return request.param


def attached(granularity, backend):
    model = FAMILIES["llama"].build(torch.bfloat16, **SIZES).cuda()
    randomise(seal_ops.attach(model, granularity, backend=backend))
    return model


def padded(rows=3, length=200):
    ids, mask = tokens(rows, length).cuda(), torch.ones(rows, length, dtype=torch.long, device="cuda")
    ids[1, :77], mask[1, :77] = 0, 0
    return ids, mask


@pytest.mark.parametrize("shape", [(4,), (4, 128), (3, 4, 1), (3, 4, 128)])
def test_the_op_over_runs_of_keys(shape, backend):
    """Against SDPA in fp64 with the mask; what a row may not see is NaN."""
    config = FAMILIES["llama"].build(**SIZES).config
    generator = torch.Generator("cuda").manual_seed(0)
    make = lambda *s: torch.randn(*s, generator=generator, device="cuda")
    q, key, value = (t.bfloat16() for t in (make(3, 1, 4, 128), make(3, 2, 4096, 128), make(3, 2, 4096, 128)))
    scale = make(*shape)
    padding = torch.ones(3, 3001, dtype=torch.bool, device="cuda")
    padding[1, :3000] = padding[2, :777] = False
    position = torch.tensor(3000, device="cuda")
    ranges = decoding.key_ranges(3, 4096, 0, position, padding, config, "cuda").flatten()
    seen = decoding.as_tensor(ranges, 3, 4096)
    factor = scale.double()[:, None] if scale.dim() == 1 else scale.double()
    factor = factor if factor.dim() == 2 else factor[:, None]

    def composed(dtype):
        found = torch.nn.functional.scaled_dot_product_attention(
            q.to(dtype).transpose(1, 2), *(t.to(dtype).repeat_interleave(2, 1) for t in (key, value)), attn_mask=seen
        )
        return (found.transpose(1, 2).double() * factor).to(dtype)

    exact, own = composed(torch.float64), composed(torch.bfloat16)
    hidden = ~seen[:, 0, 0, None, :, None]
    hidden_key, hidden_value = (t.masked_fill(hidden, float("nan")) for t in (key, value))
    assert decoding.fits(ranges, q, hidden_key, hidden_value)
    got = decoding.attend(ranges, q, hidden_key, hidden_value, scale, None, backend)
    assert largest(got, exact) <= 2 * largest(own, exact) + 2**-8 * exact.abs().max().item()


@pytest.mark.parametrize("granularity", ["head", "channel"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_logits_of_every_step(cache, granularity, backend, monkeypatch):
    model = attached(granularity, backend)
    ids, mask = padded()
    options = dict(
        attention_mask=mask, max_new_tokens=12, min_new_tokens=12, do_sample=False, cache_implementation=cache,
        disable_compile=True, output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    calls, attend = [], decoding.attend
    monkeypatch.setattr(decoding, "attend", lambda *given: (calls.append(1), attend(*given))[1])
    fused = model.generate(ids, **options)
    assert len(calls) == 2 * 11
    monkeypatch.setattr(decoding, "DEVICES", set())
    plain = model.generate(ids, **options)
    assert len(calls) == 2 * 11
    size = plain.logits[0].abs().max().item()
    same = (fused.sequences == plain.sequences).cumprod(1)[:, ids.shape[1] :].bool()  # a near tie may fall either way
    assert same[:, 0].all()
    for step, (a, b) in enumerate(zip(fused.logits, plain.logits)):
        rows = same[:, step]
        assert not rows.any() or largest(a[rows], b[rows]) <= 0.05 * size, step


@pytest.mark.parametrize("granularity", ["head", "channel"])
def test_a_cuda_graph_stays_right_while_the_cache_fills(granularity, backend):
    """The recorded step makes its ranges from the position on the device, so a replay sees one key more."""
    model = attached(granularity, backend)
    layer = model._seal_patch.layers[0]
    generator = torch.Generator("cuda").manual_seed(0)
    q, key, value = (
        torch.randn(s, generator=generator, device="cuda").bfloat16()
        for s in ((3, 1, 4, 128), (3, 2, 512, 128), (3, 2, 512, 128))
    )
    scale, position = layer.current(3).detach(), torch.tensor(40, device="cuda")

    def step():
        ranges = decoding.key_ranges(3, 512, 0, position, None, model.config, "cuda").flatten()
        return decoding.attend(ranges, q, key, value, scale, None, backend)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for now in (40, 41, 255, 256, 511):
        position.fill_(now)
        graph.replay()
        expected = step()
        assert torch.equal(out, expected), now
    position.fill_(40)
    assert not torch.equal(step(), expected)


def test_generate_compiles_and_records_the_step(backend):
    """What `generate` does by itself with a static cache: compiled, with CUDA graphs; two choices of adapters."""
    model = attached("channel", backend)
    ids, mask = padded()
    options = dict(attention_mask=mask, max_new_tokens=8, do_sample=False)
    torch._dynamo.reset()
    for names in (["default", "base", "default"], ["base", "default", "default"]):
        expected = model.generate(ids, **options, adapter_names=names)
        got = model.generate(ids, **options, adapter_names=names, cache_implementation="static")
        agree = (got == expected)[:, ids.shape[1] :].float().mean()
        assert agree >= 0.75, names
    torch._dynamo.reset()
