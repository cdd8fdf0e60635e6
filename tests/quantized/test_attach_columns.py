"""On whole models: which columns, where they start, what is frozen, and that everything comes back."""

import copy

import pytest
import torch
from families import FAMILIES, logits, tokens
from toy_quantizer import DeafLinear, quantize

import seal_ops
from seal_ops.quantized import bases
from seal_ops.quantized.attachment import find_targets

LLAMA = FAMILIES["llama"]  # four query heads, two key and value heads: grouped


def toy_model(**overrides):
    model = LLAMA.build(**overrides)
    return model, quantize(model)


def state(model):
    return {name: t.clone() for name, t in model.state_dict().items()}


def flags(model):
    return {name: p.requires_grad for name, p in model.named_parameters()}


def test_sorted_and_unique_and_the_largest(token_ids):
    """The chosen columns are those whose inputs have the largest squares, as a plain pass over the samples says."""
    model, _ = toy_model()
    squares = {}

    def note(name):
        def hook(module, args):
            squares[name] = squares.get(name, 0) + args[0].double().flatten(0, 1).square().sum(0)

        return hook

    handles = [m.register_forward_pre_hook(note(n)) for n, m in find_targets(model, None, "test").items()]
    with torch.no_grad():
        for ids in token_ids:
            model(torch.tensor([ids]))
    for handle in handles:
        handle.remove()
    found = seal_ops.attach_weak_columns(model, 5, calibration=token_ids, batch_tokens=40)
    assert set(found.layers) == set(squares) and "lm_head" not in found.layers and len(found.layers) == 14
    for name, index in found.indices().items():
        assert index.tolist() == sorted(set(index.tolist())) and len(index) == 5
        assert set(index.tolist()) == set(squares[name].topk(5).indices.tolist()), name


def test_global_columns_are_one_set_for_the_residual_stream(token_ids):
    model, _ = toy_model()
    found = seal_ops.attach_weak_columns(model, 6, calibration=token_ids, share="global").indices()
    stream = [
        i for n, i in found.items() if n.rpartition(".")[2] in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
    ]
    assert len(stream) == 10 and all(torch.equal(i, stream[0]) for i in stream)
    others = [i for n, i in found.items() if n.rpartition(".")[2] in ("o_proj", "down_proj")]
    assert not torch.equal(others[0], others[2]) and all(len(i) == 6 for i in others)


def test_error_weighted(token_ids):
    """Sensitivity times the squared quantisation error: a column that is exact in 4 bits is not chosen."""
    model, weights = toy_model()
    name = "model.layers.0.self_attn.q_proj"
    first = seal_ops.attach_weak_columns(model, 4, calibration=token_ids).indices()[name]
    seal_ops.detach_weak_columns(model)
    exact = bases.weight_of(model.get_submodule(name))
    weights[f"{name}.weight"][:, first] = exact[:, first]
    found = seal_ops.attach_weak_columns(model, 4, calibration=token_ids, original=weights, error_weighted=True)
    assert not set(found.indices()[name].tolist()) & set(first.tolist())


def test_untrained_residual_equals_those_columns_in_16_bits(token_ids):
    """Every layer: the base with the chosen columns as they were (fp64)."""
    model = LLAMA.build(torch.float64)
    reference = copy.deepcopy(model)
    weights = quantize(model)
    found = seal_ops.attach_weak_columns(
        model, 9, calibration=token_ids, original=weights, start="residual", dtype=torch.float64
    )
    for name, module in found.layers.items():
        expected = bases.weight_of(module)
        expected[:, module.column_index] = weights[f"{name}.weight"][:, module.column_index]
        reference.get_submodule(name).weight.data.copy_(expected)
    assert float((logits(model, tokens()) - logits(reference, tokens())).abs().max()) < 1e-9


def output_errors(model, reference, found, token_ids):
    """Squared error of each layer's output on what the 16-bit layer reads."""
    errors, inputs = {}, {}
    handles = [
        reference.get_submodule(n).register_forward_pre_hook(lambda m, a, n=n: inputs.__setitem__(n, a[0]))
        for n in found.layers
    ]
    with torch.no_grad():
        for ids in token_ids:
            reference(torch.tensor([ids]))
            for name, module in found.layers.items():
                wrong = module(inputs[name]) - reference.get_submodule(name)(inputs[name])
                errors[name] = errors.get(name, 0) + float(wrong.square().sum())
    for handle in handles:
        handle.remove()
    return errors


