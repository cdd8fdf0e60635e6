"""The identity of a model: whatever changes what it computes changes it, and nothing else does."""

import copy
import pickle

import pytest
import torch
from retrieval_fixtures import model, one_thread, tokenizer  # noqa: F401
from transformers import AutoModelForCausalLM

import seal_ops
from seal_ops.huggingface import identity
from seal_ops.huggingface.identity import describe_model, fingerprint


def scaled():
    lm = model().eval()
    seal_ops.attach(lm, "channel")
    return lm


def projection(lm, layer=1):
    return lm.model.layers[layer].self_attn.o_proj


def last_column(lm):
    projection(lm).weight.data[:, -1] *= 2


def last_value(lm):
    projection(lm).weight.data[-1, -1] += 1e-3


def last_bit(lm):
    projection(lm).weight.data.view(torch.int32)[5, 7] ^= 1


def two_signs(lm):
    projection(lm).weight.data[3, [4, 9]] *= -1


def swapped_rows(lm):
    projection(lm).weight.data[[3, 4]] = projection(lm).weight.data[[4, 3]]


def rope_theta(lm):
    lm.config.rope_parameters = {**lm.config.rope_parameters, "rope_theta": 5e4}


def ntk(lm):
    """docs/reproduction.md's recipe: longer waves without a new config."""
    lm.model.rotary_emb.inv_freq *= 0.5


def softmax_scale(lm):
    lm.model.layers[0].self_attn.scaling *= 2


def rounded(lm):
    lm.bfloat16()


def epsilon(lm):
    lm.config.rms_norm_eps = 1e-3


def quantised(lm):
    projection(lm).register_buffer("qzeros", torch.arange(5, dtype=torch.uint8))


