"""`generate` of a model with scales on it: caches, searches, compilation, and no wait for the device in a step."""

import copy
import importlib.util
import sys
import types

import pytest
import torch
from families import FAMILIES, randomise, tokens
from no_wait import NoWait
from torch._dynamo import lookup_backend
from transformers import CompileConfig, GenerationConfig, StaticCache

import seal_ops
from seal_ops.huggingface import decoding, masks

NEW = 10


def attached_and_merged(family="llama", granularity="channel", **overrides):
    model = FAMILIES[family].build(**overrides)
    randomise(seal_ops.attach(model, granularity))
    return model, seal_ops.merge(copy.deepcopy(model))


def padded(rows=3, length=13):
    """Ids [rows, length], one row padded on the left, and their mask."""
    ids, mask = tokens(rows, length), torch.ones(rows, length, dtype=torch.long)
    ids[1, :5], mask[1, :5] = 0, 0
    return ids, mask


@torch.no_grad()
def uncached(model, ids, mask, new=NEW):
    """Greedy tokens, each from a forward pass over everything before it."""
    for _ in range(new):
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        logits = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits[:, -1]
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
    return ids


def options(mask, **more):
    return dict(attention_mask=mask, max_new_tokens=NEW, do_sample=False, **more)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3", "qwen3_next"])
def test_every_token_as_from_the_uncached_forward(family, cache):
    """qwen2 has windows in one layer of two, qwen3_next a recurrent layer: what the cache holds follows the layers."""
    model, merged = attached_and_merged(family)
    ids, mask = padded()
    got = model.generate(ids, **options(mask, cache_implementation=cache))
    if family != "qwen3_next":  # whose recurrent layers do not forget the padding of an uncached forward alike
        assert torch.equal(got, uncached(model, ids, mask))
    assert torch.equal(got, merged.generate(ids, **options(mask, cache_implementation=cache)))


@pytest.mark.parametrize("backend", ["quanto", "hqq"])
def test_a_quantized_cache(backend):
    package = {"quanto": "optimum.quanto", "hqq": "hqq"}[backend]
    try:
        found = importlib.util.find_spec(package)
    except ModuleNotFoundError:
        found = None
    if found is None:
        pytest.skip(f"{package} is not installed")
    model, merged = attached_and_merged()
    ids, mask = padded()
    config = {"backend": backend, "nbits": 4, "residual_length": 4, "q_group_size": 16, "axis_key": 0, "axis_value": 0}
    if backend == "hqq":
        config |= {"axis_key": 1, "axis_value": 1}
    given = options(mask, cache_implementation="quantized", cache_config=config)
    assert torch.equal(model.generate(ids, **given), merged.generate(ids, **given))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="transformers wants a GPU for offloaded caches")
@pytest.mark.parametrize("cache", ["offloaded", "offloaded_static"])
def test_a_cache_in_host_memory(cache):
    model, merged = (m.cuda() for m in attached_and_merged())
    ids, mask = (t.cuda() for t in padded())
    given = options(mask, cache_implementation=cache)
    assert torch.equal(model.generate(ids, **given), merged.generate(ids, **given))


@pytest.mark.parametrize(
    "search",
    [
        dict(num_beams=3),
        dict(num_beams=3, cache_implementation="static"),
        dict(num_beams=4, num_return_sequences=2, length_penalty=0.5),
        dict(num_beams=2, do_sample=True),
    ],
)
def test_beams(search):
    model, merged = attached_and_merged()
    ids, mask = padded()
    given = options(mask) | search
    torch.manual_seed(0)
    got = model.generate(ids, **given)
    torch.manual_seed(0)
    assert torch.equal(got, merged.generate(ids, **given))


@pytest.mark.parametrize("how", ["prompt lookup", "assistant"])
def test_tokens_that_are_guessed_and_checked(how):
    """Several queries meet a cache, and keys of wrong guesses are dropped from it."""
    model, merged = attached_and_merged()
    ids = tokens(1, 6).repeat(1, 3)  # what comes again is looked up
    mask = torch.ones_like(ids)
    given = {"prompt_lookup_num_tokens": 3} if how == "prompt lookup" else {"assistant_model": FAMILIES["llama"].build()}  # noqa: E501  # fmt: skip
    calls = []
    hook = model.register_forward_pre_hook(lambda m, args, kwargs: calls.append(kwargs), with_kwargs=True)
    got = model.generate(ids, **options(mask, **given))
    hook.remove()
    assert len({call["input_ids"].shape[1] for call in calls[1:]} - {1}) > 0, "several tokens in a step"
    assert torch.equal(got, uncached(model, ids, mask)) and torch.equal(got, uncached(merged, ids, mask))