def test_least_squares_is_the_best_start(token_ids):
    """In the layers' own terms: less error than the residual, more than none is left, nothing near it is better."""
    reference = LLAMA.build(torch.float64)
    found = {}
    for start in ("zero", "residual", "least_squares"):
        model = copy.deepcopy(reference)
        targets = find_targets(model, None, "test")
        weights = quantize(model)
        # The same inputs for all: those of the 16-bit model, which the quantised one reads in its first layer only.
        columns = seal_ops.attach_weak_columns(
            model, 6, calibration=token_ids, original=weights, start=start, dtype=torch.float64, damping=1e-6,
            target_modules=[n for n in targets if ".layers.0.self_attn." in n and "o_proj" not in n],
        )  # fmt: skip
        found[start] = output_errors(model, reference, columns, token_ids)
        if start == "least_squares":
            for _ in range(3):
                before = columns.values()
                with torch.no_grad():
                    for delta in columns.parameters():
                        delta.add_(torch.randn_like(delta), alpha=1e-3)
                moved = output_errors(model, reference, columns, token_ids)
                assert all(moved[name] > found[start][name] for name in moved)
                with torch.no_grad():
                    for name, delta in columns.items():
                        delta.copy_(before[name])
    for name in found["zero"]:
        assert found["least_squares"][name] < found["residual"][name] < found["zero"][name]


def test_detach_restores_bit_for_bit(token_ids):
    model, weights = toy_model()
    model.lm_head.weight.requires_grad_(False)
    before, were, expected = state(model), flags(model), logits(model, tokens())
    classes = {name: type(m) for name, m in model.named_modules()}
    found = seal_ops.attach_weak_columns(model, 4, calibration=token_ids, original=weights)
    assert model.seal_weak_columns is found
    assert {n for n, on in flags(model).items() if on} == {f"{n}.column_delta" for n in found.layers}
    assert not torch.equal(logits(model, tokens()), expected)
    with seal_ops.weak_columns_disabled(model):
        assert torch.equal(logits(model, tokens()), expected)
    changed = logits(model, tokens())
    assert seal_ops.detach_weak_columns(model) is model
    assert torch.equal(logits(model, tokens()), expected) and flags(model) == were
    after = state(model)
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)
    assert classes == {name: type(m) for name, m in model.named_modules()} and not hasattr(model, "seal_weak_columns")
    again = seal_ops.attach_weak_columns(model, found.indices(), original=weights)
    assert torch.equal(logits(model, tokens()), changed) and all(
        torch.equal(a, b) for a, b in zip(again.values().values(), found.values().values())
    )


@pytest.mark.parametrize("first", ["scales", "columns"])
@pytest.mark.parametrize("off", ["scales", "columns"])
def test_with_scales_in_any_order(token_ids, first, off):
    model, weights = toy_model()
    expected, were = logits(model, tokens()), flags(model)

    def put(what):
        if what == "scales":
            seal_ops.attach(model, "channel")
        else:
            seal_ops.attach_weak_columns(model, 4, calibration=token_ids, original=weights)

    def take(what):
        (seal_ops.detach if what == "scales" else seal_ops.detach_weak_columns)(model)

    order = ["scales", "columns"] if first == "scales" else ["columns", "scales"]
    for what in order:
        put(what)
    trained = {n for n, on in flags(model).items() if on}
    assert trained == {f"{n}.column_delta" for n in model.seal_weak_columns.layers} | {
        f"seal_scales.layers.{i}.scale" for i in (0, 1)
    }
    with torch.no_grad():
        for p in model.seal_scales.parameters():
            p.add_(torch.randn_like(p), alpha=0.3)
    model.train()
    model(tokens(), labels=tokens(), use_cache=False).loss.backward()
    model.eval()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters() if p.requires_grad)
    take(off)
    left = {n for n, on in flags(model).items() if on}
    assert left == {n for n in trained if ("seal_scales" in n) != (off == "scales")}, "the base stays frozen"
    take("columns" if off == "scales" else "scales")
    assert torch.equal(logits(model, tokens()), expected) and flags(model) == were


def test_gradients_equal_those_of_a_dense_model(token_ids):
    """A whole grouped-query model in fp64: the gradients of its columns are the dense weights' in them."""
    model = LLAMA.build(torch.float64)
    dense = copy.deepcopy(model)
    weights = quantize(model)
    found = seal_ops.attach_weak_columns(
        model, 7, calibration=token_ids, original=weights, start="residual", dtype=torch.float64
    )
    for name, module in found.layers.items():
        weight = bases.weight_of(module)
        weight[:, module.column_index] += module.column_delta.detach()
        dense.get_submodule(name).weight.data.copy_(weight)
    for m in (model, dense):
        m(tokens(), labels=tokens(), use_cache=False).loss.backward()
    for name, module in found.layers.items():
        expected = dense.get_submodule(name).weight.grad[:, module.column_index]
        assert torch.allclose(module.column_delta.grad, expected, atol=1e-10), name


