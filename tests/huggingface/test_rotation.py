"""The rotary embedding stays fused whatever is laid round a forward, and where it does not, `attach` says so."""

import functools
import inspect
import re
import sys
import types
import warnings

import pytest
import torch
import transformers
from families import FAMILIES, close, logits, tokens, untouched
from torch import nn
from transformers.models.llama import modeling_llama

import seal_ops

LLAMA = FAMILIES["llama"]
ATTENTION = modeling_llama.LlamaAttention
CACHE = "cache" if "cache" in inspect.signature(ATTENTION.forward).parameters else "past_key_values"  # since 5.24


def attach_quietly(model: nn.Module):
    """`attach`, in which a warning is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        return seal_ops.attach(model)


def assert_fused(model: nn.Module, called: list[str]) -> None:
    """All layers are fused, without a warning, and the model computes what it did."""
    base = untouched(model)
    ids = tokens()
    expected = logits(base, ids)
    scales = attach_quietly(model)
    assert scales.attachment.patch.summary() == "rotation fused in 2 of 2 layers"
    called.clear()
    assert close(logits(model, ids), expected)
    assert called == ["rope_attention"] * 2
    called.clear()
    with torch.no_grad():
        assert close(model(ids, use_cache=True).logits, expected)
    assert called == ["rope", "attention"] * 2


# -- decorators ------------------------------------------------------------------------------------------------------


def with_wraps(forward):
    @functools.wraps(forward)
    def wrapper(*args, **kwargs):
        return forward(*args, **kwargs)

    return wrapper


def without_wraps(forward):
    return lambda self, *args, **kwargs: forward(self, *args, **kwargs)


def twice(forward):
    return without_wraps(with_wraps(forward))


def deprecating(old: str, new: str):
    """transformers' own decorator, for any pair of names."""
    from transformers.utils.deprecation import deprecate_kwarg

    return deprecate_kwarg(old, version="99.0", new_name=new)


@pytest.mark.parametrize(
    "decorate",
    [
        with_wraps,
        without_wraps,
        twice,
        torch.no_grad(),
        deprecating("layer_past", CACHE),
        deprecating("mask", "attention_mask"),
    ],
    ids=["wraps", "no-wraps", "two", "no_grad", "deprecate-cache", "deprecate-mask"],
)
def test_decorated_forwards_stay_fused(decorate, monkeypatch, called):
    monkeypatch.setattr(ATTENTION, "forward", decorate(ATTENTION.forward))
    assert_fused(LLAMA.build(), called)


def test_a_decorator_goes_on_working(monkeypatch):
    """It is copied with what it decorates, not left out."""
    seen = []

    def counting(forward):
        @functools.wraps(forward)
        def wrapper(self, *args, **kwargs):
            seen.append(self.layer_idx)
            return forward(self, *args, **kwargs)

        return wrapper

    monkeypatch.setattr(ATTENTION, "forward", counting(ATTENTION.forward))
    model = LLAMA.build()
    attach_quietly(model)
    seen.clear()
    logits(model, tokens())
    assert seen == [0, 1]


class Opaque:
    """A decorator that is no function: what it holds cannot be found through a closure."""

    def __init__(self, forward):
        self.forward = forward

    def __get__(self, instance, owner):
        return self if instance is None else types.MethodType(self.forward, instance)

    def __call__(self, *args, **kwargs):
        return self.forward(*args, **kwargs)


def test_a_rotation_out_of_sight_is_reported_and_right(monkeypatch):
    monkeypatch.setattr(ATTENTION, "forward", Opaque(ATTENTION.forward))
    model = LLAMA.build()
    expected = logits(model, tokens())
    with pytest.warns(
        UserWarning,
        match=r"^seal_ops.attach: LlamaAttention \(2 of 2 layers\) keeps its own rotary "
        r"embedding: its forward hides the rotary function apply_rotary_pos_emb$",
    ):
        scales = seal_ops.attach(model)
    assert scales.attachment.patch.summary() == "rotation fused in 0 of 2 layers"
    assert close(logits(model, tokens()), expected)