@pytest.fixture
def fused(monkeypatch):
    """The way of a GPU: steps over part of a cache in the fused op. Gives the calls."""
    calls, attend = [], decoding.attend
    monkeypatch.setattr(decoding, "DEVICES", {"cuda", "cpu"})
    monkeypatch.setattr(decoding, "attend", lambda *given: (calls.append(given[1].shape), attend(*given))[1])
    return calls


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("family", ["llama", "llama-mqa-head_dim-32", "qwen2", "phi3"])
def test_steps_over_part_of_a_cache_are_fused(family, cache, fused):
    """Padding on the left, room in a static cache behind; qwen2's other layer has a window, which stays a mask."""
    model, merged = attached_and_merged(family, "head" if family == "phi3" else "channel")
    ids, mask = padded()
    got = model.generate(ids, **options(mask, cache_implementation=cache))
    assert len(fused) == (NEW - 1) * (1 if family == "qwen2" else 2) and set(fused) == {(3, 1, 4, model.seal_scales.config.head_dim[0])}  # noqa: E501  # fmt: skip
    assert torch.equal(got, uncached(merged, ids, mask))
    fused.clear()
    seal_ops.detach(model)
    assert not torch.equal(got, model.generate(ids, **options(mask))) and not fused


def test_steps_over_rows_with_holes_are_not(fused):
    """A run of keys is one run; what is left out inside a row makes two of it."""
    model, merged = attached_and_merged()
    ids, mask = tokens(3, 13), torch.ones(3, 13, dtype=torch.long)
    ids[1, 4:7], mask[1, 4:7] = 0, 0
    for cache in ("dynamic", "static"):
        given = options(mask, cache_implementation=cache)
        assert torch.equal(model.generate(ids, **given), merged.generate(ids, **given))
    assert not fused


@pytest.mark.parametrize("offset", [6, 11])
def test_ranges_mean_what_the_mask_means(offset, fused):
    config = FAMILIES["llama"].build().config
    padding = torch.ones(4, offset + 1, dtype=torch.bool)
    padding[1, :3] = padding[2, :offset] = False
    for given in (padding, None):
        row = masks.attention_mask(
            4, 1, 16, q_offset=torch.tensor(offset), attention_mask=given, allow_is_causal_skip=False, config=config
        )
        assert row.dtype == torch.int32 and row.shape == (1, 1, 2, 2 * 4 * 2 + 2)
        expected = torch.arange(16).expand(4, 16) <= offset
        if given is not None:
            expected = expected & torch.nn.functional.pad(padding, (0, 15 - offset))
        found = masks.as_tensor(masks.read_mask(torch.nn.Module(), row, 4, 1, 16, None, None), torch.empty(4, 1, 4, 16))
        assert torch.equal(found[:, 0, 0], expected)


@pytest.mark.parametrize("shape", [(4,), (3, 4, 16)])
def test_a_step_over_runs_of_keys_on_every_backend(shape, backend, device, monkeypatch):
    """Against SDPA with the mask; what a row may not see is NaN."""
    monkeypatch.setattr(decoding, "DEVICES", {device.type})
    config = FAMILIES["llama"].build().config
    generator = torch.Generator().manual_seed(0)
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    q, scale = (torch.randn(s, generator=generator).to(device) for s in ((3, 1, 4, 16), shape))
    key, value = (torch.randn(3, 2, 40, 16, generator=generator).to(device) for _ in range(2))
    q, key, value = (t.to(dtype) for t in (q, key, value))
    padding = torch.ones(3, 31, dtype=torch.bool, device=device)
    padding[1, :30] = padding[2, :7] = False
    ranges = decoding.key_ranges(3, 40, 0, torch.tensor(30, device=device), padding, config, device).flatten()
    seen = decoding.as_tensor(ranges, 3, 40)
    expected = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(1, 2), key, value, attn_mask=seen, enable_gqa=True
    )
    factor = scale[:, None] if scale.dim() == 1 else scale
    expected = expected.transpose(1, 2) * (factor if factor.dim() == 2 else factor[:, None]).to(dtype)
    hidden = ~seen[:, 0, 0, None, :, None]
    key, value = (t.masked_fill(hidden, float("nan")) for t in (key, value))
    assert decoding.fits(ranges, q, key, value)
    got = decoding.attend(ranges, q, key, value, scale, None, backend)
    torch.testing.assert_close(got, expected, rtol=2e-2 if dtype == torch.float16 else 1e-4, atol=2e-3)


