"""minference on models: block lists of each head while a prompt is read, the model's own attention everywhere else."""

import copy

import pytest
import torch
from attached import assert_untouched
from families import FAMILIES, close, largest, logits, randomise, tokens
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

import seal_ops
from seal_ops.huggingface.context_extension import block_prefill
from seal_ops.ops.block_selection import a_shape, cheaper_a_shape, vertical_slash

FEW = dict(vertical=2, slash=2, last_q=8, sinks=4, window=20, dense=40, block=32)
ALL = FEW | dict(vertical=1000, slash=1000, sinks=0, window=1000)
PATTERNS = ["vertical_slash", "a_shape", {0: ["a_shape", "vertical_slash", "vertical_slash", "a_shape"], 1: "a_shape"}]
FIRST = 40  # tokens of the shorter texts, which are read densely


def _map(pattern, layer, q, k, sigma):
    """Block map [1, H, .., ..] of one text, by the selection functions."""
    wide = a_shape(q, k, FEW["sinks"], FEW["window"], size=32).expand(1, q.shape[2], -1, -1)
    narrow = vertical_slash(q, k, FEW["vertical"], FEW["slash"], size=32, last=FEW["last_q"], softmax_scale=sigma)
    own = pattern.get(layer, "vertical_slash") if isinstance(pattern, dict) else pattern
    names = [own] * q.shape[2] if isinstance(own, str) else own
    if own == "auto":
        enough = cheaper_a_shape(q, k, FEW["sinks"], FEW["window"], 0.95, last=FEW["last_q"], softmax_scale=sigma)[0]
        names = ["a_shape" if e else "vertical_slash" for e in enough.tolist()]
    return torch.stack([(wide if n == "a_shape" else narrow)[0, h] for h, n in enumerate(names)])[None]


