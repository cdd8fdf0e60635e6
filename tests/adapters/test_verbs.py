"""PEFT's verbs on `Scales`: named adapters, switched and mixed in a batch, the hub, and counts."""

import pytest
import torch
from families import FAMILIES, close, logits, randomise, tokens

import seal_ops
from seal_ops.adapters.files import CARD_FILE, CONFIG_FILE, WEIGHTS_FILE

LLAMA = FAMILIES["llama"]


def three(**overrides):
    """A model with the adapters "a" (head), "b" (channel), "c" (head, layer 1 only); logits of each and of the base."""
    model = LLAMA.build(**overrides)
    expected = {"base": logits(model, tokens(5))}
    scales = seal_ops.attach(model, "head")
    scales.active_adapter = "a"
    scales.add_adapter("b", "channel")
    scales.add_adapter("c", layers=[1])
    for seed, name in enumerate("abc"):
        scales.set_adapter(name)
        randomise(scales, seed)
        expected[name] = logits(model, tokens(5))
    return model, scales, expected


def test_switching(tmp_path):
    model, scales, expected = three()
    assert scales.active_adapter == "c" and sorted(scales.adapter_names) == ["a", "b", "c"]
    for name in "abcba":
        scales.set_adapter(name)
        assert torch.equal(logits(model, tokens(5)), expected[name])
        assert all(p.requires_grad for p in scales.parameters())
        assert {n for n, _ in scales.items()} == ({1} if name == "c" else {0, 1})
    assert not close(expected["a"], expected["b"]) and not close(expected["a"], expected["c"])
    model(tokens(), labels=tokens(), use_cache=False).loss.backward()
    assert all(p.grad is not None for p in scales.parameters())
    scales.delete_adapter("b")
    assert scales.adapter_names == ["a", "c"]


def test_an_optimiser_keeps_its_parameters_where_shapes_agree():
    scales = seal_ops.attach(LLAMA.build(), "head")
    before = list(scales.parameters())
    scales.add_adapter("other")
    scales.set_adapter("other")
    assert all(a is b for a, b in zip(scales.parameters(), before))


@pytest.mark.parametrize("active", ["a", "b", "c"])
def test_one_adapter_a_row(active):
    """A batch of five rows, mixed, equals each row with its adapter alone; padded too."""
    model, scales, expected = three()
    scales.set_adapter(active)
    names = ["b", "base", "a", "c", "__base__"]
    padding = torch.ones(5, 21, dtype=torch.long)
    padding[2, :7] = 0
    alone = {}
    for name in "abc":
        scales.set_adapter(name)
        alone[name] = logits(model, tokens(5), attention_mask=padding)
    scales.set_adapter(active)
    with scales.adapters_per_row(names):
        mixed = logits(model, tokens(5))
        padded = logits(model, tokens(5), attention_mask=padding)
    for row, name in enumerate(names):
        assert close(mixed[row], expected[name.strip("_")][row]), name
        if name in alone:
            assert close(padded[row][padding[row].bool()], alone[name][row][padding[row].bool()]), name
    assert torch.equal(logits(model, tokens(5)), expected[active]), "left as it was"


def test_gradients_of_one_adapter_a_row():
    model, scales, _ = three()
    scales.set_adapter("b")
    with scales.adapters_per_row(["a", "b"]):
        model(tokens(), labels=tokens(), use_cache=False).loss.backward()
    assert all(p.grad.abs().max() > 0 for p in scales.parameters())