CHANGES = [
    last_column,
    last_value,
    last_bit,
    two_signs,
    swapped_rows,
    rope_theta,
    ntk,
    softmax_scale,
    rounded,
    epsilon,
    quantised,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_every_change_is_seen(change):
    lm = model().eval()
    before = fingerprint(lm)
    assert fingerprint(lm) == before
    change(lm)
    assert fingerprint(lm) != before


def test_one_value_of_a_buffer_is_seen():
    lm = model()
    quantised(lm)
    before = fingerprint(lm)
    projection(lm).qzeros[4] += 1
    assert fingerprint(lm) != before


def test_merged_scales_of_some_heads_are_seen():
    """Merging multiplies whole columns; the first one stays."""
    lm, base = scaled(), fingerprint(model().eval())
    for _, scale in lm.seal_scales.items():
        scale.data[1:] = 0
    seal_ops.merge(lm)
    assert fingerprint(lm) != base


def test_scales_count_where_they_are_on():
    lm, base = scaled(), fingerprint(model().eval())
    attached = fingerprint(lm)
    assert attached != base
    for _, scale in lm.seal_scales.items():
        scale.data[1:, 1:] = 0  # three quarters of the channels and more
    assert fingerprint(lm) not in (attached, base)
    with seal_ops.disabled(lm):
        assert fingerprint(lm) == base
    with lm.seal_scales.rows([torch.full((1, 4), 0.5)] * 2):
        assert fingerprint(lm) not in (attached, base)
    seal_ops.detach(lm)
    assert fingerprint(lm) == base


def test_trained_values_can_be_left_out():
    lm = scaled()
    before, whole = fingerprint(lm, trainable=False), fingerprint(lm)
    lm.seal_scales.layers["1"].scale.data += 1
    assert fingerprint(lm, trainable=False) == before and fingerprint(lm) != whole
    last_value(lm)
    assert fingerprint(lm, trainable=False) != before


def test_adapters_count_with_their_switches():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    lm = peft.get_peft_model(model(), config, "one")
    lm.add_adapter("two", config)
    seen = {fingerprint(lm)}
    lm.set_adapter("two")
    seen.add(fingerprint(lm))
    with lm.disable_adapter():
        seen.add(fingerprint(lm))
    lm.base_model.model.model.layers[0].self_attn.q_proj.scaling["two"] *= 2
    seen.add(fingerprint(lm))
    assert len(seen) == 4


def test_saving_loading_and_copying_keep_it(tmp_path):
    lm = AutoModelForCausalLM.from_config(model().config)
    lm.save_pretrained(tmp_path / "here")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "here")
    (tmp_path / "here").rename(tmp_path / "there")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "there").train()
    again.set_attn_implementation("eager")
    prints = [fingerprint(m) for m in (lm, loaded, again, copy.deepcopy(lm), pickle.loads(pickle.dumps(lm)))]
    assert len(set(prints)) == 1


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_a_long_prompt_is_no_other_model(kind):
    """These embeddings overwrite their frequencies while they run."""
    config = model().config
    config.max_position_embeddings = 32
    config.rope_parameters = {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16,  # noqa: E501
                              "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}  # fmt: skip
    lm = AutoModelForCausalLM.from_config(config).eval()
    before, frequencies = fingerprint(lm), lm.model.rotary_emb.inv_freq.clone()
    lm(torch.arange(48)[None])
    assert not torch.equal(frequencies, lm.model.rotary_emb.inv_freq), "the case is one"
    assert fingerprint(lm) == before


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(identity, "BLOCK", 32)
    identity._places.cache_clear()
    yield
    identity._places.cache_clear()


def sums(values):
    return tuple(identity._sums(values.reshape(-1).view(torch.uint8)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.float64])
def test_sums_of_a_gpu_see_every_bit(small_blocks, dtype):
    """What runs where a tensor is not on the CPU, over several blocks and a rest of less than a word."""
    values = torch.randint(-100, 100, (131,)).to(dtype)
    seen = {sums(values)}
    for byte in range(131 * dtype.itemsize):
        changed = values.clone()
        changed.view(torch.uint8)[byte] ^= 1 << byte % 8
        seen.add(sums(changed))
    assert len(seen) == 1 + 131 * dtype.itemsize
    assert sums(values) == sums(torch.cat([values[:1], values])[1:]), "wherever it lies in memory"


def test_flipped_signs_do_not_cancel_in_a_sum(small_blocks):
    values = torch.randn(32, dtype=torch.float64)
    seen = set()
    for i in range(1, 32):
        flipped = values.clone()
        flipped[[0, i]] *= -1
        seen.add(sums(flipped))
    swapped = values[[1, 0, *range(2, 32)]]
    assert len(seen | {sums(values), sums(swapped)}) == 33


def test_offloaded_weights_are_read(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    lm = model().eval()
    before = fingerprint(lm)
    accelerate.cpu_offload(lm)
    assert any(p.is_meta for p in lm.parameters())
    off = fingerprint(lm)
    assert off == before
    other = model()
    last_value(other)
    accelerate.cpu_offload(other)
    assert fingerprint(other) != before


def test_weights_that_are_nowhere_are_refused():
    with pytest.raises(ValueError, match="must have all its weights loaded to be identified, got .* without values"):
        fingerprint(model().to("meta"))


def test_weights_in_torch_ao_modules_are_seen():
    def made(factor):
        lm = model()
        projection(lm).weight.data[7] *= factor
        return torch.ao.quantization.quantize_dynamic(lm, {torch.nn.Linear}, dtype=torch.qint8)

    assert fingerprint(made(1)) == fingerprint(made(1)) != fingerprint(made(-1))


def test_weights_packed_in_subclasses_are_seen():
    class Packed(torch.nn.Parameter):
        """As bitsandbytes': packed numbers with the scales of their blocks beside them."""

    class State:
        def __init__(self, scale):
            self.absmax = scale

    def made(scale):
        lm = model().requires_grad_(False)
        weight = Packed(torch.arange(8, dtype=torch.uint8), requires_grad=False)
        weight.quant_state = State(scale)
        projection(lm).weight = weight
        return lm

    one, other = torch.ones(4), torch.tensor([1.0, 1, 1, 2])
    assert fingerprint(made(one)) == fingerprint(made(one.clone())) != fingerprint(made(other))


def test_description():
    lm = model(dtype=torch.bfloat16)
    lm.config._name_or_path = "user/tiny"
    found = describe_model(lm)
    assert found == {"class": "LlamaForCausalLM", "name": "user/tiny", "dtype": "bfloat16", "device": "cpu",
                     "parameters": lm.num_parameters(), "fingerprint": fingerprint(lm)}  # fmt: skip
    lm.config._name_or_path = "/home/somebody/models/tiny/"
    assert describe_model(lm)["name"] == "tiny", "results are shared, a machine's folders are not"


def test_named_scales_count_by_what_is_active():
    lm = scaled()
    before = fingerprint(lm)
    lm.seal_scales.add_adapter("other")
    assert fingerprint(lm) == before, "an adapter that is not active computes nothing"
    lm.seal_scales.set_adapter("other")
    for _, scale in lm.seal_scales.items():
        scale.data += 0.5
    assert fingerprint(lm) != before
    lm.seal_scales.set_adapter("default")
    assert fingerprint(lm) == before
