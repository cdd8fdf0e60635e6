"""`seal_ops.extend` with other rotary frequencies: what changes, and that nothing has changed afterwards."""

import copy

import pytest
import torch
from attached import assert_untouched
from families import FAMILIES, close, largest, logits, tokens

import seal_ops
from seal_ops.huggingface.context_extension.extending import extended
from seal_ops.huggingface.context_extension.methods import METHODS
from seal_ops.huggingface.context_window import window
from seal_ops.huggingface.identity import fingerprint
from seal_ops.ops.rotary_tables import rope_frequencies

FREQUENCIES = {
    "linear": ("linear", dict(factor=4)),
    "ntk": ("ntk", dict(factor=4)),
    "yarn": ("yarn", dict(factor=4.0)),
    "giraffe": ("power", dict(k=1.0)),
    "giraffe, truncated": ("truncated", dict(low=1e-3, high=1e-1, rho=1e-3)),
}


def rotary(model):
    return model.model.rotary_emb


@pytest.mark.parametrize("name", FREQUENCIES)
def test_the_frequencies_are_those_of_the_method(name):
    model = FAMILIES["llama"].build()
    ids = tokens(2, 40)
    before, own, config = logits(model, ids), rotary(model).inv_freq.clone(), copy.deepcopy(model.config)
    rope_type, options = FREQUENCIES[name]
    extension = seal_ops.extend(model, name.partition(",")[0], **options)
    expected, factor = rope_frequencies(16, rope_type, base=10_000.0, max_position_embeddings=128, **options)
    assert torch.equal(rotary(model).inv_freq, expected) and rotary(model).attention_scaling == factor
    assert extension.positions == (512 if "factor" in options else None) == window(model)
    assert largest(logits(model, ids), before) > 1e-3
    assert seal_ops.unextend(model) is model
    assert torch.equal(rotary(model).inv_freq, own) and rotary(model).attention_scaling == 1.0
    assert torch.equal(logits(model, ids), before) and model.config == config and window(model) == 128
    assert_untouched(model)


@pytest.mark.parametrize("kind", ["linear", "yarn"])
def test_it_is_what_transformers_makes_of_the_config(kind):
    """A model built with the extension in its config, with the same weights."""
    model = FAMILIES["llama"].build()
    parameters = dict(rope_type=kind, rope_theta=10_000.0, factor=4.0)
    if kind == "yarn":
        parameters |= dict(original_max_position_embeddings=128)
    theirs = FAMILIES["llama"].build(rope_parameters=parameters, max_position_embeddings=512 if kind == "yarn" else 128)
    ids = tokens(2, 40)
    seal_ops.extend(model, kind, factor=4.0)
    assert close(logits(model, ids), logits(theirs, ids))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "phi3", "gemma3", "mixtral", "cohere"])
def test_families(family):
    """Also one with interleaved pairs (cohere): frequencies do not ask how channels are paired."""
    model = FAMILIES[family].build()
    ids = tokens(2, 40)
    before = logits(model, ids)
    with extended(model, "linear", factor=1):  # the same frequencies
        assert close(logits(model, ids), before)
    with extended(model, "ntk", factor=4):
        assert largest(logits(model, ids), before) > 1e-3
    assert torch.equal(logits(model, ids), before)


def test_windows_of_a_model_keep_their_frequencies():
    model = FAMILIES["gemma3"].build()
    own = {n: b.clone() for n, b in rotary(model).named_buffers()}
    seal_ops.extend(model, "ntk", factor=4)
    changed = {n for n, b in rotary(model).named_buffers() if not torch.equal(b, own[n])}
    assert changed == {"full_attention_inv_freq"}


def test_copies_and_identities():
    model = FAMILIES["llama"].build()
    ids = tokens(1, 40)
    before, plain = logits(model, ids), fingerprint(model)
    seal_ops.extend(model, "linear", factor=2)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin, ids), logits(model, ids)) and fingerprint(twin) == fingerprint(model) != plain
    seal_ops.unextend(twin)
    assert torch.equal(logits(twin, ids), before) and not torch.equal(logits(model, ids), before)
    assert fingerprint(twin) == plain


def test_inside_a_wrapper():
    peft = pytest.importorskip("peft")
    model = FAMILIES["llama"].build()
    ids = tokens(1, 40)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    before = logits(wrapped, ids)
    seal_ops.extend(wrapped, "ntk", factor=4)
    assert window(wrapped) == 512 and not torch.equal(logits(wrapped, ids), before)
    seal_ops.unextend(wrapped)
    assert torch.equal(logits(wrapped, ids), before)


