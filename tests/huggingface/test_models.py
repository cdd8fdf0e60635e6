"""Every family against its untouched self: scale 1, merged weights, padding, caches, generation, gradients."""

import copy
import inspect

import pytest
import torch
from families import FAMILIES, MERGEABLE, close, largest, logits, randomise, scale_by_hooks, tokens, untouched
from torch import nn
from transformers import DynamicCache, StaticCache
from transformers.masking_utils import create_chunked_causal_mask

import seal_ops
from seal_ops.huggingface import attention as attention_module
from seal_ops.huggingface import rotation

ALL = list(FAMILIES)
GRANULARITIES = ["head", "channel"]
every_family = pytest.mark.parametrize("family", ALL)
mergeable_family = pytest.mark.parametrize("family", MERGEABLE)
every_granularity = pytest.mark.parametrize("granularity", GRANULARITIES)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


@every_dtype
@every_family
def test_scale_one_is_the_untouched_model(family, dtype):
    model = FAMILIES[family].build(dtype)
    ids = tokens()
    exact, own = logits(untouched(model, torch.float64), ids), logits(model, ids)
    seal_ops.attach(model, "channel")
    got = logits(model, ids)
    assert got.dtype == dtype
    # at most twice the model's own rounding error, plus one rounding of the logits
    assert largest(got, exact) <= 2 * largest(own, exact) + torch.finfo(dtype).eps * exact.abs().max().item()


@every_granularity
@every_family
def test_what_is_observed(family, granularity):
    expected = FAMILIES[family]
    model = expected.build()
    scales = seal_ops.attach(model, granularity)
    shape = (4,) if granularity == "head" else (4, expected.head_dim)
    assert [(layer, tuple(s.shape), s.dtype) for layer, s in scales.items()] == [
        (layer, shape, torch.float32) for layer in expected.layers
    ]
    for attn in scales.attachment.patch.layers:
        assert attn.num_kv_heads == model.config.num_key_value_heads
        assert attn.direct == expected.mergeable
        assert attn.rotation == expected.rotation


@every_dtype
@every_granularity
@mergeable_family
def test_random_scales_equal_merged_weights(family, granularity, dtype):
    model = FAMILIES[family].build(dtype)
    ids = tokens()
    scales = seal_ops.attach(model, granularity)
    randomise(scales)
    got = logits(model, ids)
    exact_model = untouched(FAMILIES[family].build(dtype), torch.float64)
    scale_by_hooks(exact_model, dict(scales.items()), FAMILIES[family].head_dim)
    exact = logits(exact_model, ids)
    base = logits(FAMILIES[family].build(dtype), ids)
    assert largest(base, exact) > 0.05 * exact.abs().max().item()  # the scales matter
    seal_ops.merge(model)
    assert not hasattr(model, "seal_scales")
    merged = logits(model, ids)
    rounding = torch.finfo(dtype).eps * exact.abs().max().item()
    assert largest(got, exact) <= 2 * largest(merged, exact) + rounding
    assert largest(merged, exact) <= (1e-4 if dtype == torch.float32 else 0.1) * exact.abs().max().item()


@pytest.mark.parametrize("family", [f for f in ALL if f not in MERGEABLE])
def test_a_step_before_o_proj_is_refused_for_merging_only(family):
    model = FAMILIES[family].build()
    scales = seal_ops.attach(model, "channel")
    randomise(scales)
    plain = untouched(FAMILIES[family].build())
    scale_by_hooks(plain, dict(scales.items()), FAMILIES[family].head_dim)
    assert close(logits(model, tokens()), logits(plain, tokens()))
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(
        ValueError, match=r"seal_ops.merge: model.layers.0.self_attn.o_proj must read the attention output"
    ):
        seal_ops.merge(model)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items()) and model.seal_scales is scales


@every_family
def test_detach_restores_bit_for_bit(family):
    model = FAMILIES[family].build()
    next(
        m for n, m in model.model.layers[0].named_children() if n in ("mlp", "feed_forward", "block_sparse_moe")
    ).requires_grad_(False)
    bystander = FAMILIES[family].build()
    before, ids = untouched(model), tokens()
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    implementation, own_logits = model.config._attn_implementation, logits(model, ids)
    attributes = {n: set(m.__dict__) for n, m in model.named_modules()}
    scales = seal_ops.attach(model, "head")
    randomise(scales)
    assert largest(logits(model, ids), own_logits) > 1e-3
    assert bystander.config._attn_implementation == implementation
    assert torch.equal(logits(bystander, ids), own_logits)
    assert seal_ops.detach(model) is model
    assert torch.equal(logits(model, ids), own_logits)
    assert model.config._attn_implementation == implementation
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert {n: set(m.__dict__) for n, m in model.named_modules()} == attributes
    after = model.state_dict()
    assert list(after) == list(before.state_dict())
    assert all(torch.equal(after[n], t) for n, t in before.state_dict().items())


