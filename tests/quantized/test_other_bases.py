"""Whole models on other 4-bit bases than NF4: HQQ, GPTQ and GGUF blocks, each by its own library's layers."""

import copy
import json
import os
import warnings

import numpy as np
import pytest
import torch
from families import FAMILIES, close, largest, logits, tokens
from safetensors.torch import save_file
from torch import nn

import seal_ops
from seal_ops.quantized import bases

LLAMA = FAMILIES["llama"]  # grouped queries
QWEN = FAMILIES["qwen2"]  # biases in q_proj, k_proj and v_proj
GROUP = 32


@pytest.fixture(autouse=True)
def kernel(monkeypatch):
    """GGUF's product of a few rows in torch: its kernels are fetched from the hub, and are for accelerators."""
    kernels = pytest.importorskip("transformers.integrations.gguf.kernels")

    class Torchs:
        def mul_mat_vec(self, weight, x, ggml_type, rows):
            return x.float() @ kernels.dequantize_blocks(weight, ggml_type, rows, x.shape[1], torch.float32).t()

    monkeypatch.setattr(kernels, "_gguf_kernel", Torchs())
    # gptqmodel compiles how it unpacks, for a minute; HQQ asks for a decorator.
    monkeypatch.setattr(torch, "compile", lambda function=None, **options: function or (lambda later: later))


def hqq_model(tmp_path, family):
    """As hqq's own ``AutoHQQHFModel`` makes it."""
    pytest.importorskip("hqq", reason="HQQ's layers come from the package hqq")
    from hqq.core.quantize import BaseQuantizeConfig
    from hqq.models.hf.base import AutoHQQHFModel

    model = family.build()
    config = BaseQuantizeConfig(nbits=4, group_size=GROUP, axis=1)
    AutoHQQHFModel.quantize_model(model, quant_config=config, compute_dtype=torch.float32, device="cpu")
    return model


def gptq_model(tmp_path, family, backend="gptq_torch"):
    """A checkpoint in GPTQ's packing, written here, as transformers loads it."""
    pytest.importorskip("optimum", reason="transformers loads GPTQ models with optimum")
    pytest.importorskip("gptqmodel", reason="transformers loads GPTQ models with gptqmodel")
    from transformers import AutoModelForCausalLM, GPTQConfig

    folder = tmp_path / "gptq"
    if not folder.exists():
        write_gptq(family.build(), folder)
    config = GPTQConfig(bits=4, backend=backend)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16, quantization_config=config).eval()


def block_kind():
    """Blocks of 4 bits, or of 8 where this transformers knows no others that gguf can write."""
    import gguf
    from transformers.integrations.gguf.utils import GGML_BLOCK

    kinds = gguf.GGMLQuantizationType
    return kinds.Q4_0 if int(kinds.Q4_0) in GGML_BLOCK else kinds.Q8_0


def gguf_model(tmp_path, family, dtype=torch.float32):
    """Its linear layers, head and embedding in blocks, in the layers that transformers has for a packed file."""
    gguf = pytest.importorskip("gguf", reason="GGUF's blocks are made by the package gguf")
    pytest.importorskip("transformers.integrations.gguf.utils", reason="packed GGUF needs a newer transformers")
    from transformers.integrations.gguf.utils import replace_with_gguf_modules

    class EveryType:
        def supports(self, ggml_type):
            return True

    model = family.build(dtype)
    kind = block_kind()
    plan = {f"{n}.weight": int(kind) for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Embedding))}
    before = {name: model.get_parameter(name).detach().float().numpy() for name in plan}
    biases = {n: m.bias for n, m in model.named_modules() if isinstance(m, nn.Linear) and m.bias is not None}
    for name, module in replace_with_gguf_modules(model, plan, EveryType(), dtype).items():
        module.weight.data = torch.from_numpy(gguf.quants.quantize(before[name], kind))
    for name, bias in biases.items():
        model.get_submodule(name).bias = bias.requires_grad_(False)
    return model.eval()


MAKERS = {"hqq": hqq_model, "gptq": gptq_model, "gguf": gguf_model}


