"""What happens to an attached model afterwards: other implementations, pickles, replicas, hooks, shared configs."""

import copy
import io
import pickle
import warnings

import pytest
import torch
import transformers
from families import FAMILIES, close, logits, randomise, tokens, untouched
from torch import nn

import seal_ops

LLAMA = FAMILIES["llama"]


def attached(family: str = "llama", granularity: str = "channel"):
    model = FAMILIES[family].build()
    randomise(seal_ops.attach(model, granularity))
    return model


# -- another attention implementation ----------------------------------------------------------------------------------


@pytest.mark.parametrize("other", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["llama", "cohere"])  # with and without a fused rotation
def test_another_implementation_is_refused_until_ours_is_back(family, other):
    model = attached(family)
    ids = tokens()
    expected = logits(model, ids)
    model.set_attn_implementation(other)
    with pytest.raises(RuntimeError, match=f"attn_implementation must stay 'seal' while scales are .* got '{other}'"):
        logits(model, ids)
    model.set_attn_implementation("seal")
    assert torch.equal(logits(model, ids), expected)


def test_detach_leaves_an_implementation_chosen_since():
    model = LLAMA.build()
    eager = untouched(model)
    eager.set_attn_implementation("eager")
    seal_ops.attach(model)
    model.set_attn_implementation("eager")
    seal_ops.detach(model)
    assert model.config._attn_implementation == "eager"
    assert torch.equal(logits(model, tokens()), logits(eager, tokens()))


# -- copies --------------------------------------------------------------------------------------------------------


def saved_and_loaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def pickled(model):
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("twin_of", [saved_and_loaded, pickled, copy.deepcopy])
@pytest.mark.parametrize("family", ["llama", "cohere", "gemma3"])
def test_copies_are_attached_and_independent(family, twin_of):
    model = FAMILIES[family].build()
    base = untouched(model)
    scales = seal_ops.attach(model)
    randomise(scales)
    expected = logits(model, tokens())
    twin = twin_of(model)
    assert torch.equal(logits(twin, tokens()), expected)
    randomise(twin.seal_scales, seed=7)
    assert not close(logits(twin, tokens()), expected) and torch.equal(logits(model, tokens()), expected)
    assert twin.seal_scales.attachment.patch.summary() == scales.attachment.patch.summary()
    seal_ops.detach(twin)
    assert torch.equal(logits(twin, tokens()), logits(base, tokens()))
    assert torch.equal(logits(model, tokens()), expected)
    assert isinstance(pickled(twin), type(base))


def _work(model, ids, queue):
    torch.set_num_threads(1)
    with torch.no_grad():
        queue.put(model(ids, use_cache=False).logits.tolist())


def test_a_spawned_process_gets_an_attached_model():
    model = attached()
    context = torch.multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_work, args=(model, tokens(), queue))
    process.start()
    got = torch.tensor(queue.get(timeout=120))
    process.join(60)
    assert close(got, logits(model, tokens()))


def test_replicas_compute_with_their_own_weights():
    """What nn.DataParallel makes for each device."""
    model = attached()
    module = model.model.layers[0].self_attn
    replica = module._replicate_for_data_parallel()
    assert type(replica) is type(module)
    zero = copy.deepcopy(module.o_proj)
    nn.init.zeros_(zero.weight)
    replica._modules["o_proj"] = zero
    hidden = torch.randn(1, 5, 64)
    arguments = dict(position_embeddings=model.model.rotary_emb(hidden, torch.arange(5)[None]), attention_mask=None)
    with torch.no_grad():
        assert not replica(hidden, **arguments)[0].any() and module(hidden, **arguments)[0].any()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_copy_of_a_part_has_no_scales_of_its_own(copied):
    model = attached()
    expected = logits(model, tokens())
    part = copied(model.model)
    with pytest.raises(RuntimeError, match="must be copied with its whole model, got LlamaAttention copied by itself"):
        part(tokens())
    for whole in (copied(model), copied(nn.ModuleDict({"model": model}))["model"]):
        assert torch.equal(logits(copied(whole), tokens()), expected)
    seal_ops.detach(model)
    assert torch.equal(copied(model.model)(tokens())[0], model.model(tokens())[0])


# -- what a call may hold ----------------------------------------------------------------------------------------------