@every_family
def test_disabled_is_the_untouched_model(family):
    model = FAMILIES[family].build()
    ids = tokens()
    own = logits(model, ids)
    scales = seal_ops.attach(model, "channel")
    randomise(scales)
    scaled = logits(model, ids)
    with seal_ops.disabled(model), seal_ops.disabled(model):
        assert torch.equal(logits(model, ids), own)
    assert torch.equal(logits(model, ids), scaled)


@every_granularity
@every_family
def test_save_and_load_round_trip(family, granularity, tmp_path):
    model, other = FAMILIES[family].build(), FAMILIES[family].build()
    scales = seal_ops.attach(model, granularity)
    randomise(scales)
    scales.save_pretrained(tmp_path / "adapter")
    assert sorted(p.name for p in (tmp_path / "adapter").iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    loaded = seal_ops.load(other, tmp_path / "adapter")
    assert loaded.config == scales.config
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(loaded.items(), scales.items()))
    assert torch.equal(logits(other, tokens()), logits(model, tokens()))


@pytest.mark.parametrize("lengths", [(21, 13), (9, 21), (1, 5)], ids=lambda x: "-".join(map(str, x)))
@pytest.mark.parametrize("side", ["left", "right"])
@every_family
def test_padding(family, side, lengths):
    model = FAMILIES[family].build()
    randomise(seal_ops.attach(model, "channel"))
    ids = tokens(2, max(lengths))
    padded, attention_mask = torch.zeros_like(ids), torch.zeros_like(ids)
    position_ids = torch.zeros_like(ids)
    where = [slice(ids.shape[1] - n, None) if side == "left" else slice(n) for n in lengths]
    for row, (n, at) in enumerate(zip(lengths, where)):
        padded[row, at], attention_mask[row, at], position_ids[row, at] = ids[row, :n], 1, torch.arange(n)
    got = logits(model, padded, attention_mask=attention_mask, position_ids=position_ids)
    assert torch.isfinite(got).all()
    for row, (n, at) in enumerate(zip(lengths, where)):
        assert close(got[row, at], logits(model, ids[row : row + 1, :n])[0])


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@every_family
def test_caches_in_pieces(family, cache):
    """A prompt in pieces through a cache (7 tokens, 6 more, then one by one) equals one pass without a cache."""
    model = FAMILIES[family].build()
    randomise(seal_ops.attach(model, "head"))
    ids = tokens(2, 17)
    values = (
        DynamicCache(config=model.config) if cache == "dynamic" else StaticCache(config=model.config, max_cache_len=24)
    )
    pieces = []
    with torch.no_grad():
        for piece in (ids[:, :7], ids[:, 7:13], *ids[:, 13:].split(1, 1)):
            pieces.append(model(piece, past_key_values=values).logits)
    assert close(torch.cat(pieces, 1), logits(model, ids))


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("padded", [False, True], ids=["unpadded", "left-padded"])
@mergeable_family
def test_generate_token_for_token_as_merged(family, padded, cache):
    if (
        family == "llama4"
        and cache == "static"
        and "block_sequence_ids" not in inspect.signature(create_chunked_causal_mask).parameters
    ):
        pytest.skip("this release of transformers cannot generate with a static cache and chunks")
    model = FAMILIES[family].build()
    randomise(seal_ops.attach(model, "channel"))
    ids = tokens(2, 12)
    attention_mask = torch.ones_like(ids)
    if padded:
        ids[0, :5], attention_mask[0, :5] = 0, 0
    options = dict(
        attention_mask=attention_mask,
        max_new_tokens=9,
        do_sample=False,
        cache_implementation="static" if cache == "static" else None,
    )
    got = model.generate(ids, **options)
    assert got.shape == (2, 21)
    assert torch.equal(got, seal_ops.merge(model).generate(ids, **options))