def test_prefill_equals_decode_after_training(token_ids):
    model, weights = toy_model()
    found = seal_ops.attach_weak_columns(model, 5, calibration=token_ids, original=weights)
    seal_ops.train(model, [{"input_ids": ids} for ids in token_ids], lr=1e-2, progress=False)
    assert any(float(d.detach().abs().max()) > 0 for d in found.parameters())
    ids = tokens()
    with torch.no_grad():
        whole = model(ids).logits
        cache, parts = None, []
        for i in range(ids.shape[1]):
            step = model(ids[:, i : i + 1], past_key_values=cache, use_cache=True)
            cache = step.past_key_values
            parts.append(step.logits)
    assert float((torch.cat(parts, 1) - whole).norm() / whole.norm()) < 1e-5


@pytest.mark.parametrize("method", ["nf4", "nf4-double"])
def test_quantises_a_16_bit_model(bitsandbytes, token_ids, method):
    model = LLAMA.build()
    reference = copy.deepcopy(model)
    found = seal_ops.attach_weak_columns(model, 8, calibration=token_ids, quantize=method)
    assert found.config.start == "residual" and found.config.quantize == method
    for name, module in found.layers.items():
        assert bases.is_nf4(module) and module.weight.dtype == torch.uint8
        index, original = module.column_index, reference.get_submodule(name).weight.detach()
        merged = bases.columns_of(module, index) + module.column_delta.detach()
        assert torch.allclose(merged, original[:, index], atol=1e-6), "exact residuals"
        assert float((bases.weight_of(module) - original).norm() / original.norm()) > 0.02
    with seal_ops.weak_columns_disabled(model):
        base = logits(model, tokens())
    seal_ops.detach_weak_columns(model)
    assert torch.equal(logits(model, tokens()), base)


def test_least_squares_while_quantising(bitsandbytes, token_ids):
    errors = {}
    for start in ("residual", "least_squares"):
        model, reference = LLAMA.build(), LLAMA.build()
        found = seal_ops.attach_weak_columns(
            model, 8, calibration=token_ids, quantize="nf4", start=start, error_weighted=True
        )
        errors[start] = output_errors(model, reference, found, token_ids)
    assert all(errors["least_squares"][n] < errors["residual"][n] for n in errors["residual"])


def test_scales_keep_no_16_bit_layer_alive(bitsandbytes, token_ids):
    model = LLAMA.build()
    scales = seal_ops.attach(model, "head")
    seal_ops.attach_weak_columns(model, 4, calibration=token_ids, quantize="nf4")
    assert all(bases.is_nf4(layer.output_projection) for layer in scales.attachment.patch.layers)


def test_copies_train_on_their_own(token_ids):
    model, weights = toy_model()
    seal_ops.attach_weak_columns(model, 4, calibration=token_ids, original=weights)
    other = copy.deepcopy(model)
    assert other.seal_weak_columns.owner is other
    assert all(m is other.get_submodule(n) for n, m in other.seal_weak_columns.layers.items())
    before = logits(model, tokens())
    seal_ops.train(other, [{"input_ids": token_ids[0]}], lr=1e-2, progress=False)
    assert torch.equal(logits(model, tokens()), before) and not torch.equal(logits(other, tokens()), before)
    seal_ops.detach_weak_columns(other)
    assert torch.equal(logits(model, tokens()), before)