@pytest.mark.parametrize(
    "selected, root, folders",
    [
        (None, None, ["a", "b", "c"]),
        (["b"], "b", []),
        (["default"], "default", []),
        (None, "default", ["x"]),
    ],
)
def test_saving_and_loading_by_name(tmp_path, selected, root, folders):
    """The default or the only adapter lies in the folder itself, others in folders of their names."""
    if "x" in folders or selected == ["default"]:
        model = LLAMA.build()
        scales = seal_ops.attach(model, "head")
        randomise(scales)
        expected = {"default": logits(model, tokens(5))}
        scales.add_adapter("x", "channel")
        scales.set_adapter("x")
        randomise(scales, 5)
        expected["x"] = logits(model, tokens(5))
    else:
        model, scales, expected = three()
    scales.save_pretrained(tmp_path, selected_adapters=selected)
    files = {CARD_FILE, CONFIG_FILE, WEIGHTS_FILE}
    assert {p.name for p in tmp_path.iterdir()} == {*folders, *(files if root else ())}
    again = LLAMA.build()
    loaded = seal_ops.load(again, tmp_path if root else tmp_path / folders[0], adapter_name=root or folders[0])
    assert torch.equal(logits(again, tokens(5)), expected[root or folders[0]])
    for name in folders[0 if root else 1 :]:
        loaded.load_adapter(tmp_path, name, subfolder=name)
        assert torch.equal(logits(again, tokens(5)), expected[root or folders[0]]), "not activated yet"
        loaded.set_adapter(name)
        assert torch.equal(logits(again, tokens(5)), expected[name])
        loaded.set_adapter(root or folders[0])


def test_all_adapters_go_with_the_model(tmp_path):
    model, scales, expected = three()
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    with pytest.raises(FileNotFoundError, match=r"subfolder must name one of the adapters \['a', 'b', 'c'\]"):
        seal_ops.load(again, tmp_path)
    seal_ops.load(again, tmp_path, subfolder="seal_scales/b")
    assert torch.equal(logits(again, tokens(5)), expected["b"])


def test_load_on_a_model_with_scales(tmp_path):
    """Without a name the active adapter is replaced, granularity and all; under a new name another one is added."""
    model, scales, expected = three()
    scales.save_pretrained(tmp_path, selected_adapters=["b"])
    other = LLAMA.build()
    own = seal_ops.attach(other, "head")
    first = list(own.parameters())
    assert seal_ops.load(other, tmp_path) is own and own.adapter_names == ["default"]
    assert torch.equal(logits(other, tokens(5)), expected["b"]) and own.config.granularity == "channel"
    assert not any(a is b for a, b in zip(own.parameters(), first))
    second = list(own.parameters())
    seal_ops.load(other, tmp_path, adapter_name="more")
    assert own.adapter_names == ["default", "more"] and all(a is b for a, b in zip(own.parameters(), second))
    with pytest.raises(ValueError, match="seal_ops.load: backend must be given when scales are attached first"):
        seal_ops.load(other, tmp_path, backend="cpu")


def test_a_refused_load_leaves_the_scales(tmp_path, saved):
    model, scales, expected = three()
    wrong = LLAMA.build(num_hidden_layers=3)
    randomise(seal_ops.attach(wrong))
    wrong.seal_scales.save_pretrained(tmp_path / "wrong")
    message = r"must be an adapter for the 2 attention layers \[0, 1\], got one with layer 2"
    with pytest.raises(ValueError, match=message):
        seal_ops.load(model, tmp_path / "wrong")
    assert torch.equal(logits(model, tokens(5)), expected["c"]) and sorted(scales.adapter_names) == ["a", "b", "c"]


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda s: s.set_adapter("nobody"), r"set_adapter: adapter_name must be among \['c', .*\], got 'nobody'"),
        (lambda s: s.set_adapter(["a"]), r"set_adapter: adapter_name must be one name, .* got \['a'\]"),
        (lambda s: s.delete_adapter("c"), "delete_adapter: adapter_name must not be the active adapter, got 'c'"),
        (lambda s: s.add_adapter("a"), "add_adapter: adapter_name must be a new name"),
        (lambda s: s.add_adapter("base"), "add_adapter: adapter_name must be a new name"),
        (lambda s: s.add_adapter("../up"), "add_adapter: adapter_name must be a new name"),
        (lambda s: s.add_adapter(3), "add_adapter: adapter_name must be a new name"),
        (lambda s: s.add_adapter("d", "layer"), "add_adapter: granularity must be 'head' or 'channel', got 'layer'"),
        (lambda s: s.add_adapter("d", layers=[7]), r"add_adapter: layers must be indices from 0 to 1, got \[7\]"),
        (
            lambda s: s.adapters_per_row(["a", "z"]).__enter__(),
            "adapters_per_row: adapter_names must be among .*, got 'z'",
        ),
        (
            lambda s: s.save_pretrained("x", selected_adapters=["z"]),
            "save_pretrained: selected_adapters must be among .*'z'",
        ),
    ],
)
def test_wrong_names(call, message):
    _, scales, _ = three()
    with pytest.raises(ValueError, match="^seal_ops.Scales." + message):
        call(scales)
    assert sorted(scales.adapter_names) == ["a", "b", "c"]


