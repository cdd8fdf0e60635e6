"""Extended models against the oracle of position matrices: whole texts, caches, batches, padding, packing, scales."""

import copy

import extended_reference
import pytest
import torch
import transformers
from attached import assert_untouched
from families import FAMILIES, close, largest, logits, randomise, tokens

import seal_ops
from seal_ops.huggingface.identity import fingerprint

METHODS = [
    ("self_extend", dict(group=4, window=8)),
    ("dual_chunk", dict(chunk=12, length=16)),
    ("lm_infinite", dict(sinks=2, window=8, limit=8)),
    ("streaming", dict(sinks=3, window=8)),
]
PROGRAMMED = [*METHODS, ("dynamic_ntk", dict(factor=2.0))]
TRAINED = 32
each_method = pytest.mark.parametrize("method, options", METHODS, ids=[m for m, _ in METHODS])
each_program = pytest.mark.parametrize("method, options", PROGRAMMED, ids=[m for m, _ in PROGRAMMED])


def build(family="llama"):
    """Without sinks' or windows' own terms; fp64, in which greedy choices are no accidents."""
    return FAMILIES[family].build(torch.float64, max_position_embeddings=TRAINED)


def cache_of(output):
    return {"past_key_values": output.past_key_values}


def in_pieces(model, ids, cuts, **options):
    """The logits of a text that is read in pieces with a cache."""
    found, cache = [], {}
    with torch.no_grad():
        for a, b in zip(cuts, cuts[1:]):
            mask = {n: t[:, :b] for n, t in options.items()}
            output = model(ids[:, a:b], use_cache=True, **cache, **mask)
            found.append(output.logits)
            cache = cache_of(output)
    return torch.cat(found, 1)


@each_method
@pytest.mark.parametrize("family", ["llama", "llama-mqa-head_dim-32", "qwen3", "phi3", "mixtral"])
def test_the_model_computes_by_the_matrices(family, method, options):
    model = build(family)
    ids = tokens(2, 53)
    before, config = logits(model, ids), copy.deepcopy(model.config)
    expected = logits(extended_reference.extended(model, method, options), ids)
    extension = seal_ops.extend(model, method, **options)
    assert extension.layers == 2
    got = logits(model, ids)
    assert close(got, expected) and largest(expected, before) > 1e-2
    seal_ops.unextend(model)
    assert torch.equal(logits(model, ids), before) and model.config == config
    assert_untouched(model)


@each_program
def test_short_texts_are_read_as_before(method, options):
    """To the rounding of a table that is computed in fp64."""
    model = build()
    ids = tokens(2, 8)
    before = logits(model, ids)
    seal_ops.extend(model, method, **options)
    assert close(logits(model, ids), before)


def test_dynamic_frequencies_of_every_length():
    """The last token of a text of n tokens is read as by a model with the frequencies of n."""
    model = build()
    ids = tokens(2, 53)
    plain = copy.deepcopy(model)
    seal_ops.extend(model, "dynamic_ntk", factor=2.0)
    for length in (20, 32, 33, 53):
        plain.model.rotary_emb.inv_freq = seal_ops.rope_frequencies(
            16, "dynamic", seq_len=max(length, TRAINED), max_position_embeddings=TRAINED, factor=2.0
        )[0]
        assert close(logits(model, ids[:, :length]), logits(plain, ids[:, :length]))


@each_method
def test_a_cache_changes_nothing(method, options):
    model = build()
    ids = tokens(2, 53)
    seal_ops.extend(model, method, **options)
    whole = logits(model, ids)
    for cuts in ([0, 53], [0, 20, *range(21, 54)], [0, 5, 30, 31, 53]):
        assert close(in_pieces(model, ids, cuts), whole)


@each_method
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_is_the_uncached_forward(method, options, cache):
    """Token for token, for rows of a left-padded batch too, which write what they write alone."""
    model = build()
    seal_ops.extend(model, method, **options)
    rows = [tokens(1, n, seed=n)[0] for n in (30, 17, 4)]
    width = max(map(len, rows))
    ids = torch.stack([torch.nn.functional.pad(row, (width - len(row), 0)) for row in rows])
    mask = torch.stack([torch.nn.functional.pad(torch.ones_like(row), (width - len(row), 0)) for row in rows])
    more = dict(cache_implementation="static", disable_compile=True) if cache == "static" else {}
    new = 24
    out = model.generate(
        ids, attention_mask=mask, max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0, **more
    )[:, width:]
    for row, written in zip(rows, out):
        for _ in range(new):
            row = torch.cat([row, logits(model, row[None])[0, -1:].argmax(-1)])
        assert torch.equal(row[-new:], written)