def test_names_of_adapters_in_a_forward_pass_are_refused():
    """Models of transformers swallow arguments that they do not know."""
    model = attached()
    with pytest.raises(
        ValueError, match=r"adapters_per_row\(names\):` round it, got adapter_names, which only generate"
    ):
        model(tokens(), adapter_names=["base", "default"])
    seal_ops.detach(model)
    assert not model._forward_pre_hooks and not model._forward_pre_hooks_with_kwargs


# -- a user's own attention --------------------------------------------------------------------------------------------


def _sharper(module, query, *args, **kwargs):
    return transformers.integrations.sdpa_attention.sdpa_attention_forward(module, 2 * query, *args, **kwargs)


def test_a_function_of_the_users_is_told_of():
    transformers.AttentionInterface.register("sharper", _sharper)
    model = LLAMA.build()
    model.set_attn_implementation("sharper")
    own = logits(model, tokens())
    with pytest.warns(UserWarning, match="attention 'sharper' is a function of test_lifecycle, in whose place scaled"):
        seal_ops.attach(model)
    seal_ops.detach(model)
    assert torch.equal(logits(model, tokens()), own)
    model.set_attn_implementation("eager")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*in whose place")
        seal_ops.attach(model)


def test_our_name_is_no_attention_to_load_with():
    model = LLAMA.build()
    model.set_attn_implementation("seal")
    with pytest.raises(ValueError, match="was loaded with attn_implementation='seal', a name that attach alone gives"):
        seal_ops.attach(model)


# -- accelerate's hooks ----------------------------------------------------------------------------------------------


@pytest.fixture
def hooks():
    return pytest.importorskip("accelerate.hooks")


def hook_all(hooks, model):
    for layer in model.model.layers:
        hooks.add_hook_to_module(layer.self_attn, hooks.AlignDevicesHook("cpu", io_same_device=True))


def test_hooks_before_attach_keep_the_fusion(hooks, called, recwarn):
    model = LLAMA.build()
    base = untouched(model)
    hook_all(hooks, model)
    scales = seal_ops.attach(model)
    assert scales.attachment.patch.summary() == "rotation fused in 2 of 2 layers"
    called.clear()
    assert close(logits(model, tokens()), logits(base, tokens()))
    assert called == ["rope_attention"] * 2
    assert not [w for w in recwarn if "seal_ops" in str(w.message)]
    seal_ops.detach(model)
    assert torch.equal(logits(model, tokens()), logits(base, tokens()))
    for layer in model.model.layers:
        hooks.remove_hook_from_module(layer.self_attn)
    assert torch.equal(logits(model, tokens()), logits(base, tokens()))


def test_hooks_after_attach_survive_detach(hooks):
    model = LLAMA.build()
    base = untouched(model)
    randomise(seal_ops.attach(model))
    expected = logits(model, tokens())
    hook_all(hooks, model)
    assert torch.equal(logits(model, tokens()), expected)
    seal_ops.detach(model)
    assert all(hasattr(layer.self_attn, "_hf_hook") for layer in model.model.layers)
    assert torch.equal(logits(model, tokens()), logits(base, tokens()))
    seal_ops.attach(model)
    for layer in model.model.layers:
        hooks.remove_hook_from_module(layer.self_attn)
    assert close(logits(model, tokens()), logits(base, tokens()))
    seal_ops.detach(model)
    assert torch.equal(logits(model, tokens()), logits(base, tokens()))


@pytest.mark.parametrize("order", ["offload first", "attach first"])
def test_cpu_offload(order):
    accelerate = pytest.importorskip("accelerate")
    model = LLAMA.build()
    base = untouched(model)
    if order == "offload first":
        accelerate.cpu_offload(model, execution_device="cpu")
    scales = seal_ops.attach(model)
    if order == "attach first":
        with torch.no_grad():
            scales.layers["0"].scale.fill_(2.0)
        expected = logits(model, tokens())
        accelerate.cpu_offload(model, execution_device="cpu")
        assert close(logits(model, tokens()), expected)
    else:
        assert close(logits(model, tokens()), logits(base, tokens()))


# -- shared configs ----------------------------------------------------------------------------------------------------


