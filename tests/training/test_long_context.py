"""LongLoRA and SinkLoRA as recipes: masks while training, full attention afterwards, and what learns."""

import json

import pytest
import torch
from attached import assert_untouched
from families import FAMILIES, close, largest, logits, tokens, untouched
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

import seal_ops
from seal_ops.training.long_context import LongContextRecipe, prepare, recipe_of, training_masks
from seal_ops.training.texts import packed_texts

pytest.importorskip("peft")

LENGTH, GROUP = 48, 12


class Words:
    """One token a word; 2 ends a document."""

    eos_token_id = 2

    def __call__(self, text, **options):
        return {"input_ids": [3 + hash(word) % 90 for word in text.split()] if text else []}


def samples(count=3, length=LENGTH):
    return [dict(input_ids=tokens(1, length, seed=n)[0].tolist()) for n in range(count)]


def build(**overrides):
    return FAMILIES["llama"].build(max_position_embeddings=24, **overrides)


def grouped(module, query, key, value, attention_mask, **kwargs):
    """The model's own attention under a matrix for each head: groups, moved by half of one in the last heads."""
    size, share, sinks = module.reference_groups
    heads, length = query.shape[1], query.shape[2]
    p, j = torch.arange(length)[:, None], torch.arange(length)[None]
    moved = torch.arange(heads) >= heads - share
    shift = torch.where(moved, size // 2, 0)[:, None, None]
    same = (p + shift) // size == (j + shift) // size
    seen = (same | (j < sinks)) & (j <= p)
    return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, seen[None], is_causal=False, **kwargs)


