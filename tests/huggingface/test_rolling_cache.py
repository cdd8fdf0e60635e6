"""`seal_ops.streaming_cache`: constant size, and token for token what a cache of all tokens gives."""

import copy

import pytest
import torch
from families import FAMILIES, close, logits, tokens

import seal_ops
from seal_ops.huggingface.context_extension.rolling_cache import RollingLayer
from seal_ops.huggingface.modes import accepts

METHODS = [
    ("streaming", dict(sinks=3, window=8)),
    ("streaming", dict(sinks=0, window=8)),
    ("streaming", dict(sinks=2, window=1)),
    ("lm_infinite", dict(sinks=2, window=8, limit=16)),
]
each_method = pytest.mark.parametrize("method, options", METHODS, ids=str)
HERE = "cache" if accepts(FAMILIES["llama"].build(), "cache") else "past_key_values"


def build(family="llama"):
    return FAMILIES[family].build(torch.float64, max_position_embeddings=32)


@pytest.fixture
def kept(monkeypatch):
    """The number of keys that a layer keeps, and that it hands on, after every update."""
    seen, plain = [], RollingLayer.update

    def update(self, keys, values, *args, **kwargs):
        given = plain(self, keys, values, *args, **kwargs)
        seen.append((self.keys.shape[-2], self.values.shape[-2], self.keys.untyped_storage().nbytes(), keys.shape[-2]))
        return given

    monkeypatch.setattr(RollingLayer, "update", update)
    return seen


def generate(model, ids, new=40, **options):
    return model.generate(ids, max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0, **options)


@each_method
def test_generation_far_beyond_the_window(method, options, kept):
    model = build()
    seal_ops.extend(model, method, **options)
    ids = tokens(2, 20)
    whole = generate(model, ids)
    assert not kept
    cache = seal_ops.streaming_cache(model)
    assert torch.equal(generate(model, ids, **{HERE: cache}), whole)
    most = options["sinks"] + options["window"] - 1
    assert len(kept) == 2 * 40 and {n for pair in kept for n in pair[:2]} == {most}
    row = 2 * 2 * 16 * 8  # rows, heads, channels, bytes: what is let go of is freed
    assert max(size for _, _, size, _ in kept) == row * most
    assert cache.get_seq_length() == 20 + 39


@each_method
def test_a_text_in_pieces(method, options):
    """As long as what is kept, longer and shorter; a forward after them is that of the whole text."""
    model = build()
    ids = tokens(2, 70)
    seal_ops.extend(model, method, **options)
    whole, cache, found = logits(model, ids), seal_ops.streaming_cache(model), []
    cuts = [0, 4, 5, 30, 31, 33, 53, 70]
    with torch.no_grad():
        for a, b in zip(cuts, cuts[1:]):
            found.append(model(ids[:, a:b], use_cache=True, **{HERE: cache}).logits)
    assert close(torch.cat(found, 1), whole)
    cache.reset()
    with torch.no_grad():
        assert close(model(ids, use_cache=True, **{HERE: cache}).logits, whole)


@pytest.mark.parametrize("method, options", [METHODS[0], METHODS[3]], ids=str)
def test_rows_of_a_left_padded_batch(method, options, kept):
    """Each with sinks of its own: rows that are longer than what is kept, that become so, and that never do."""
    model = build()
    seal_ops.extend(model, method, **options)
    rows = [tokens(1, n, seed=n)[0] for n in (40, 17, 9, 1)]
    pad = lambda row: torch.nn.functional.pad(row, (40 - len(row), 0))
    ids, mask = torch.stack([pad(r) for r in rows]), torch.stack([pad(torch.ones_like(r)) for r in rows])
    for new in (15, 5):
        cache = seal_ops.streaming_cache(model, mask)
        out = generate(model, ids, new, attention_mask=mask, **{HERE: cache})[:, 40:]
        for row, written in zip(rows, out):
            assert torch.equal(generate(model, row[None], new)[0, len(row) :], written)
    assert max(n for n, *_ in kept) == options["sinks"] + options["window"] - 1