@each_program
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(side, method, options):
    """Rows of a padded batch are what they are alone; also in pieces with a cache."""
    model = build()
    seal_ops.extend(model, method, **options)
    rows = [tokens(1, n, seed=n)[0] for n in (41, 20, 3)]
    pad = lambda row, value: torch.nn.functional.pad(
        row, (41 - len(row), 0) if side == "left" else (0, 41 - len(row)), value=value
    )
    ids = torch.stack([pad(row, 5) for row in rows])
    mask = torch.stack([pad(torch.ones_like(row), 0) for row in rows])
    places = (mask.cumsum(1) - 1).clamp_min(0)
    results = [logits(model, ids, attention_mask=mask, position_ids=places)]
    if method != "dynamic_ntk":  # what was read before is not read again by other frequencies
        results.append(in_pieces(model, ids, [0, 41], attention_mask=mask))
    if method != "dynamic_ntk" and side == "left":
        results.append(in_pieces(model, ids, [0, 40, 41], attention_mask=mask))
        results.append(in_pieces(model, ids, [0, 22, 30, 41], attention_mask=mask))
    for found in results:
        for n, row in enumerate(rows):
            assert close(found[n][mask[n].bool()], logits(model, row[None])[0])


@each_program
@pytest.mark.parametrize("how", ["cu_seq_lens", "position_ids"])
def test_packed_documents(how, method, options):
    model = build()
    seal_ops.extend(model, method, **options)
    documents = [tokens(1, n, seed=n) for n in (25, 1, 40)]
    ids = torch.cat(documents, 1)
    places = torch.cat([torch.arange(d.shape[1]) for d in documents])[None]
    more = {}
    if how == "cu_seq_lens":
        cu = torch.tensor([0, 25, 26, 66], dtype=torch.int32)
        more = dict(cu_seq_lens_q=cu, cu_seq_lens_k=cu, max_length_q=40, max_length_k=40)
    got = logits(model, ids, position_ids=places, **more)
    assert close(got, torch.cat([logits(model, d) for d in documents], 1))


@each_method
@pytest.mark.parametrize("first", ["scales", "extension"])
def test_scales_on_top(first, method, options):
    """In either order: values, gradients, with and without gradient checkpointing; and taken off in either order."""
    model = build()
    ids = tokens(2, 40)
    plain = copy.deepcopy(model)
    base = logits(model, ids)

    def put(what):
        return seal_ops.attach(model, "channel") if what == "scales" else seal_ops.extend(model, method, **options)

    put(first)
    put("extension" if first == "scales" else "scales")
    scales = model.seal_scales
    randomise(scales)
    leaves = [s.detach().clone().requires_grad_() for _, s in scales.items()]
    reference = extended_reference.extended(plain, method, options, leaves)
    assert close(logits(model, ids), logits(reference, ids))
    loss = lambda m: m(ids, use_cache=False).logits[:, :-1].square().mean()
    expected = torch.autograd.grad(loss(reference), leaves)
    for checkpointing in (False, True):
        if checkpointing:
            model.train()
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        for a, b in zip(torch.autograd.grad(loss(model), [s for _, s in scales.items()]), expected):
            assert b.abs().max() > 0 and largest(a, b) <= 1e-4 * b.abs().max()
    model.gradient_checkpointing_disable()
    model.eval()

    alone = logits(extended_reference.extended(plain, method, options), ids)
    with seal_ops.disabled(model):
        assert close(logits(model, ids), alone)
    if first == "scales":
        seal_ops.detach(model)
        assert close(logits(model, ids), alone)
        seal_ops.unextend(model)
    else:
        seal_ops.unextend(model)
        assert largest(logits(model, ids), base) > 1e-2
        seal_ops.detach(model)
    assert torch.equal(logits(model, ids), base)
    assert_untouched(model)


def test_merging_under_an_extension():
    model = build()
    ids = tokens(2, 40)
    seal_ops.extend(model, "self_extend", group=4, window=8)
    randomise(seal_ops.attach(model, "channel"))
    expected = logits(model, ids)
    seal_ops.merge(model)
    assert not hasattr(model, "seal_scales") and close(logits(model, ids), expected)
    seal_ops.unextend(model)
    assert_untouched(model)