def loss_of(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return model(ids, labels=ids, use_cache=False).loss


@every_granularity
@every_family
def test_gradients_of_the_scales_equal_plain_pytorch(family, granularity):
    model = FAMILIES[family].build()
    plain = untouched(model)
    scales = seal_ops.attach(model, granularity)
    randomise(scales)
    leaves = scale_by_hooks(plain, dict(scales.items()), FAMILIES[family].head_dim)
    loss, expected = loss_of(model, tokens()), loss_of(plain, tokens())
    loss.backward()
    expected.backward()
    assert abs(loss.item() - expected.item()) < 1e-5 * expected.item()
    for (_, scale), leaf in zip(scales.items(), leaves):
        assert scale.grad.dtype == torch.float32 and leaf.grad.abs().max() > 0
        assert largest(scale.grad, leaf.grad) <= 1e-4 * leaf.grad.abs().max().item()
    assert all(p.grad is None for n, p in model.named_parameters() if not n.startswith("seal_scales."))


@every_family
def test_gradient_checkpointing_gives_the_same_gradients(family):
    model = FAMILIES[family].build()
    scales = seal_ops.attach(model, "channel")
    randomise(scales)
    model.train()
    loss_of(model, tokens()).backward()
    expected = [s.grad.clone() for _, s in scales.items()]
    scales.zero_grad()
    model.gradient_checkpointing_enable(dict(use_reentrant=False))
    loss_of(model, tokens()).backward()
    for (_, scale), want in zip(scales.items(), expected):
        assert largest(scale.grad, want) <= 1e-6 * want.abs().max().item()


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
def test_padded_training_batch(family):
    """Gradients of a right-padded batch are the sum of those of its rows."""
    model = FAMILIES[family].build()
    scales = seal_ops.attach(model, "channel")
    randomise(scales)
    ids, lengths = tokens(2, 19), (19, 11)
    total = 0
    for row, n in enumerate(lengths):
        logs = model(ids[row : row + 1, :n], use_cache=False).logits.log_softmax(-1)
        total = total - logs[0, :-1].gather(1, ids[row, 1:n, None]).sum()
    expected = torch.autograd.grad(total, list(scales.parameters()))
    attention_mask = (torch.arange(19) < torch.tensor(lengths)[:, None]).long()
    logs = model(ids * attention_mask, attention_mask=attention_mask, use_cache=False).logits.log_softmax(-1)
    picked = logs[:, :-1].gather(2, ids[:, 1:, None])[..., 0]
    got = torch.autograd.grad(-(picked * attention_mask[:, 1:]).sum(), list(scales.parameters()))
    for a, b in zip(got, expected):
        assert largest(a, b) <= 1e-4 * b.abs().max().item()


@every_family
def test_deepcopy_is_independent(family):
    model = FAMILIES[family].build()
    scales = seal_ops.attach(model, "head")
    randomise(scales)
    twin = copy.deepcopy(model)
    expected = logits(model, tokens())
    assert torch.equal(logits(twin, tokens()), expected)
    randomise(twin.seal_scales, seed=5)
    assert largest(logits(twin, tokens()), expected) > 1e-3
    assert torch.equal(logits(model, tokens()), expected)
    seal_ops.detach(twin)
    assert torch.equal(logits(model, tokens()), expected)
    assert model.config._attn_implementation == "seal" != twin.config._attn_implementation


@pytest.mark.parametrize("family", ["llama", "phi3", "gemma3"])
def test_batch_of_rows_with_their_own_scales(family):
    """One forward of a batch with `Scales.rows` equals one forward a row with that row's scales."""
    model = FAMILIES[family].build()
    scales = seal_ops.attach(model, "head")
    ids = tokens(1).expand(5, -1)
    rows = torch.ones(2, 5, 4)
    rows[0, 1, 2] = rows[1, 2, 0] = rows[1, 3, 3] = 0  # one ablated head a row; row 0 is the base
    rows[:, 4] = torch.randn(2, 4)
    with scales.rows(rows):
        got = logits(model, ids)
    for row in range(5):
        with torch.no_grad():
            for layer, scale in scales.items():
                scale.copy_(rows[layer, row])
        assert close(got[row], logits(model, ids[row : row + 1])[0])


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_compiled_by_layer_keeps_the_fused_op(family):
    """Layers compiled one by one: one graph each, shared, with the fused op, also for another length and in
    training."""
    model = FAMILIES[family].build()
    scales = seal_ops.attach(model, "channel")
    randomise(scales)
    expected = {n: logits(model, tokens(length=n)) for n in (21, 30, 37)}
    loss_of(model, tokens()).backward()
    gradients = [s.grad.clone() for _, s in scales.items()]
    scales.zero_grad()
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    for layer in model.model.layers:
        layer.compile(backend=backend, fullgraph=True)
    for n, want in expected.items():
        assert close(logits(model, tokens(length=n)), want)
    for graph in graphs:
        assert (
            sum(
                n.target == torch.ops.seal.rope_attention.default or n.target == torch.ops.seal.rope_attention
                for n in graph.graph.nodes
            )
            == 1
        )
    assert len(graphs) <= 4  # a layer each, then once more for lengths that vary
    loss_of(model, tokens()).backward()
    assert all(largest(s.grad, g) <= 1e-5 * g.abs().max().item() for (_, s), g in zip(scales.items(), gradients))


@pytest.mark.parametrize(
    "family, whole, cached, padded",
    [
        ("llama", ["rope_attention"], ["rope", "attention"], ["rope", "attention-packed"]),
        ("mistral", ["rope_attention"], ["rope", "attention"], ["rope", "attention-packed"]),
        ("phi3", ["rope_attention"], ["rope", "attention"], ["rope", "attention-packed"]),
        ("cohere", ["attention"], ["attention"], ["attention-packed"]),
        ("gemma2", ["rope", "_composed"], ["rope", "_composed"], ["rope", "_composed"]),
    ],
)
def test_the_fused_ops_run(called, family, whole, cached, padded):
    model = FAMILIES[family].build()
    seal_ops.attach(model, "head")
    ids = tokens()
    called.clear()
    logits(model, ids)
    assert called == 2 * whole
    for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=32)):
        called.clear()
        with torch.no_grad():
            model(ids, past_key_values=cache)
        assert called == 2 * cached
    called.clear()
    logits(model, ids, attention_mask=torch.ones_like(ids).index_fill(1, torch.arange(3), 0))
    assert called == 2 * padded