@pytest.mark.parametrize("change", ["reorder_cache", "batch_select_indices", "batch_repeat_interleave"])
def test_rows_take_their_first_tokens_along(change):
    """Two rows that are padded differently change places, or are doubled, while the shorter one is not yet full."""
    model = build()
    seal_ops.extend(model, "streaming", sinks=3, window=8)
    rows, more = [tokens(1, n, seed=n)[0] for n in (20, 8)], tokens(1, 9, seed=3)
    pad = lambda row: torch.nn.functional.pad(row, (20 - len(row), 0))
    ids, mask = torch.stack([pad(r) for r in rows]), torch.stack([pad(torch.ones_like(r)) for r in rows])
    cache = seal_ops.streaming_cache(model, mask)
    order = torch.tensor([0, 0, 1, 1] if change == "batch_repeat_interleave" else [1, 0])
    with torch.no_grad():
        model(ids, attention_mask=mask, use_cache=True, **{HERE: cache})
        for layer in cache.layers:
            getattr(layer, change)(2 if change == "batch_repeat_interleave" else order)
        mask = mask[order]
        for n in range(9):
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            token = more[:, n : n + 1].expand(len(order), 1)
            found = model(token, attention_mask=mask, use_cache=True, **{HERE: cache}).logits[:, -1]
        for row, got in zip(order.tolist(), found):
            assert close(got, logits(model, torch.cat([rows[row], more[0]])[None])[0, -1])


def test_beams():
    """The rows of a prompt change places."""
    model = build()
    seal_ops.extend(model, "streaming", sinks=3, window=8)
    rows = [tokens(1, n, seed=n)[0] for n in (20, 6)]
    pad = lambda row: torch.nn.functional.pad(row, (20 - len(row), 0))
    ids, mask = torch.stack([pad(r) for r in rows]), torch.stack([pad(torch.ones_like(r)) for r in rows])
    whole = generate(model, ids, 20, attention_mask=mask, num_beams=3)
    wide = mask.repeat_interleave(3, 0)
    cache = seal_ops.streaming_cache(model, wide)
    assert torch.equal(generate(model, ids, 20, attention_mask=mask, num_beams=3, **{HERE: cache}), whole)


def test_scales_and_layers_with_windows_of_their_own():
    model = build("gemma3")
    seal_ops.attach(model, "channel")
    seal_ops.extend(model, "streaming", sinks=2, window=9)
    ids = tokens(2, 20)
    cache = seal_ops.streaming_cache(model)
    assert [isinstance(layer, RollingLayer) for layer in cache.layers] == [False, True]
    whole = generate(model, ids, 15)
    assert torch.equal(generate(model, ids, 15, **{HERE: cache}), whole)


def test_a_copy_goes_its_own_way():
    """One prompt, read once, for two continuations."""
    model = build()
    seal_ops.extend(model, "streaming", sinks=2, window=8)
    ids, cache = tokens(1, 30), seal_ops.streaming_cache(model)
    with torch.no_grad():
        model(ids[:, :20], use_cache=True, **{HERE: cache})
        twin = copy.deepcopy(cache)
        expected = logits(model, ids)[:, 20:]
        for one in (cache, twin):
            assert close(model(ids[:, 20:], use_cache=True, **{HERE: one}).logits, expected)


def test_what_a_rolling_cache_refuses():
    model = build()
    ids = tokens(2, 12)
    with pytest.raises(ValueError, match="streaming_cache: model must be extended by streaming or lm_infinite, got no"):
        seal_ops.streaming_cache(model)
    with pytest.raises(ValueError, match="got self_extend"):
        seal_ops.extend(model, "self_extend", group=4, window=8)
        seal_ops.streaming_cache(model)
    seal_ops.unextend(model)
    seal_ops.extend(model, "streaming", sinks=2, window=8)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    with pytest.raises(ValueError, match="attention_mask must be given to streaming_cache for a padded batch, got a"):
        generate(model, ids, 3, attention_mask=mask, **{HERE: seal_ops.streaming_cache(model)})
    with pytest.raises(ValueError, match="padding on the left only, got padding elsewhere"):
        seal_ops.streaming_cache(model, mask.flip(1))
    with pytest.raises(ValueError, match=r"must be \[B, S\] with padding on the left only, got \[12\]"):
        seal_ops.streaming_cache(model, mask[0])
    cache = seal_ops.streaming_cache(model)
    with pytest.raises(ValueError, match="a rolling cache must only grow"):
        cache.crop(-1)
    seal_ops.unextend(model)
    with pytest.raises(ValueError, match="must be used under the extension that it was made for, got a model without"):
        generate(model, ids, 3, **{HERE: cache})