def _reference(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    """Scores of all pairs; a text of more than FIRST real tokens is masked by its blocks."""
    out = torch.zeros_like(query).transpose(1, 2)
    group = query.shape[1] // key.shape[1]
    for b in range(query.shape[0]):
        seen = attention_mask[b if attention_mask.shape[0] > 1 else 0, 0]
        real = seen.diagonal().nonzero().squeeze(1)
        q, k, v = (t[b].transpose(0, 1)[real][None] for t in (query, key, value))
        n = len(real)
        pairs = torch.ones(1, 1, n, n, dtype=torch.bool).tril()
        if n > FIRST:
            visited = _map(module.reference_pattern, module.layer_idx, q, k, scaling)
            pairs = pairs & visited.repeat_interleave(32, 2).repeat_interleave(32, 3)[..., :n, :n]
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        scores = (q @ k.repeat_interleave(group, 1).transpose(-1, -2)) * scaling
        p = scores.masked_fill(~pairs, -torch.inf).softmax(-1)
        out[b, real] = (p @ v.repeat_interleave(group, 1))[0].transpose(0, 1) * module.reference_scale
    return out, None


AttentionInterface.register("blocks_by_hand", _reference)
AttentionMaskInterface.register(
    "blocks_by_hand",
    lambda *a, **k: ALL_MASK_ATTENTION_FUNCTIONS["sdpa"](*a, **{**k, "allow_is_causal_skip": False}),
)


def build(family="llama", **overrides):
    return FAMILIES[family].build(torch.float64, max_position_embeddings=256, **overrides)


def by_hand(model, pattern, scales=None):
    """A copy of a plain model whose attention is `_reference`."""
    model = copy.deepcopy(model)
    model.config._attn_implementation_internal = "blocks_by_hand"
    for number, layer in enumerate(model.model.layers):
        layer.self_attn.reference_pattern = pattern
        layer.self_attn.reference_scale = 1.0 if scales is None else scales[number]
    return model


@pytest.mark.parametrize("pattern", [*PATTERNS, "auto"], ids=str)
def test_the_model_computes_by_the_blocks(pattern):
    """A batch of two texts, each with maps of its own; scores are multiplied by another number than 1/sqrt(D)."""
    model = build()
    for layer in model.model.layers:
        layer.self_attn.scaling = 3.0
    ids = tokens(2, 150)
    before = logits(model, ids)
    expected = logits(by_hand(model, pattern), ids)
    extension = seal_ops.extend(model, "minference", pattern=pattern, **FEW)
    assert extension.layers == 2 and extension.positions == 256
    assert close(logits(model, ids), expected) and largest(expected, before) > 1e-2
    short = tokens(1, FIRST)
    got = logits(model, short)
    seal_ops.unextend(model)
    assert close(got, logits(model, short)) and torch.equal(logits(model, ids), before)
    assert_untouched(model)


@pytest.mark.parametrize("family", ["llama", "llama-mqa-head_dim-32", "qwen3", "phi3", "cohere", "gemma3", "mixtral"])
def test_budgets_that_cover_everything_are_full_attention(family, monkeypatch):
    """Also with interleaved pairs (cohere), and beside layers with windows of their own (gemma3)."""
    model = build(family)
    ids = tokens(2, 100)
    before, listed = logits(model, ids), []
    plain = block_prefill.masks.blocks
    monkeypatch.setattr(block_prefill.masks, "blocks", lambda *a: listed.append(a[0].shape) or plain(*a))
    extension = seal_ops.extend(model, "minference", **ALL)
    assert close(logits(model, ids), before) and len(listed) == extension.layers
    with torch.no_grad():
        found = model(ids, use_cache=True).logits
    assert close(found, before)


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_of_a_padded_batch_are_what_they_are_alone(side):
    """Each with the blocks that it chooses; a short one is read densely."""
    model = build()
    expected = by_hand(model, "vertical_slash")
    seal_ops.extend(model, "minference", **FEW)
    rows = [tokens(1, n, seed=n)[0] for n in (120, 70, 5)]
    pad = lambda row, value: torch.nn.functional.pad(
        row, (120 - len(row), 0) if side == "left" else (0, 120 - len(row)), value=value
    )
    ids, mask = torch.stack([pad(r, 5) for r in rows]), torch.stack([pad(torch.ones_like(r), 0) for r in rows])
    for cache in (False, True):
        with torch.no_grad():
            found = model(
                ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0), use_cache=cache
            ).logits
        for n, row in enumerate(rows):
            assert close(found[n][mask[n].bool()], logits(expected, row[None])[0])


def test_packed_documents():
    model = build()
    expected = by_hand(model, "vertical_slash")
    seal_ops.extend(model, "minference", **FEW)
    documents = [tokens(1, n, seed=n) for n in (60, 1, 90)]
    places = torch.cat([torch.arange(d.shape[1]) for d in documents])[None]
    found = logits(model, torch.cat(documents, 1), position_ids=places)
    assert close(found, torch.cat([logits(expected, d) for d in documents], 1))


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_decodes_densely_from_the_prompt_that_was_read(cache):
    """The first token is that of the block lists, and all later ones see every key."""
    model = build()
    plain, prompt = copy.deepcopy(model), tokens(1, 100)
    seal_ops.extend(model, "minference", **FEW)
    more = dict(cache_implementation="static", disable_compile=True) if cache == "static" else {}
    written = model.generate(prompt, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0, **more)
    with torch.no_grad():
        output = model(prompt, use_cache=True)
        ids = [output.logits[:, -1:].argmax(-1)]
        for _ in range(7):  # the plain model goes on from the same cache
            output = plain(ids[-1], use_cache=True, past_key_values=output.past_key_values)
            ids.append(output.logits[:, -1:].argmax(-1))
    assert torch.equal(written[:, 100:], torch.cat(ids, 1))