def test_a_forward_replaced_on_the_instance_is_reported(recwarn):
    model = LLAMA.build()
    expected = logits(model, tokens())
    for layer in model.model.layers[:1]:
        forward = layer.self_attn.forward
        layer.self_attn.forward = lambda *args, _forward=forward, **kwargs: _forward(*args, **kwargs)
    with pytest.warns(
        UserWarning, match=rf"LlamaAttention \(1 of 2 layers\) .* replaced on the instance \(by {__name__}\)"
    ):
        scales = seal_ops.attach(model)
    assert scales.attachment.patch.summary() == "rotation fused in 1 of 2 layers"
    assert close(logits(model, tokens()), expected)


# -- another library's rotary function -------------------------------------------------------------------------------


def foreign(function):
    function.__module__ = "fastlib.rope"
    return function


def test_another_librarys_rotary_function_is_replaced_where_it_computes_the_same(monkeypatch, called):
    own = modeling_llama.apply_rotary_pos_emb
    monkeypatch.setattr(
        modeling_llama,
        "apply_rotary_pos_emb",
        foreign(lambda q, k, cos, sin, position_ids=None, unsqueeze_dim=1: own(q, k, cos, sin)),
    )
    assert_fused(LLAMA.build(), called)


def test_another_librarys_rotary_function_that_cannot_be_tried_is_reported(monkeypatch):
    """As Liger's, which runs on a GPU only."""

    def apply_rotary_pos_emb(q, k, cos, sin, position_ids=None, unsqueeze_dim=1):
        if q.shape[-1] == 8:  # the trial
            raise RuntimeError("no GPU")
        return own(q, k, cos, sin)

    own = modeling_llama.apply_rotary_pos_emb
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", foreign(apply_rotary_pos_emb))
    model = LLAMA.build()
    expected = logits(model, tokens())
    with pytest.warns(UserWarning, match="its rotary function apply_rotary_pos_emb is fastlib.rope's, which seal_ops"):
        seal_ops.attach(model)
    assert close(logits(model, tokens()), expected)


def test_another_rotation_is_left_alone_without_a_warning():
    attach_quietly(FAMILIES["cohere"].build())


# -- renames ---------------------------------------------------------------------------------------------------------


def renamed(replacements: dict[str, str]) -> type:
    """transformers' Llama with words of its attention class, and of the call of it, changed, as a release might."""
    source = inspect.getsource(modeling_llama)
    end = re.search(r"class LlamaDecoderLayer", source).start()
    head, rest = source[:end], source[end:]
    for old, new in replacements.items():
        head, count = re.subn(old, new, head)
        assert count > 0, f"{old} is not in this release's Llama"
        rest = re.sub(f"({old})=({old})", rf"{new}=\2", rest, count=1)
    source = head + rest
    name = "transformers.models.llama.renamed_" + str(abs(hash(source)))
    module = types.ModuleType(name)
    module.__package__, module.__file__ = "transformers.models.llama", modeling_llama.__file__
    sys.modules[name] = module
    exec(compile(source, modeling_llama.__file__, "exec"), module.__dict__)
    return module.LlamaForCausalLM


CALL = r"= apply_rotary_pos_emb\(query_states, key_states, cos, sin\)"