def test_a_second_model_on_the_same_config_is_refused_while_the_first_is_attached():
    first = LLAMA.build()
    second = transformers.LlamaForCausalLM(first.config).eval()
    own = logits(second, tokens())
    seal_ops.attach(first)
    message = "LlamaAttention must have a config of its own, its config says attn_implementation='seal'"
    with pytest.raises(RuntimeError, match=message):
        logits(second, tokens())
    with pytest.raises(RuntimeError, match=message):
        logits(transformers.AutoModelForCausalLM.from_config(first.config).eval(), tokens())
    seal_ops.detach(first)
    assert torch.equal(logits(second, tokens()), own)


def test_a_whole_model_may_have_attention_without_scales():
    """Modules that two tokens do not reach (cross-attention without an image) go on without scales."""
    config = transformers.MllamaTextConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        cross_attention_layers=[1],
        pad_token_id=0,
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    model = transformers.MllamaForCausalLM(config).eval()
    ids, states = tokens(), torch.randn(2, 6, 64)
    arguments = dict(
        cross_attention_states=states,
        cross_attention_mask=torch.zeros(2, 1, 21, 6),
        use_cache=False,
        full_text_row_masked_out_mask=torch.ones(2, 1, 21, 1),
    )
    with torch.no_grad():
        expected = model(ids, **arguments).logits
        scales = seal_ops.attach(model)
        assert [s.index for s in scales.attachment.patch.layers] == [0, 2]
        assert close(model(ids, **arguments).logits, expected)
        seal_ops.detach(model)
        assert torch.equal(model(ids, **arguments).logits, expected)
    assert not any("_seal_bystander" in m.__dict__ for m in model.modules())


# -- models of several parts -------------------------------------------------------------------------------------------


def llava():
    """A vision tower, and a text model whose config is a part of the whole."""
    torch.manual_seed(0)
    sizes = dict(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, initializer_range=0.2
    )
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(vocab_size=97, num_key_value_heads=2, pad_token_id=0, **sizes),
        vision_config=transformers.CLIPVisionConfig(image_size=8, patch_size=4, projection_dim=64, **sizes),
        image_token_id=96,
        image_seq_length=4,
        vision_feature_layer=-1,
    )
    return transformers.LlavaForConditionalGeneration(config).eval()


def test_a_vision_tower_goes_on_as_it_was():
    model = llava()
    tower = model.config.vision_config._attn_implementation
    ids = tokens(2, 13) % 96
    ids[:, 2:6] = 96
    images = torch.randn(2, 3, 8, 8)

    def run():
        with torch.no_grad():
            return model(ids, pixel_values=images, use_cache=False).logits

    base = run()
    scales = seal_ops.attach(model, "channel")
    assert (
        all("vision" not in s.name for s in scales.attachment.patch.layers) and len(scales.attachment.patch.layers) == 2
    )
    assert model.config.vision_config._attn_implementation == tower
    assert close(run(), base)
    randomise(scales)
    expected = run()
    assert not close(expected, base)
    seal_ops.merge(model)
    assert close(run(), expected)


def test_only_the_config_that_attention_reads_is_changed():
    """Where the text model's config is the whole's, its other parts' entries stay."""
    import causal_lms

    model = causal_lms.build("phi4_multimodal")
    parts = [model.config.vision_config, model.config.audio_config]
    before = [part._attn_implementation for part in parts]
    seal_ops.attach(model)
    assert model.config._attn_implementation == "seal"
    assert [part._attn_implementation for part in parts] == before


# -- state -------------------------------------------------------------------------------------------------------------


def test_attach_leaves_modes_and_hooks():
    model = LLAMA.build().train()
    model.model.layers[1].mlp.eval()
    calls = []
    handle = model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(lambda *a: calls.append(1))
    modes = [m.training for m in model.modules()]
    seal_ops.attach(model)
    assert [m.training for m in model.modules()][: len(modes)] == modes
    seal_ops.detach(model)
    assert [m.training for m in model.modules()] == modes
    calls.clear()
    logits(model, tokens())
    assert calls == [1]
    handle.remove()


def test_prepared_restores_the_mode_of_every_module():
    from seal_ops.huggingface.modes import prepared

    model = attached()
    model.train()
    model.model.layers[1].mlp.eval()
    modes = [m.training for m in model.modules()]
    with prepared(model, checkpointing=True):
        assert all(m.training for m in model.modules())
    assert [m.training for m in model.modules()] == modes