def import_something_new():
    """As a call of a library may do, between two of ours."""
    name = f"_seal_test_module_{len(sys.modules)}"
    sys.modules[name] = types.ModuleType(name)


@pytest.mark.parametrize("way", ["mask", "fused"])
def test_compiled_decoding_is_one_graph(way, monkeypatch):
    """What `generate` does by itself on a GPU: the step with a static cache compiled as a whole, once.

    Other adapters for the rows are other numbers in the same graph.
    """
    if way == "fused":
        monkeypatch.setattr(decoding, "DEVICES", {"cuda", "cpu"})
    targets = set()

    def backend(graph, inputs):
        targets.update(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return lookup_backend("aot_eager")(graph, inputs)

    model, merged = attached_and_merged(num_hidden_layers=1)
    scales = model.seal_scales
    scales.add_adapter("head", "head")
    scales.set_adapter("head")
    randomise(scales, 5)
    scales.set_adapter("default")
    ids, mask = padded()
    compiled = CompileConfig(backend=backend, fullgraph=True, mode=None)
    compiled._compile_all_devices = True
    given = options(mask, cache_implementation="static", compile_config=compiled)
    stats = torch._dynamo.utils.counters["stats"]
    torch._dynamo.reset()
    stats.clear()
    expected = uncached(merged, ids, mask)
    for _ in range(2):
        assert torch.equal(model.generate(ids, **given), expected)
        import_something_new()
    assert stats["unique_graphs"] == 1
    for names in (["head", "default", "base"], ["base", "head", "head"])[: 2 if way == "fused" else 0]:
        expected = model.generate(ids, **options(mask), adapter_names=names)
        assert torch.equal(model.generate(ids, **given, adapter_names=names), expected), names
        assert stats["unique_graphs"] == 2, names
    assert any("seal" in target and "attention" in target for target in targets) == (way == "fused"), targets
    torch._dynamo.reset()


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_step_on_a_static_cache_asks_for_no_value(family, rows, fused):
    """So a CUDA graph can hold it. The mask is made before the step, as `generate` makes it."""
    model, _ = attached_and_merged(family)
    ids, _ = padded()
    cache = StaticCache(config=model.config, max_cache_len=32)
    word = "cache" if "cache" in model.forward.__code__.co_varnames else "past_key_values"
    with (
        torch.no_grad(),
        model.seal_scales.adapters_per_row(["default", "base", "default"] if rows else ["default"] * 3),
    ):
        model(ids, **{word: cache}, use_cache=True)
        given = model.prepare_inputs_for_generation(
            torch.cat([ids, ids[:, :1]], 1), **{word: cache}, attention_mask=torch.ones(3, 14, dtype=torch.long),
            use_cache=True, next_sequence_length=1,
        )  # fmt: skip
        assert given["input_ids"].shape == (3, 1)
        with NoWait():
            model(**given)
        assert len(fused) == (1 if family == "qwen2" else 2)
        with pytest.raises(AssertionError, match="_local_scalar_dense waits"), NoWait():
            ids.sum().item()


def test_continuous_batching_is_refused_at_the_first_call():
    model, merged = attached_and_merged()
    ids = tokens(2, 9)
    config = GenerationConfig(max_new_tokens=4, do_sample=False, pad_token_id=0)
    message = "continuous batching .* call seal_ops.merge\\(model\\) first"
    with pytest.raises(ValueError, match=message):
        model.generate_batch(ids.tolist(), generation_config=config)
    with pytest.raises(ValueError, match=message):
        copy.deepcopy(model).init_continuous_batching(generation_config=config)
    extended = FAMILIES["llama"].build()
    seal_ops.extend(extended, "streaming", sinks=2, window=8)
    with pytest.raises(ValueError, match=message):
        extended.generate_batch(ids.tolist(), generation_config=config)
    seal_ops.unextend(extended)
    seal_ops.detach(model)
    for plain in (model, merged, extended):
        assert "init_continuous_batching" not in plain.__dict__