@pytest.mark.parametrize(
    "replacements",
    [
        {r"\bapply_rotary_pos_emb\b": "turn"},
        {r"\bposition_embeddings\b": "cos_and_sin"},
        {rf"\b{CACHE}\b": "memory"},
        {CALL: "= (lambda: apply_rotary_pos_emb(query_states, key_states, cos, sin))()"},
        {CALL: "= [apply_rotary_pos_emb(*x, cos, sin) for x in [(query_states, key_states)]][0]"},
        {CALL: "= apply_rotary_pos_emb(q=query_states, k=key_states, cos=cos, sin=sin, unsqueeze_dim=1)"},
    ],
    ids=["function", "embeddings", "cache", "lambda", "comprehension", "keywords"],
)
def test_renames_stay_fused(replacements, called):
    torch.manual_seed(0)
    kind = renamed(replacements)
    model = kind(LLAMA.build().config.__class__(**LLAMA.build().config.to_dict())).eval()
    base = untouched(model)
    seal = attach_quietly(model)
    assert seal.attachment.patch.summary() == "rotation fused in 2 of 2 layers"
    called.clear()
    assert close(logits(model, tokens()), logits(base, tokens()))
    assert called == ["rope_attention"] * 2
    called.clear()
    with torch.no_grad():
        assert close(model(tokens(), use_cache=True).logits, logits(base, tokens()))
    assert called == ["rope", "attention"] * 2


def test_a_rotary_function_of_the_class_is_reported():
    """Found through `self`, where it cannot be replaced for one copy."""
    kind = renamed(
        {
            CALL: "= self.rotary(query_states, key_states, cos, sin)",
            r"class LlamaAttention\(nn.Module\):": "class LlamaAttention(nn.Module):\n"
            "    rotary = staticmethod(apply_rotary_pos_emb)\n",
        }
    )
    model = kind(LLAMA.build().config.__class__(**LLAMA.build().config.to_dict())).eval()
    with pytest.warns(UserWarning, match="LlamaAttention .2 of 2 layers. keeps its own rotary embedding"):
        seal_ops.attach(model)


# -- caches ----------------------------------------------------------------------------------------------------------


def caches(model):
    yield transformers.DynamicCache(config=model.config)
    yield transformers.StaticCache(config=model.config, max_cache_len=32)
    yield QuantisedLike(config=model.config)


class QuantisedLike(transformers.DynamicCache):
    """Stands for transformers' quantised caches, whose back ends are not installed here: a subclass of the cache
    type."""


class Foreign:
    """A cache of no type of transformers'."""

    def __init__(self, cache):
        self.cache = cache

    def update(self, *args, **kwargs):
        return self.cache.update(*args, **kwargs)

    def __getattr__(self, name):
        if name == "cache":
            raise AttributeError(name)
        return getattr(self.cache, name)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3"])  # the last two with sliding layers of a cache
def test_every_cache_gets_rotated_keys(family):
    model = FAMILIES[family].build()
    base = untouched(model)
    attach_quietly(model)
    ids = tokens()
    foreign_cache = [Foreign(transformers.DynamicCache(config=model.config))] if family == "llama" else []
    for cache in (*caches(model), *foreign_cache):  # transformers makes no sliding masks for a cache it does not know
        with torch.no_grad():
            got = torch.cat([model(piece, past_key_values=cache).logits for piece in (ids[:, :9], ids[:, 9:])], 1)
        assert close(got, logits(base, ids)), type(cache).__name__


@pytest.mark.parametrize("positional", [0, 1, 2, 3])
def test_arguments_by_position(positional):
    """The attention module called by hand, with its first arguments by position: cos and sin, mask, cache."""
    model = LLAMA.build()
    twin = untouched(model)
    attach_quietly(model)
    hidden, ids = torch.randn(1, 9, 64), torch.arange(9)[None]
    names = [n for n in inspect.signature(ATTENTION.forward).parameters if n not in ("self", "kwargs")][1:4]
    got = []
    for m in (model, twin):
        cache = transformers.DynamicCache(config=m.config)
        values = dict(zip(names, (m.model.rotary_emb(hidden, ids), None, cache)))
        first = [values.pop(n) for n in names[:positional]]
        with torch.no_grad():
            got.append(m.model.layers[0].self_attn(hidden, *first, **values)[0])
        keys = cache.layers[0].keys
        got.append(keys)
    assert close(got[0], got[2]) and close(got[1], got[3])
