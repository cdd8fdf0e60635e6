"""PEFT's (IA)^3 files, in and out."""

import pytest
import torch
import transformers
from attached import assert_untouched
from families import FAMILIES, close, logits, randomise, tokens
from torch import nn

import seal_ops
from seal_ops.adapters.ia3 import export_ia3, import_ia3

LLAMA = FAMILIES["llama"]


def ia3(peft, model, **targets):
    targets = targets or dict(target_modules=["o_proj"], feedforward_modules=["o_proj"])
    adapted = peft.get_peft_model(model, peft.IA3Config(task_type="CAUSAL_LM", **targets)).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if "ia3_l" in name:
                p.copy_(1 + 0.3 * torch.randn(p.shape, generator=generator))
    return adapted


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "gemma3"])
def test_ia3_in(peft, family, tmp_path):
    adapted = ia3(peft, FAMILIES[family].build())
    adapted.save_pretrained(tmp_path)
    model = FAMILIES[family].build()
    scales = import_ia3(model, tmp_path)
    assert scales.config.granularity == "channel"
    assert close(logits(model, tokens()), logits(adapted, tokens()))


@pytest.mark.parametrize("granularity", ["head", "channel"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_ia3_out(peft, family, granularity, tmp_path):
    model = FAMILIES[family].build()
    randomise(seal_ops.attach(model, granularity))
    export_ia3(model, tmp_path)
    adapted = peft.PeftModel.from_pretrained(FAMILIES[family].build(), tmp_path).eval()
    assert close(logits(adapted, tokens()), logits(model, tokens()))
    if granularity == "channel":  # and in again, exactly
        again = FAMILIES[family].build()
        scales = import_ia3(again, tmp_path)
        assert all(torch.equal(a, b) for a, b in zip(scales.parameters(), model.seal_scales.parameters()))


def test_ia3_out_of_some_layers(peft, tmp_path):
    model = LLAMA.build()
    randomise(seal_ops.attach(model, "channel", layers=[1]))
    model.model.layers[0].mlp.o_proj = nn.Linear(2, 2)  # another module that a bare "o_proj" would hit
    export_ia3(model, tmp_path)
    base = LLAMA.build()
    base.model.layers[0].mlp.o_proj = nn.Linear(2, 2)
    adapted = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    assert not isinstance(base.model.layers[0].mlp.o_proj, peft.tuners.ia3.IA3Layer)
    assert close(logits(adapted, tokens()), logits(model, tokens()))


@pytest.mark.parametrize(
    "targets, message",
    [
        (
            dict(target_modules=["k_proj", "o_proj"], feedforward_modules=["o_proj"]),
            r"must scale only the output projection \(o_proj\) .*k_proj.ia3_l",
        ),
        (
            dict(target_modules=["o_proj"], feedforward_modules=[]),
            r"of shape \[1, 64\] .*, got torch.float32 of shape \[64, 1\]",
        ),
    ],
)
def test_other_ia3_adapters_are_refused(peft, targets, message, tmp_path):
    ia3(peft, LLAMA.build(), **targets).save_pretrained(tmp_path)
    model = LLAMA.build()
    with pytest.raises(ValueError, match="seal_ops.ia3.import_ia3: .*" + message):
        import_ia3(model, tmp_path)
    assert_untouched(model)


def test_ia3_before_a_norm_is_another_function(peft, tmp_path):
    ia3(peft, FAMILIES["bitnet"].build()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="o_proj must read the attention output directly"):
        import_ia3(FAMILIES["bitnet"].build(), tmp_path)
    model = FAMILIES["bitnet"].build()
    seal_ops.attach(model)
    with pytest.raises(ValueError, match="o_proj must read the attention output directly"):
        export_ia3(model, tmp_path)


def test_load_points_to_the_importer(peft, tmp_path):
    ia3(peft, LLAMA.build()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="got 'IA3' .*seal_ops.ia3.import_ia3 reads those"):
        seal_ops.load(LLAMA.build(), tmp_path)


@pytest.mark.parametrize("granularity", ["head", "channel"])
def test_ia3_of_projections_of_other_names(peft, granularity, tmp_path):
    """GPT-2's c_proj: a Conv1D whose name the MLP's has too."""

    def build():
        torch.manual_seed(0)
        config = transformers.GPT2Config(
            vocab_size=97, n_embd=64, n_layer=2, n_head=4, n_positions=64, initializer_range=0.2
        )
        return transformers.GPT2LMHeadModel(config).eval()

    model = build()
    randomise(seal_ops.attach(model, granularity))
    export_ia3(model, tmp_path)
    adapted = peft.PeftModel.from_pretrained(build(), tmp_path).eval()
    assert close(logits(adapted, tokens()), logits(model, tokens()))
    again = build()
    import_ia3(again, tmp_path)
    assert close(logits(again, tokens()), logits(model, tokens()))


def test_ia3_on_a_model_with_lora(peft, tmp_path):
    ia3(peft, LLAMA.build()).save_pretrained(tmp_path)
    plain = LLAMA.build()
    import_ia3(plain, tmp_path)
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    both = peft.get_peft_model(LLAMA.build(), lora).eval()
    import_ia3(both, tmp_path)
    assert close(logits(both, tokens()), logits(plain, tokens()))