def test_saved_scales_go_on_an_extended_model(tmp_path):
    model = build()
    ids = tokens(1, 40)
    scales = seal_ops.attach(model, "head")
    randomise(scales)
    seal_ops.extend(model, "streaming", sinks=2, window=8)
    expected = logits(model, ids)
    scales.save_pretrained(tmp_path)
    seal_ops.detach(model)
    seal_ops.load(model, tmp_path)
    assert torch.equal(logits(model, ids), expected)


def test_scales_are_trained_under_an_extension():
    model = FAMILIES["llama"].build(max_position_embeddings=TRAINED)
    seal_ops.extend(model, "self_extend", group=4, window=8)
    seal_ops.attach(model, "head")
    samples = [dict(input_ids=tokens(1, n, seed=n)[0].tolist()) for n in (40, 33, 25)]
    result = seal_ops.train(model, samples, batch_size=3, epochs=8, lr=0.05, progress=False)
    assert result.losses[-1] < result.losses[0]


@each_program
def test_copies_pickles_and_identities(method, options, tmp_path):
    model = build()
    ids = tokens(1, 40)
    before, plain = logits(model, ids), fingerprint(model)
    seal_ops.extend(model, method, **options)
    got = logits(model, ids)
    torch.save(model, tmp_path / "model.pt")
    for twin in (copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)):
        assert torch.equal(logits(twin, ids), got) and fingerprint(twin) == fingerprint(model) != plain
        seal_ops.unextend(twin)
        assert torch.equal(logits(twin, ids), before)
    assert torch.equal(logits(model, ids), got)


def test_layers_with_windows_of_their_own_stay():
    model = FAMILIES["gemma3"].build(torch.float64)
    ids = tokens(2, 40)
    extension = seal_ops.extend(model, "self_extend", group=4, window=8)
    assert [layer.program is None for layer in extension.patch.layers] == [True, False]
    assert close(in_pieces(model, ids, [0, 21, 22, 40]), logits(model, ids))


def test_learned_sinks_under_a_program():
    """granite_swa: the oracle's last column, through the merge."""
    causal_lms = pytest.importorskip("causal_lms")
    if "granite_swa" not in causal_lms.FAMILIES:
        pytest.skip("this transformers has no granite_swa")
    model = causal_lms.build("granite_swa")
    ids = tokens(2, 40)
    before = logits(model, ids)
    extension = seal_ops.extend(model, "self_extend", group=1, window=5)  # groups of one: true positions in two parts
    assert extension.layers and close(logits(model, ids), before)


def test_tables_made_in_inference_serve_training():
    model = build()
    seal_ops.extend(model, "self_extend", group=4, window=8)
    ids = tokens(1, 40)
    with torch.inference_mode():
        model(ids, use_cache=False)
    model(ids, use_cache=False).logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_calls_that_an_extended_model_refuses():
    model = build()
    seal_ops.extend(model, "self_extend", group=4, window=8)
    ids = tokens(1, 12)
    odd = torch.ones(12, 12, dtype=torch.bool).tril()
    odd[7, 3] = False
    with pytest.raises(
        ValueError, match="must have masks that are causal with padding or documents, got another pattern"
    ):
        logits(model, ids, attention_mask=odd[None, None])
    dropped = FAMILIES["llama"].build(attention_dropout=0.1)
    seal_ops.extend(dropped, "self_extend", group=4, window=8)
    with pytest.raises(ValueError, match="an extended model must have no attention dropout, LlamaAttention passes 0.1"):
        dropped.train()(ids)


def test_evaluation_reads_through_the_program():
    """Decoding of our own keeps rotated keys: it gives way to transformers'."""
    from seal_ops.evaluation import static_decoding

    model = FAMILIES["llama"].build(max_position_embeddings=TRAINED)
    assert static_decoding.supports(model)
    seal_ops.extend(model, "streaming", sinks=2, window=8)
    assert not static_decoding.supports(model)
    seal_ops.unextend(model)
    seal_ops.extend(model, "ntk", factor=2)
    assert static_decoding.supports(model)


def test_a_warning_of_too_many_tokens_knows_the_extension(recwarn):
    model = transformers.LlamaForCausalLM(FAMILIES["llama"].build(max_position_embeddings=16).config)
    from seal_ops.huggingface.context_window import warn_beyond_window

    seal_ops.extend(model, "self_extend", group=2, window=8)
    warn_beyond_window(model, 24, "here")
    assert not recwarn.list
    with pytest.warns(UserWarning, match="here: 25 tokens are more than the 24 positions"):
        warn_beyond_window(model, 25, "here")