@pytest.mark.parametrize("first", ["scales", "extension"])
def test_scales_on_top_and_their_gradients(first):
    """The choice of blocks has no gradient; what is computed through them has the exact one."""
    model = build()
    ids = tokens(2, 70)
    plain = copy.deepcopy(model)
    order = [lambda: seal_ops.attach(model, "channel"), lambda: seal_ops.extend(model, "minference", **FEW)]
    for step in order if first == "scales" else order[::-1]:
        step()
    scales = model.seal_scales
    randomise(scales)
    leaves = [s.detach().clone().double().requires_grad_() for _, s in scales.items()]
    reference = by_hand(plain, "vertical_slash", leaves)
    assert close(logits(model, ids), logits(reference, ids))
    loss = lambda m: m(ids, use_cache=False).logits[:, :-1].square().mean()
    wanted = [*leaves, reference.model.layers[0].self_attn.k_proj.weight]
    expected = torch.autograd.grad(loss(reference), wanted)
    for checkpointing in (False, True):
        if checkpointing:
            model.train()
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        mine = [*(s for _, s in scales.items()), model.model.layers[0].self_attn.k_proj.weight.requires_grad_()]
        for a, b in zip(torch.autograd.grad(loss(model), mine), expected):
            assert b.abs().max() > 0 and largest(a, b) <= 1e-4 * b.abs().max()


def test_a_prompt_in_pieces_is_chosen_for_piece_by_piece():
    """A piece of no more than last_q queries is read densely; a longer one by its own last queries."""
    model = build()
    ids = tokens(1, 100)
    seal_ops.extend(model, "minference", **ALL)
    whole = logits(model, ids)
    with torch.no_grad():
        output = model(ids[:, :60], use_cache=True)
        found = [output.logits]
        for cut in (slice(60, 64), slice(64, 100)):
            output = model(ids[:, cut], use_cache=True, past_key_values=output.past_key_values)
            found.append(output.logits)
    assert close(torch.cat(found, 1), whole)


WRONG = [
    (dict(last_q=0), "last_q must be an integer of at least 1, got 0"),
    (dict(block=48), "block must be a multiple of 32, got 48"),
    (dict(keeps=1.5), "keeps must be a share from 0 to 1, got 1.5"),
    (dict(pattern="dense"), "pattern must be vertical_slash, a_shape or auto, or a dict of them by layer, for all heads or for each, got 'dense'"),  # noqa: E501
    (dict(pattern={0: ["a_shape"] * 3}), "pattern of layer 0 must be one for each of its 4 query heads, got 3"),
    (dict(pattern={2: "a_shape"}), "pattern must be of layers among [0, 1], got [2]"),
]  # fmt: skip


@pytest.mark.parametrize("options, sentence", WRONG, ids=str)
def test_bad_options_of_block_prefill(options, sentence):
    model = FAMILIES["llama"].build()
    with pytest.raises(ValueError) as e:
        seal_ops.extend(model, "minference", **options)
    assert str(e.value) == f"seal_ops.extend: {sentence}"
    assert_untouched(model)


def test_what_block_prefill_refuses():
    with pytest.raises(ValueError, match="minference needs attention that runs in the fused ops, Gemma2Attention has"):
        seal_ops.extend(FAMILIES["gemma2"].build(), "minference")
    with pytest.raises(ValueError, match="minference needs layers without a window of their own"):
        seal_ops.extend(FAMILIES["mistral"].build(), "minference")
    model = build(attention_dropout=0.1)
    seal_ops.extend(model, "minference", **FEW)
    with pytest.raises(ValueError, match="an extended model must have no attention dropout, LlamaAttention passes 0.1"):
        model.train()(tokens(1, 50))
    model.eval()
    odd = torch.ones(50, 50, dtype=torch.bool).tril()
    odd[7, 3] = False
    with pytest.raises(ValueError, match="must have masks that are causal with padding or documents, got another"):
        logits(model, tokens(1, 50), attention_mask=odd[None, None])


def test_a_copied_and_a_pickled_model_choose_the_same(tmp_path):
    model = build()
    seal_ops.extend(model, "minference", pattern="auto", **FEW)
    ids = tokens(1, 70)
    got = logits(model, ids)
    torch.save(model, tmp_path / "model.pt")
    for twin in (copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)):
        assert torch.equal(logits(twin, ids), got)