AttentionInterface.register("groups", grouped)
AttentionMaskInterface.register("groups", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


@pytest.mark.parametrize("length", [LENGTH, 31, 5])
@pytest.mark.parametrize("recipe, moved, sinks", [("longlora", 2, 0), ("sinklora", 2, 4)])
def test_attention_while_training(recipe, moved, sinks, length):
    """Groups without wrapping around, in training mode alone; the model's own attention is back outside."""
    model, ids = build(), tokens(2, length)
    adapted, patch = prepare(model, recipe_of(recipe, dict(length=LENGTH, group=GROUP)), seed=0)
    full = logits(adapted, ids)
    reference = untouched(adapted)
    base = reference.get_base_model()
    base.config._attn_implementation_internal = "groups"
    for layer in base.model.layers:
        layer.self_attn.reference_groups = (GROUP, moved, sinks)
    expected = logits(reference, ids)
    with training_masks(patch):
        assert close(logits(adapted, ids), full), "in evaluation mode attention is full"
        adapted.train()
        got = logits(adapted, ids)
        adapted.eval()
    assert close(got, expected)
    assert length <= 6 or largest(expected, full) > 1e-2
    assert torch.equal(logits(adapted, ids), full)
    seal_ops.unextend(model)
    assert_untouched(model)


def test_full_attention_while_training():
    """The baseline of both: what learns is the same, and training mode computes what evaluation mode does."""
    model, ids = build(num_key_value_heads=1), tokens(2, LENGTH)  # nothing is moved, so one key/value head will do
    adapted, patch = prepare(model, recipe_of("full_attention", dict(length=LENGTH)), seed=0)
    other, _ = prepare(build(), recipe_of("longlora", dict(length=LENGTH)), seed=0)
    names = lambda m: {n for n, p in m.named_parameters() if p.requires_grad}
    assert names(adapted) == names(other)
    full = logits(adapted, ids)
    with training_masks(patch):
        adapted.train()
        assert close(logits(adapted, ids), full)
        adapted.eval()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("recipe", ["longlora", "sinklora"])
def test_what_learns(recipe, checkpointing, tmp_path):
    model = build()
    frozen = {n: p.detach().clone() for n, p in model.named_parameters()}
    result = seal_ops.train(
        model, samples(), recipe=recipe, recipe_options=dict(length=LENGTH), lr=1e-2, epochs=6, batch_size=3,
        gradient_checkpointing=checkpointing, output_dir=tmp_path, progress=False,
    )  # fmt: skip
    assert result.losses[-1] < 0.9 * result.losses[0]
    trained = {n for n, p in result.model.named_parameters() if p.requires_grad}
    kinds = {"lora_A", "lora_B", "embed_tokens", "input_layernorm", "post_attention_layernorm", "model.norm."}
    assert all(any(kind in name for kind in kinds) for name in trained)
    assert all(any(kind in name for name in trained) for kind in kinds)
    for name, p in result.model.named_parameters():
        if not p.requires_grad:
            plain = name.replace("base_model.model.", "").replace(".base_layer", "").replace(".original_module", "")
            assert torch.equal(p, frozen[plain]), name
    assert str(model.__dict__["_seal_extension"]) == "linear(factor=2.0): 48 positions"
    said = json.loads((tmp_path / "training.json").read_text())
    assert said["settings"]["recipe"]["group"] == LENGTH // 4 and "model" not in said
    assert model.config._attn_implementation != "seal" and not model.training


def test_a_saved_run_is_read_by_peft(tmp_path):
    import peft

    model, ids = build(), tokens(1, LENGTH)
    plain = untouched(model)
    options = dict(recipe="longlora", recipe_options=dict(length=LENGTH, positions="yarn"), lr=1e-2, progress=False)
    result = seal_ops.train(model, samples(), output_dir=tmp_path, **options)
    expected = logits(result.model, ids)
    seal_ops.extend(plain, "yarn", factor=2.0)
    assert close(logits(peft.PeftModel.from_pretrained(plain, tmp_path), ids), expected)


def test_a_wrong_argument_leaves_the_model_as_it_was():
    model = build()
    before = list(model.state_dict())
    for wrong in (dict(epochs=0), dict(lr="1e-2"), dict(betas=1), dict(seed=2**80), dict(output_dir=""), "samples"):
        given, options = ([{"input_ids": [1, 2, 10**6]}], {}) if wrong == "samples" else (samples(), wrong)
        with pytest.raises(ValueError, match="seal_ops.train: "):
            seal_ops.train(model, given, recipe="longlora", recipe_options=dict(length=LENGTH), **options)
        assert list(model.state_dict()) == before and "_seal_extension" not in model.__dict__, wrong


def test_runs_repeat_and_go_on(tmp_path):
    options = dict(recipe="sinklora", recipe_options=dict(length=LENGTH), lr=1e-2, epochs=2, progress=False)
    once = seal_ops.train(build(), samples(), **options).losses
    folder = dict(output_dir=tmp_path, checkpoint_every=1)

    def stop(step, loss):
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        seal_ops.train(build(), samples(), on_step=stop, **folder, **options)
    assert seal_ops.train(build(), samples(), resume=True, **folder, **options).losses == once


def test_tied_embeddings():
    model = build(tie_word_embeddings=True)
    result = seal_ops.train(
        model, samples(1), recipe="longlora", recipe_options=dict(length=LENGTH), lr=1e-2, progress=False
    )
    inside = result.model.get_base_model()
    weights = [
        getattr(m, "modules_to_save", {"default": m})["default"].weight
        for m in (inside.get_input_embeddings(), inside.get_output_embeddings())
    ]
    assert weights[0].data_ptr() == weights[1].data_ptr()


def test_texts(tmp_path):
    words = " ".join(f"w{n}" for n in range(100))
    text, lines = tmp_path / "book.txt", tmp_path / "books.jsonl"
    text.write_text(words)
    lines.write_text("".join(json.dumps({"text": t, "other": 1}) + "\n" for t in ("a b c", words, "")) + "\n")
    ids = Words()(words)["input_ids"]
    assert [row.input_ids for row in packed_texts(text, Words(), 25, "x")] == [ids[n : n + 25] for n in (0, 25, 50, 75)]
    packed = [*Words()("a b c")["input_ids"], 2, *ids, 2, 2]
    rows = packed_texts(lines, Words(), 53, "x")
    assert [row.input_ids for row in rows] == [packed[:53], packed[53:106]] and rows[0].labels == rows[0].input_ids
    result = seal_ops.train(
        build(), lines, tokenizer=Words(), recipe="longlora", recipe_options=dict(length=LENGTH), progress=False
    )
    assert len(result.losses) == 2 and result.lr == 2e-5
    with pytest.raises(ValueError, match="x: texts must fill at least one row of 500 tokens, got 101 tokens"):
        packed_texts(text, Words(), 500, "x")
    lines.write_text('{"txt": 1}\n')
    with pytest.raises(ValueError, match="must be an object with a text, got line 1"):
        packed_texts(lines, Words(), 5, "x")
    with pytest.raises(ValueError, match="x: tokenizer must be given for texts, got None"):
        packed_texts(text, None, 5, "x")


def test_shares_are_whole_groups_of_heads():
    assert recipe_of("sinklora", dict(length=64)) == LongContextRecipe("sinklora", 64, 16, 0.25, 4)
    model = build(num_attention_heads=8, num_key_value_heads=4, head_dim=16)
    _, patch = prepare(model, recipe_of("sinklora", dict(length=64)), seed=0)
    assert [layer.training_mask.shifted_heads for layer in patch.layers] == [0.25, 0.25]


WRONG = [
    ("lora", {}, "recipe must be one of longlora, sinklora, full_attention, got 'lora'"),
    ("longlora", {}, "recipe_options must be length and any of group, shifted_heads"),
    ("longlora", dict(length=48, depth=1), "recipe_options must be length and any of group"),
    ("full_attention", dict(length=48, group=12), "recipe_options must be length and any of positions, rank, alpha"),
    ("longlora", dict(length=48, group=0), "group must be an integer of at least 1, got 0"),
    ("longlora", dict(length=48, group=49), "group must be at most the length 48, got 49"),
    ("longlora", dict(length=1), "length must be an integer of at least 2, got 1"),
    ("sinklora", dict(length=48, sinks=-1), "sinks must be an integer of at least 0, got -1"),
    ("sinklora", dict(length=48, shifted_heads=1.0), "shifted_heads must be a share above 0 and below 1, got 1.0"),
    ("sinklora", dict(length=48, positions="alibi"), "positions must be linear, ntk or yarn, got 'alibi'"),
]


@pytest.mark.parametrize("recipe, options, sentence", WRONG, ids=str)
def test_bad_options(recipe, options, sentence):
    model = build()
    with pytest.raises(ValueError) as e:
        seal_ops.train(model, samples(), recipe=recipe, recipe_options=options)
    assert str(e.value).startswith(f"seal_ops.train: {sentence}")
    assert_untouched(model)


@pytest.mark.parametrize(
    "setting, sentence",
    [
        (dict(gradient_checkpointing="all"), "gradient_checkpointing must be 'auto'"),
        (dict(checkpoint_every=0), "checkpoint_every must be at least 1"),
        (dict(on_step=3), "on_step must be a function"),
        (dict(resume=True), "resume needs output_dir"),
    ],
)
def test_a_bad_setting_leaves_the_model_alone(setting, sentence):
    model = build()
    with pytest.raises(ValueError, match=sentence):
        seal_ops.train(model, samples(), recipe="longlora", recipe_options=dict(length=LENGTH), **setting)
    assert_untouched(model)


def test_models_that_cannot():
    go = dict(recipe="longlora", recipe_options=dict(length=LENGTH))
    scaled = build()
    seal_ops.attach(scaled)
    with pytest.raises(ValueError, match="model must be a plain one for a recipe, got one with scales or adapters"):
        seal_ops.train(scaled, samples(), **go)
    with pytest.raises(ValueError, match="recipe needs at least 2 key/value heads"):
        seal_ops.train(FAMILIES["llama-mqa-head_dim-32"].build(), samples(), **go)
    with pytest.raises(ValueError, match="recipe needs attention that runs in the fused ops, Gemma2Attention has soft"):
        seal_ops.train(FAMILIES["gemma2"].build(), samples(), **go)
    extended = build()
    seal_ops.extend(extended, "self_extend", group=4, window=8)
    with pytest.raises(ValueError, match="recipe needs a model without a position program"):
        seal_ops.train(extended, samples(), **go)
    with pytest.raises(ValueError, match="recipe must be given with recipe_options"):
        seal_ops.train(build(), samples(), recipe_options=dict(length=48))