def test_attention_dropout_in_training():
    """Dropout needs the composed path: at rate 0 in eval mode nothing changes, in training the outputs vary."""
    model = FAMILIES["llama"].build(attention_dropout=0.5)
    seal_ops.attach(model, "head")
    ids = tokens()
    assert torch.equal(logits(model, ids), logits(model, ids))
    model.train()
    assert largest(logits(model, ids), logits(model, ids)) > 1e-3


@pytest.mark.parametrize("batch", [1, 2])
def test_packed_rows(batch):
    """Rows of several documents, told apart by restarting positions, equal the documents one by one."""
    model = FAMILIES["llama"].build()
    randomise(seal_ops.attach(model, "channel"))
    ids = tokens(batch, 18)
    position_ids = torch.cat([torch.arange(7), torch.arange(11)])[None].expand(batch, -1)
    got = logits(model, ids, position_ids=position_ids)
    expected = torch.cat([logits(model, ids[:, :7]), logits(model, ids[:, 7:])], 1)
    assert close(got, expected)


def test_mask_given_by_the_user():
    """A mask of four dimensions, boolean or additive, passes as it is."""
    model = FAMILIES["llama"].build()
    randomise(seal_ops.attach(model, "channel"))
    ids = tokens(2, 12)
    allowed = torch.ones(12, 12, dtype=torch.bool).tril()
    expected = logits(model, ids)
    for mask in (allowed, torch.where(allowed, 0.0, torch.finfo(torch.float32).min)):
        assert close(logits(model, ids, attention_mask=mask.expand(2, 1, -1, -1)), expected)


def test_attention_maps_that_are_not_there_are_told_of():
    model = FAMILIES["llama"].build()
    seal_ops.attach(model)
    with pytest.warns(UserWarning, match="output_attentions=True gives None"):
        model(tokens(1, 4), output_attentions=True)


def test_a_forced_backend_runs_everything(monkeypatch):
    model = FAMILIES["llama"].build()
    seal_ops.attach(model, "head", backend="reference")
    backends = []
    for module, name in (
        (attention_module, "attention"),
        (attention_module, "rope"),
        (rotation, "rope"),
        (attention_module, "rope_attention"),
    ):

        def spy(*args, _function=getattr(module, name), **kwargs):  # noqa: B008
            backends.append(kwargs["backend"])
            return _function(*args, **kwargs)

        monkeypatch.setattr(module, name, spy)
    ids = tokens()
    logits(model, ids)
    logits(model, ids, attention_mask=torch.ones_like(ids).index_fill(1, torch.arange(3), 0))
    with torch.no_grad():
        model(ids, past_key_values=DynamicCache(config=model.config))
    assert backends == ["reference"] * (2 + 4 + 4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_with_a_window_of_one_token(side):
    """The smallest window is not taken for none."""
    model = FAMILIES["mistral"].build(sliding_window=1)
    own = untouched(model)
    seal_ops.attach(model)
    attention_mask = torch.ones(2, 9, dtype=torch.long)
    attention_mask[1, :4] = 0
    if side == "right":
        attention_mask = attention_mask.flip(1)
    real = attention_mask.bool()
    ids = tokens(2, 9) * attention_mask
    assert close(
        logits(model, ids, attention_mask=attention_mask)[real], logits(own, ids, attention_mask=attention_mask)[real]
    )
