"""Masks on their way through transformers: what becomes structure, what stays a tensor, what is refused."""

import pytest
import torch
import transformers
from families import FAMILIES, close, logits, randomise, tokens, untouched
from torch import nn

import seal_ops
from seal_ops.huggingface import masks


def attached(family: str, **overrides):
    model = FAMILIES[family].build(**overrides)
    base = untouched(model)
    seal_ops.attach(model)
    return model, base


def test_a_padded_row_costs_its_tokens_whatever_the_window():
    """A size that says the window would be multiplied out where `generate` makes the mask contiguous."""
    config = transformers.MistralConfig(sliding_window=2048)
    padding = torch.ones(4, 3000, dtype=torch.bool)
    padding[1, :700] = False
    row = masks.attention_mask(
        4,
        3000,
        3000,
        attention_mask=padding,
        config=config,
        local_size=2048,
        mask_function=transformers.masking_utils.sliding_window_causal_mask_function(2048),
    )
    assert row.contiguous().numel() == 4 * 3000 - 700 + 4 + 2
    read = masks.read_mask(nn.Module(), row, 4, 3000, 3000, None, None)
    assert read.window == 2048 and read.tokens.shape == (11300,)
    assert read.cu_seqlens.tolist() == [0, 3000, 5300, 8300, 11300]
    on_another_device = row.clone()  # as a copy to another device: the Python attribute stays behind
    assert masks.read_mask(nn.Module(), on_another_device, 4, 3000, 3000, None, None).window == 2048


@pytest.mark.parametrize("family", ["mistral", "gemma3"])
def test_windowed_rows_with_holes(family):
    """Masked tokens inside a row: packing would bring its tokens nearer to each other than the window says."""
    model, base = attached(family)
    ids = tokens(3, 21)
    attention_mask = torch.ones_like(ids)
    attention_mask[0, 4:10] = attention_mask[1, :3] = attention_mask[2, 17:] = 0
    attention_mask[2, 5] = 0
    real = attention_mask.bool()
    positions = torch.arange(21).expand(3, -1)
    got, expected = (logits(m, ids, attention_mask=attention_mask, position_ids=positions)[real] for m in (model, base))
    assert close(got, expected)


def chunked():
    torch.manual_seed(0)
    config = transformers.Llama4TextConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        intermediate_size_mlp=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        attention_chunk_size=6,
        num_local_experts=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.2,
    )
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("length", [5, 6, 7, 21])
def test_chunks_are_no_sliding_window(length):
    """In a chunk a token sees its own chunk only; in a window always the last few tokens."""
    model = chunked()
    ids = tokens(2, length)
    expected = logits(model, ids)
    assert seal_ops.attach(model).attachment.patch.layers[0].module.config.attention_chunk_size == 6
    assert close(logits(model, ids), expected)
    padding = torch.ones_like(ids).index_fill(1, torch.tensor([0, 1]), 0)
    got = logits(model, ids, attention_mask=padding)
    seal_ops.detach(model)
    assert close(got[:, 2:], logits(model, ids, attention_mask=padding)[:, 2:])


def test_no_mask_where_queries_meet_more_keys_is_refused():
    """SDPA would align the queries to the first keys, flash-attention to the last."""
    model, _ = attached("llama")
    attention, hidden = model.model.layers[0].self_attn, torch.randn(1, 4, 64)
    cache = transformers.DynamicCache(config=model.config)
    embeddings = model.model.rotary_emb(hidden, torch.arange(4)[None])
    arguments = dict(position_embeddings=embeddings, attention_mask=None)
    name = "cache" if "cache" in type(attention).forward.__wrapped__.__code__.co_varnames else "past_key_values"
    with torch.no_grad():
        attention(hidden, **arguments, **{name: cache})
        with pytest.raises(
            ValueError, match="LlamaAttention must be given a mask where 4 queries meet 8 keys, got None"
        ):
            attention(hidden, **arguments, **{name: cache})


def test_an_integer_mask_of_four_dimensions_is_not_taken_for_a_packed_row():
    """Nor for a mask at all: PyTorch's parts would add its ones and zeros to the scores."""
    with pytest.raises(
        ValueError, match="Module must be given a boolean or an additive mask .* got one of torch.int32"
    ):
        masks.read_mask(nn.Module(), torch.ones(1, 1, 1, 9, dtype=torch.int32), 1, 1, 9, None, None)


@pytest.mark.parametrize("family", ["llama", "gemma2"])  # SDPA, and the soft cap's parts
def test_integer_masks_of_the_user_are_refused(family):
    model, _ = attached(family)
    with pytest.raises(ValueError, match="must be given a boolean or an additive mask of four dim.* of torch.int64"):
        model(tokens(2, 9), attention_mask=torch.ones(2, 1, 9, 9).tril().long())