def gptq_numbers(weight):
    """Codes 0 to 15, scales, and the group of each input: groups that are not neighbours, as with act-order."""
    rows, columns = weight.shape
    order = torch.randperm(columns, generator=torch.Generator().manual_seed(columns))
    group_of = torch.empty(columns, dtype=torch.int64)
    group_of[order] = torch.arange(columns) // GROUP
    scales = torch.stack([weight[:, group_of == g].abs().amax(1) / 7 for g in range(columns // GROUP)], 1).half()
    codes = (weight / scales.float()[:, group_of]).round().clamp(-8, 7).long() + 8
    return codes, scales, group_of


def gptq_weight(weight):
    """What the format says that a weight becomes: (code − 8) times the scale of the input's group."""
    codes, scales, group_of = gptq_numbers(weight)
    return (codes - 8).float() * scales.float()[:, group_of]


def packed(codes, dim):
    """Eight numbers of 4 bits in an int32, the first in the lowest bits, along ``dim``."""
    codes = codes.movedim(dim, 0)
    words = sum(codes[j::8] << (4 * j) for j in range(8))
    return words.movedim(0, dim).numpy().astype(np.uint32).view(np.int32)


def write_gptq(model, folder):
    model.save_pretrained(folder)
    tensors = {}
    for name, value in model.state_dict().items():
        if not name.endswith("proj.weight"):
            tensors[name] = value.detach().half().contiguous()
            continue
        codes, scales, group_of = gptq_numbers(value.detach())
        zeros = torch.full((scales.shape[1], len(value)), 7)  # the format's first version stores the zero less one
        made = {
            "qweight": torch.from_numpy(packed(codes.t(), 0)), "qzeros": torch.from_numpy(packed(zeros, 1)),
            "scales": scales.t(), "g_idx": group_of.int(),
        }  # fmt: skip
        tensors |= {f"{name[: -len('weight')]}{part}": t.contiguous() for part, t in made.items()}
    os.unlink(folder / "model.safetensors")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": True, "sym": True,
        "checkpoint_format": "gptq",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))


def quiet(function, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*GPTQ has already moved the error")
        return function(*args, **kwargs)


def dense_like(packed_model, family):
    """The 16-bit model with the weights that the packed one says it computes with."""
    dense = family.build().to(torch.float32)
    with torch.no_grad():
        for name, module in packed_model.named_modules():
            table = bases.table_of(module)
            if bases.is_packed(module):
                dense.get_submodule(name).weight.copy_(bases.weight_of(module))
            elif table is not None:
                dense.get_submodule(name).weight.copy_(table)
            elif isinstance(module, (nn.Linear, nn.Embedding)):
                dense.get_submodule(name).weight.copy_(module.weight)
    return dense


@pytest.mark.parametrize("kind, family", [
    ("hqq", LLAMA), ("hqq", QWEN), ("gptq", LLAMA), ("gptq", QWEN), ("gguf", QWEN)
], ids=["hqq-llama", "hqq-qwen2", "gptq-llama", "gptq-qwen2", "gguf-qwen2"])  # fmt: skip
def test_a_whole_model(tmp_path, token_ids, kind, family):
    """Attached, trained, saved, loaded on the same base, merged into 16 bits, and exported as a LoRA."""
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    near = 2e-2 if kind == "gptq" else 1e-4  # gptqmodel computes in fp16
    same = lambda a, b: largest(a, b) <= near * float(b.abs().max())
    model, base = MAKERS[kind](tmp_path, family), MAKERS[kind](tmp_path, family)
    dense, plain = dense_like(model, family), logits(model, tokens())
    assert same(logits(dense, tokens()), plain), "the written-out weights are what the base computes with"
    original = {f"{n}.weight": m.weight.detach() for n, m in family.build().named_modules() if type(m) is nn.Linear}
    found = quiet(seal_ops.attach_weak_columns, model, 4, calibration=token_ids, original=original)
    assert found.config.start == "residual" and len(found.layers) == 14
    rows = [{"input_ids": ids} for ids in token_ids]
    losses = seal_ops.train(model, rows[:2], lr=1e-2, epochs=4, progress=False).losses
    assert sum(losses[-2:]) < sum(losses[:2])
    expected = logits(model, tokens())
    assert not same(expected, plain)
    with torch.no_grad():
        for name, module in found.layers.items():
            dense.get_submodule(name).weight[:, module.column_index] += module.column_delta
    assert same(logits(dense, tokens()), expected)

    found.save_pretrained(tmp_path / "columns")
    quiet(seal_ops.load_weak_columns, base, tmp_path / "columns")
    assert same(logits(base, tokens()), expected)
    seal_ops.export_lora(base, tmp_path / "lora")
    seal_ops.detach_weak_columns(base)
    assert same(logits(base, tokens()), plain)
    carrier = dense_like(base, family) if kind == "gguf" else base  # PEFT knows no layer in GGUF blocks
    adapted = peft.PeftModel.from_pretrained(carrier, tmp_path / "lora").eval()
    assert same(logits(adapted, tokens()), expected)

    seal_ops.merge_weak_columns(model)
    assert all(
        type(m) in (nn.Linear, nn.Embedding) for m in model.modules() if isinstance(m, (nn.Linear, nn.Embedding))
    )
    assert not any(bases.is_packed(m) or bases.table_of(m) is not None for m in model.modules())
    assert same(logits(model, tokens()), expected)
    model.save_pretrained(tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=model.dtype).eval()
    assert getattr(loaded.config, "quantization_config", None) is None
    assert same(logits(loaded, tokens()), expected)


@pytest.mark.parametrize("kind", MAKERS)
def test_nothing_as_large_as_a_weight_is_kept(tmp_path, token_ids, kind):
    """The written-out weight of a layer lives for one product; the gradients are a dense layer's."""
    model = MAKERS[kind](tmp_path, LLAMA)
    found = quiet(seal_ops.attach_weak_columns, model, 4, calibration=token_ids, target_modules="down_proj")
    module = found.layers["model.layers.1.mlp.down_proj"]
    dtype = torch.float16 if kind == "gptq" else torch.float32
    x = torch.randn(40, 96, dtype=dtype, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = module(x * 1)
    assert sum(t.numel() for t in kept) < 96 * 64 and (40, 4) in [tuple(t.shape) for t in kept]
    weight = bases.weight_of(module).float()
    weight[:, module.column_index] += module.column_delta.detach().float()
    g = torch.randn_like(y)
    dx, dd = torch.autograd.grad(y, (x, module.column_delta), g)
    near = dict(rtol=2e-2, atol=2e-2) if kind == "gptq" else dict(rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(dx.float(), g.float() @ weight, **near)
    torch.testing.assert_close(dd.float(), g.float().t() @ x.detach().float()[:, module.column_index], **near)


def test_gptqs_packing(tmp_path):
    """Both kernels of gptqmodel on a CPU, read as the format says, beside the numbers that were packed."""
    original = dict(LLAMA.build().named_parameters())
    for backend in ("auto", "gptq_torch"):
        model = gptq_model(tmp_path, LLAMA, backend)
        name = "model.layers.1.mlp.down_proj"
        module = model.get_submodule(name)
        assert bases.unpacks(module) and bases.is_gptq(module) and bases.sizes(module) == (96, 64)
        expected = gptq_weight(original[f"{name}.weight"].detach())
        assert float((bases.weight_of(module).float() - expected).norm() / expected.norm()) < 1e-3


def test_a_gptq_model_repacked_for_inference_is_refused(tmp_path, token_ids):
    """gptqmodel's own choice on a CPU repacks its weights in the first forward pass, and passes no gradient then."""
    model = gptq_model(tmp_path, LLAMA, "auto")
    logits(model, tokens())
    with pytest.raises(ValueError, match="must pass a gradient to its input, got TorchAtenLinear, which passes none"):
        quiet(seal_ops.attach_weak_columns, model, 4, calibration=token_ids)


def test_a_gptq_layer_that_computes_otherwise_is_asked_by_its_product(tmp_path):
    """What a layer unpacks is read only where its product is with that weight."""
    module = gptq_model(tmp_path, LLAMA, "gptq_torch").model.layers[0].mlp.up_proj
    right = module.dequantize_weight
    assert bases.unpacks(module)
    module.dequantize_weight = lambda **inside: right(**inside) if inside else right().flip(0)  # its forward says more
    assert not bases.unpacks(module)


def test_ggufs_blocks(tmp_path):
    """Blocks beside gguf's own way to read them; a layer that reads its inputs in another order; bf16."""
    model = gguf_model(tmp_path, LLAMA)
    import gguf

    module = model.model.layers[0].mlp.down_proj
    expected = gguf.quants.dequantize(module.weight.numpy(), block_kind())
    assert torch.equal(bases.weight_of(module), torch.from_numpy(expected))
    x = torch.randn(20, 96)
    with torch.no_grad():
        assert torch.allclose(module(x), x @ torch.from_numpy(expected).t(), atol=1e-4)
        module.input_permutation = torch.randperm(96)
        assert torch.allclose(module(x), x @ bases.weight_of(module).t(), atol=1e-4)
    assert bases.weight_of(module, torch.bfloat16).dtype == torch.bfloat16
    assert torch.equal(bases.table_of(model.model.embed_tokens)[5], model.model.embed_tokens(torch.tensor([5]))[0])


def shown(model):
    """The weight that each layer in blocks multiplies with in the model's own dtype: its product with unit vectors."""
    layers = {name: m for name, m in model.named_modules() if bases.is_packed(m)}
    unit = lambda size: torch.eye(size, dtype=model.dtype)
    with torch.no_grad():
        return {name: m(unit(m.in_features)).t().double() for name, m in layers.items()}


def exactly(model, weights):
    """Logits in fp64 of LLAMA with these linear layers, and with norms and embedding of ``model``."""
    exact = LLAMA.build(model.dtype).double()
    with torch.no_grad():
        exact.model.embed_tokens.weight.copy_(bases.table_of(model.model.embed_tokens))
        for name, weight in weights.items():
            exact.get_submodule(name).weight.copy_(weight)
    return logits(exact, tokens())


def error(found, exact):
    return float((found.double() - exact).norm() / exact.norm())


def test_a_16_bit_gguf_model_trains_and_merges_in_16_bits(tmp_path, token_ids):
    """Merged: bit for bit what the layers read their blocks as, the columns' sum rounded once. With columns: no
    further from fp64 than twice that plain 16-bit model is."""
    model = gguf_model(tmp_path, LLAMA, torch.bfloat16)
    weights = shown(model)
    found = seal_ops.attach_weak_columns(model, 4, calibration=token_ids)
    seen = []
    handle = found.layers["model.layers.0.mlp.up_proj"].register_forward_hook(lambda m, a, y: seen.append(y.dtype))
    result = seal_ops.train(model, [{"input_ids": token_ids[0]}], lr=1e-1, progress=False)
    handle.remove()
    assert set(seen) == {torch.bfloat16} and result.parameters == found.count()
    assert all(d.dtype == torch.float32 and bool(d.any()) for d in found.parameters())
    without = exactly(model, weights)
    for name, module in found.layers.items():
        weights[name].index_add_(1, module.column_index, module.column_delta.detach().double())
    exact = exactly(model, weights)
    with_columns = logits(model, tokens())
    seal_ops.merge_weak_columns(model)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    for name, weight in weights.items():
        assert torch.equal(model.get_submodule(name).weight, weight.float().bfloat16()), name
    rounding = error(logits(model, tokens()), exact)
    assert error(with_columns, exact) <= 2 * rounding < error(without, exact) / 2


def test_a_scale_folds_into_a_16_bit_gguf_layer(tmp_path):
    """``o_proj`` is written out in the model's own 16 bits, where the blocks say nothing of a dtype."""
    model = gguf_model(tmp_path, LLAMA, torch.bfloat16)
    weights = shown(model)
    with torch.no_grad():
        for p in seal_ops.attach(model, "head").parameters():
            p.mul_(1.3)
    for name in weights:
        weights[name] *= 1.3 if name.endswith("o_proj") else 1.0
    exact, scaled = exactly(model, weights), logits(model, tokens())
    seal_ops.fold_scales(model, dequantize=True)
    assert model.model.layers[0].self_attn.o_proj.weight.dtype == torch.bfloat16
    assert error(logits(model, tokens()), exact) <= 2 * error(scaled, exact)


def test_experts_in_blocks_are_refused(tmp_path, token_ids):
    model = gguf_model(tmp_path, LLAMA)
    found = seal_ops.attach_weak_columns(model, 4, calibration=token_ids)
    kind = type("GgufExperts", (nn.Module,), {})
    model.model.layers[0].mlp.experts = kind()
    with pytest.raises(ValueError, match=r"got experts that stay in GGUF blocks \(model.layers.0.mlp.experts\)"):
        seal_ops.merge_weak_columns(model)
    assert model.seal_weak_columns is found


@pytest.mark.parametrize("kind", MAKERS)
def test_scales_do_not_fold_there(tmp_path, kind):
    """Group scales of HQQ fold where the group lies in one head; the other formats are refused by name."""
    model = MAKERS[kind](tmp_path, LLAMA)
    with torch.no_grad():
        for p in seal_ops.attach(model, "head").parameters():
            p.mul_(1.5)
    expected = logits(copy.deepcopy(model), tokens())
    reason = "groups of 32 weights, which do not divide head_dim 16" if kind == "hqq" else "group scales are not known"
    with pytest.raises(ValueError, match=reason):
        seal_ops.fold_scales(model)
    assert torch.equal(logits(model, tokens()), expected)
    seal_ops.fold_scales(model, dequantize=True)
    assert type(model.model.layers[0].self_attn.o_proj) is nn.Linear
    if kind == "gptq":
        assert largest(logits(model, tokens()), expected) <= 2e-2 * float(expected.abs().max())
    else:
        assert close(logits(model, tokens()), expected)