def test_verbs_of_peft(capsys, saved):
    model = LLAMA.build()
    own = logits(model, tokens())
    scales = seal_ops.Scales.from_pretrained(model, saved)
    scaled = logits(model, tokens())
    with scales.disable_adapter():
        assert torch.equal(logits(model, tokens()), own)
    assert torch.equal(logits(model, tokens()), scaled) and not close(own, scaled)
    trainable, total = scales.get_nb_trainable_parameters()
    assert trainable == 2 * 4 * 16 and total == sum(p.numel() for p in model.parameters())
    scales.print_trainable_parameters()
    assert capsys.readouterr().out.startswith(f"trainable params: 128 || all params: {total:,d} || trainable%: 0.")
    assert scales.unload() is model and torch.equal(logits(model, tokens()), own)
    for verb in ("unload", "merge_and_unload", "disable_adapter", "get_nb_trainable_parameters"):
        with pytest.raises(ValueError, match=f"^seal_ops.Scales.{verb}: the scales must be attached to a model"):
            getattr(scales, verb)()
    scales = seal_ops.Scales.from_pretrained(model, saved)
    assert scales.merge_and_unload() is model and close(logits(model, tokens()), scaled)


# -- the hub ---------------------------------------------------------------------------------------------------------


def test_a_repository_is_fetched(monkeypatch, saved):
    import huggingface_hub

    asked = []

    def snapshot_download(repo_id, **options):
        asked.append((repo_id, options))
        return str(saved)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    model = LLAMA.build()
    seal_ops.load(model, "user/scales", revision="v1", token="secret")
    assert asked == [
        (
            "user/scales",
            dict(
                revision="v1",
                token="secret",
                allow_patterns=["adapter_config.json", "adapter_model.safetensors", "README.md", "seal_scales/*"],
            ),
        )
    ]
    seal_ops.detach(model)
    with pytest.raises(FileNotFoundError, match="adapter_config.json"):
        seal_ops.load(model, "user/scales", subfolder="deeper")
    assert asked[1][1]["allow_patterns"][0] == "deeper/adapter_config.json" and not hasattr(model, "seal_scales")


def test_no_hub(monkeypatch):
    model = LLAMA.build()
    message = (
        "^seal_ops.load: save_directory must be a folder or a name on the hub, got 'nobody/nothing': there is "
        "no such folder, it is not in the cache, and the Hugging Face hub could not be reached$"
    )
    with pytest.raises(FileNotFoundError, match=message):
        seal_ops.load(model, "nobody/nothing")


@pytest.mark.parametrize("name", [None, 3, b"bytes", ["list"]])
def test_no_name(name):
    with pytest.raises(ValueError, match="^seal_ops.load: save_directory must be a folder or a name on the hub, got"):
        seal_ops.load(LLAMA.build(), name)


@pytest.mark.parametrize("name", ["", "/no/such/folder", "./nothing", "a/b/c", "../x"])
def test_no_folder(name):
    with pytest.raises(FileNotFoundError, match="^seal_ops.load: save_directory must hold adapter_config.json, got"):
        seal_ops.load(LLAMA.build(), name)