# -- packed rows -------------------------------------------------------------------------------------------------------


def packed(lengths=(9, 12), kwargs: bool = True):
    """A batch of DataCollatorWithFlattening, and its documents."""
    documents = [tokens(1, n, seed=n)[0] for n in lengths]
    collate = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=kwargs)
    batch = collate([{"input_ids": d.tolist()} for d in documents])
    batch.pop("labels")
    return batch, documents


@pytest.mark.parametrize(
    "extra",
    [{}, {"use_cache": True}, {"attention_mask": True}, {"static": True}],
    ids=["plain", "cache", "mask-of-ones", "static-cache"],
)
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "cohere"])
def test_documents_of_a_packed_row_do_not_mix(family, extra, called):
    model, _ = attached(family)
    randomise(model.seal_scales)
    batch, documents = packed()
    expected = torch.cat([logits(model, d[None]) for d in documents], 1)
    extra = {"use_cache": False, **extra}
    if extra.get("attention_mask"):
        extra["attention_mask"] = torch.ones_like(batch["input_ids"])
    if extra.pop("static", False):
        extra.update(use_cache=True, past_key_values=transformers.StaticCache(config=model.config, max_cache_len=32))
    called.clear()
    with torch.no_grad():
        got = model(**batch, **extra).logits
    assert close(got, expected)
    if family == "llama" and extra.get("use_cache") and "past_key_values" not in extra:
        assert called == ["rope", "attention-packed"] * 2


def test_packed_rows_train():
    model, _ = attached("llama")
    batch, documents = packed()
    loss = model(**batch, use_cache=True).logits.logsumexp(-1).sum()
    got = torch.autograd.grad(loss, list(model.seal_scales.parameters()))
    total = sum(model(d[None], use_cache=False).logits.logsumexp(-1).sum() for d in documents)
    for a, b in zip(got, torch.autograd.grad(total, list(model.seal_scales.parameters()))):
        assert (a - b).abs().max() <= 1e-4 * b.abs().max()


def test_documents_on_a_filled_cache_are_refused():
    model, _ = attached("llama")
    batch, _ = packed()
    cache = transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        model(batch["input_ids"], past_key_values=cache)
        with pytest.raises(
            ValueError, match="must be given cu_seq_lens_q for queries and keys alike, got 21 queries and 42"
        ):
            model(**batch, past_key_values=cache)


# -- faults that these tests must notice -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault, check",
    [
        ("chunk for window", lambda: test_chunks_are_no_sliding_window(21)),
        ("holes packed", lambda: test_windowed_rows_with_holes("mistral")),
        ("window lost", lambda: test_windowed_rows_with_holes("mistral")),
        ("documents ignored", lambda: test_documents_of_a_packed_row_do_not_mix("llama", {"use_cache": True}, [])),
        ("no mask guessed", test_no_mask_where_queries_meet_more_keys_is_refused),
    ],
)
def test_the_faults_of_once_are_noticed(fault, check, monkeypatch):
    """Each fault is put in, and the check above it must fail."""
    from seal_ops.huggingface import attention

    if fault == "chunk for window":
        entry = masks.attention_mask

        class Windowed:  # a config that takes the chunk for a window
            def __init__(self, config):
                self.__dict__.update(
                    config.__dict__, sliding_window=config.attention_chunk_size, attention_chunk_size=None
                )

        def faulty(*args, config=None, **kwargs):
            return entry(*args, config=Windowed(config), **kwargs)

        monkeypatch.setitem(masks.AttentionMaskInterface._global_mapping, masks.NAME, faulty)
    elif fault in ("holes packed", "window lost"):
        packing = masks._packing
        monkeypatch.setattr(
            masks,
            "_packing",
            lambda padding, window: (
                _with_window(packing(padding, None), window) if fault == "holes packed" else packing(padding, None)
            ),
        )
    elif fault == "documents ignored":
        monkeypatch.setattr(attention, "with_documents", lambda mask, *args: mask)
    else:
        monkeypatch.setattr(attention, "read_mask", lambda module, mask, *args: masks.CallMask(True, None, args[2]))
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        check()


def _with_window(row, window):
    row = row.clone()
    row[..., -1] = window or 0
    return row


def test_padded_windowed_rows_through_compiled_layers():
    """The window is read where the mask was made, so that a layer stays one graph."""
    model, _ = attached("mistral")
    ids = tokens(2, 21)
    attention_mask = torch.ones_like(ids)
    attention_mask[0, :5] = 0
    expected = logits(model, ids, attention_mask=attention_mask)
    torch._dynamo.reset()
    for layer in model.model.layers:
        layer.compile(backend="eager", fullgraph=True)
    assert close(logits(model, ids, attention_mask=attention_mask), expected)