def test_what_an_extension_says():
    model = FAMILIES["llama"].build()
    assert str(seal_ops.extend(model, "ntk", factor=2)) == "ntk(factor=2): 256 positions"
    seal_ops.unextend(model)
    said = str(seal_ops.extend(model, "streaming", window=16))
    assert said == "streaming(sinks=4, window=16): any length, in 2 layers"


LISTED = "linear, ntk, dynamic_ntk, yarn, giraffe, self_extend, dual_chunk, lm_infinite, streaming, minference"
WRONG = [
    ("longrope", {}, f"method must be one of {LISTED}, got 'longrope'"),
    ("ntk", {}, "ntk takes the options factor, got none"),
    ("ntk", dict(group=2), "ntk takes the options factor, got group"),
    ("yarn", dict(factor=0.5), "factor must be a number of at least 1, got 0.5"),
    ("self_extend", dict(group=4), "self_extend takes the options group, window, got group"),
    ("self_extend", dict(group=0, window=4), "group must be an integer of at least 1, got 0"),
    ("self_extend", dict(group=2, window=129), "window must be at most the trained length 128, got 129"),
    ("dual_chunk", dict(chunk=129), "chunk must be at most the trained length 128, got 129"),
    ("dual_chunk", dict(chunk=8, length=300), "length must be at most the trained length 128, got 300"),
    ("lm_infinite", dict(sinks=9, window=8), "sinks must be at most the window's 8 keys, got 9"),
    ("lm_infinite", dict(window=200), "window must be at most the trained length 128, got 200"),
    ("streaming", dict(sinks=100, window=100), "sinks + window must be at most the trained length 128, got 100 + 100"),
    ("minference", dict(vertical=-1), "vertical must be an integer of at least 0, got -1"),
    ("giraffe", {}, "giraffe takes k (power basis), or low, high and rho (truncated basis), got none of them"),
    ("giraffe", dict(k=1.0, low=0.1), "giraffe takes k (power basis), or low, high and rho (truncated basis), got k, low"),  # noqa: E501
    ("ntk", dict(factor=2, trained=0), "trained must be given as a number of positions that the config does not name, got 0"),  # noqa: E501
]  # fmt: skip


@pytest.mark.parametrize("method, options, sentence", WRONG, ids=str)
def test_bad_options(method, options, sentence):
    model = FAMILIES["llama"].build()
    with pytest.raises(ValueError) as e:
        seal_ops.extend(model, method, **options)
    assert str(e.value) == f"seal_ops.extend: {sentence}"
    assert_untouched(model)


def test_every_method_has_a_bad_call_and_a_good_one():
    assert {w[0] for w in WRONG} >= set(METHODS) - {"linear", "dynamic_ntk"} and list(METHODS) == LISTED.split(", ")


def test_models_that_cannot():
    model = FAMILIES["llama"].build()
    seal_ops.extend(model, "ntk", factor=2)
    with pytest.raises(ValueError, match=r"model is extended already \(by ntk\); call seal_ops.unextend"):
        seal_ops.extend(model, "yarn", factor=2)
    seal_ops.unextend(model)
    with pytest.raises(ValueError, match="seal_ops.unextend: model must be extended, this LlamaForCausalLM is not"):
        seal_ops.unextend(model)
    scaled = FAMILIES["llama"].build(rope_parameters=dict(rope_type="linear", rope_theta=10_000.0, factor=2.0))
    for method, options in (("ntk", dict(factor=2)), ("dynamic_ntk", dict(factor=2))):
        with pytest.raises(ValueError, match=f"{method} needs a rotary embedding of default frequencies"):
            seal_ops.extend(scaled, method, **options)
    with pytest.raises(
        ValueError, match="model must have a rotary embedding with frequencies, GPT2LMHeadModel has none"
    ):
        import transformers

        seal_ops.extend(
            transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2)), "ntk", factor=2
        )


@pytest.mark.parametrize("method, options", [("self_extend", dict(group=2, window=4)), ("dynamic_ntk", dict(factor=2))])
@pytest.mark.parametrize(
    "family, reason",
    [
        ("cohere", "needs a half-split rotation as the last step before attention, CohereAttention has none"),
        ("minicpm3", "needs attention that runs in the fused ops, MiniCPM3Attention has values of 16 channels"),
        ("gemma2", "needs attention that runs in the fused ops, Gemma2Attention has soft-capped scores"),
        ("mistral", "needs layers without a window of their own, MistralForCausalLM has none"),
    ],
)
def test_families_that_cannot_run_a_program(family, reason, method, options):
    model = FAMILIES[family].build()
    ids = tokens(1, 20)
    before = logits(model, ids)
    with pytest.raises(ValueError, match=f"seal_ops.extend: {method} {reason}"):
        seal_ops.extend(model, method, **options)
    assert torch.equal(logits(model, ids), before)
    assert_untouched(model)