ONE = "model.layers.0.mlp.up_proj"
BAD = {
    "none": ({"columns": 0}, "columns must be an integer of at least 1, got 0"),
    "not a number": ({"columns": 2.0}, "columns must be an integer of at least 1, got 2.0"),
    "no layer": ({"columns": {}}, "columns must name at least one layer, got {}"),
    "all": ({"columns": 64}, "must be fewer than the 64 inputs of .*, got 64"),
    "too many": ({"columns": 65}, "must be fewer than the 64 inputs of .*, got 65"),
    "twice": ({"columns": {ONE: [1, 4, 1]}}, f"columns of {ONE} must be different, got 1 twice"),
    "below": ({"columns": {ONE: [-1, 4]}}, "must lie in 0 to 63, got -1"),
    "beyond": ({"columns": {ONE: [4, 64]}}, "must lie in 0 to 63, got 64"),
    "given none": ({"columns": {ONE: []}}, "must be 1 to 63 numbers, got 0"),
    "given all": ({"columns": {ONE: range(64)}}, "must be 1 to 63 numbers, got 64"),
    "unknown layer": ({"target_modules": ["z_proj"]}, "must name linear layers of the model, got 'z_proj'"),
    "no samples": ({"calibration": None}, "calibration must hold samples .*, got none"),
    "empty": ({"calibration": []}, "calibration must hold at least one sample, got none"),
    "text": ({"calibration": ["a text"]}, r"calibration\[0\] is text and needs the argument tokenizer, got None"),
    "one text": ({"calibration": "a text"}, "calibration must be a list of samples, got one str"),
    "share": ({"share": "all"}, "share must be one of layer, global, got 'all'"),
    "start": ({"start": "best"}, "start must be one of residual, least_squares, zero or None, got 'best'"),
    "no originals": ({"start": "residual"}, "must be 'zero' where the 16-bit weights are unknown .*, got 'residual'"),
    "no error": ({"error_weighted": True}, "error_weighted needs the 16-bit weights"),
    "method": ({"quantize": "int3"}, "quantize must be one of nf4, nf4-double, hqq or None, got 'int3'"),
    "dtype": ({"dtype": torch.float16}, "dtype must be torch.float32 or torch.bfloat16, got torch.float16"),
    "original": ({"original": 3}, "original must be a model, a folder or a mapping, got int"),
    "other original": (
        {"original": {"model.layers.0.self_attn.q_proj": torch.zeros(3, 4)}}, r"of shape \[64, 64\], got \[3, 4\]"
    ),
    "missing original": ({"original": {}}, "original must hold .*weight in 16 or more bits, got none"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_one_sentence(token_ids, case):
    model, _ = toy_model()
    before, were = state(model), flags(model)
    options, sentence = BAD[case]
    with pytest.raises(ValueError, match=f"^seal_ops.attach_weak_columns: .*{sentence}") as error:
        seal_ops.attach_weak_columns(model, **{"columns": 4, "calibration": token_ids, **options})
    assert "\n" not in str(error.value)
    after = state(model)
    assert before.keys() == after.keys() and flags(model) == were, "left as it was"


def test_one_sentence_for_models_that_cannot(token_ids):
    deaf = LLAMA.build()
    quantize(deaf, DeafLinear)
    with pytest.raises(ValueError, match="must pass a gradient to its input, got DeafLinear, which passes none"):
        seal_ops.attach_weak_columns(deaf, 4, calibration=token_ids)
    with pytest.raises(ValueError, match="model must have loaded weights, got model.layers.0.* on the meta device"):
        seal_ops.attach_weak_columns(LLAMA.build().to("meta"), 4, calibration=token_ids)
    model, _ = toy_model()
    seal_ops.attach_weak_columns(model, 4, calibration=token_ids)
    with pytest.raises(ValueError, match="already has weak columns attached"):
        seal_ops.attach_weak_columns(model, 4, calibration=token_ids)
    seal_ops.detach_weak_columns(model)
    for call in (seal_ops.detach_weak_columns, seal_ops.merge_weak_columns):
        with pytest.raises(ValueError, match="must have weak columns attached"):
            call(model)
    with pytest.raises(ValueError, match="quantize needs layers in 16 or more bits, got ToyLinear|nf4"):
        seal_ops.attach_weak_columns(model, 4, calibration=token_ids, quantize="nf4")


def test_without_the_library_one_sentence(token_ids, monkeypatch):
    import sys

    for name, method in (("bitsandbytes", "nf4"), ("hqq", "hqq")):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(ImportError, match=f"needs the package {name}, which is not installed"):
            seal_ops.attach_weak_columns(LLAMA.build(), 4, calibration=token_ids, quantize=method)
    model, _ = toy_model()
    seal_ops.attach_weak_columns(model, 4, calibration=token_ids)  # another base needs neither


def test_gptq_is_accepted_with_a_warning(token_ids):
    from toy_quantizer import ToyLinear

    class GPTQLinear(ToyLinear):
        pass

    model = LLAMA.build()
    quantize(model, GPTQLinear)
    with pytest.warns(UserWarning, match="GPTQ has already moved the error of these columns"):
        found = seal_ops.attach_weak_columns(model, 4, calibration=token_ids)
    assert found.config.start == "zero" and all(not bool(d.any()) for d in found.parameters())


def test_frozen_columns_are_told(token_ids):
    model, _ = toy_model()
    found = seal_ops.attach_weak_columns(model, 4, calibration=token_ids)
    model.requires_grad_(False).train()
    with pytest.warns(UserWarning, match="trained while its weak columns are frozen"):
        model(tokens())
    found.requires_grad_(False)
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model(tokens())
