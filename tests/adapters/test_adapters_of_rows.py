"""An adapter for every row of a batch: in a call, and in `generate` with its caches, searches and compilation."""

import threading

import pytest
import torch
import transformers
from families import FAMILIES, close, randomise, tokens

import seal_ops

NAMES = ["b", "base", "a", "c", "a"]
NEW = dict(max_new_tokens=8, do_sample=False)


def three(family="llama", dtype=torch.float32):
    """A model with adapters "a" (head), "b" (channel), "c" (channel, in the last layer only)."""
    model = FAMILIES[family].build(dtype)
    scales = seal_ops.attach(model, "head")
    randomise(scales, 1)
    scales.add_adapter("a")
    scales.set_adapter("a")
    randomise(scales, 2)
    scales.add_adapter("b", "channel")
    scales.set_adapter("b")
    randomise(scales, 3)
    scales.add_adapter("c", "channel", [1])
    scales.set_adapter("c")
    randomise(scales, 4)
    return model, scales


def padded(rows=5, length=13):
    """Ids [rows, length], padded on the left in two rows, and their mask."""
    ids, mask = tokens(rows, length), torch.ones(rows, length, dtype=torch.long)
    for row, width in ((1, 4), (3, 6)):
        if row < rows:
            ids[row, :width], mask[row, :width] = 0, 0
    return ids, mask


def alone(model, scales, call):
    """What ``call`` gives for the batch with each adapter by itself, and without one."""
    found, active = {}, scales.active_adapter
    for name in "abc":
        scales.set_adapter(name)
        found[name] = call()
    scales.set_adapter(active)
    with seal_ops.disabled(model):
        found["base"] = call()
    return found


def of_rows(found, copies=1):
    return torch.cat([found[name][row * copies : (row + 1) * copies] for row, name in enumerate(NAMES)])


@pytest.mark.parametrize("active", ["a", "b", "c"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_equal_the_adapters_alone_bit_for_bit(dtype, active):
    model, scales = three(dtype=dtype)
    scales.set_adapter(active)
    ids, mask = padded()

    def call():
        with torch.no_grad():
            return model(ids, attention_mask=mask, use_cache=False).logits

    found = alone(model, scales, call)
    names = [name for name in NAMES if name != "base"]
    rows = [row for row, name in enumerate(NAMES) if name != "base"]
    with scales.adapters_per_row(NAMES):
        mixed = call()
    for row, name in zip(rows, names):
        assert torch.equal(mixed[row][mask[row].bool()], found[name][row][mask[row].bool()]), name
    # SDPA sums in another order than the fused op, so a row without an adapter is held against scales of one.
    ones = {layer: torch.ones(5, 4) for layer in scales.config.layers}
    scales.add_adapter("ones", layers=[0, 1])
    with scales.adapters_per_row(["ones"] * 5):
        plain = call()
    assert torch.equal(mixed[1][mask[1].bool()], plain[1][mask[1].bool()])
    with scales.rows(ones):
        assert call().shape == plain.shape


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_generate_takes_the_names(family, cache):
    model, scales = three(family)
    ids, mask = padded()
    options = dict(NEW, attention_mask=mask, cache_implementation=cache)
    expected = of_rows(alone(model, scales, lambda: model.generate(ids, **options)))
    assert torch.equal(model.generate(ids, adapter_names=NAMES, **options), expected)
    with scales.adapters_per_row(NAMES):
        assert torch.equal(model.generate(ids, **options), expected)
    assert not torch.equal(expected, model.generate(ids, **options)), "the adapters differ"


@pytest.mark.parametrize(
    "search, copies",
    [(dict(num_beams=3), 1), (dict(num_beams=3, num_return_sequences=2), 2), (dict(num_beams=2, cache_implementation="static"), 1)],  # noqa: E501
)  # fmt: skip
def test_copies_of_a_row_have_its_adapter(search, copies):
    model, scales = three()
    ids, mask = padded()
    options = dict(NEW, attention_mask=mask, **search)
    expected = of_rows(alone(model, scales, lambda: model.generate(ids, **options)), copies)
    assert torch.equal(model.generate(ids, adapter_names=NAMES, **options), expected)


def test_sampled_sequences_of_a_row_have_its_adapter():
    """Sampling at temperature near 0 from a row's own distribution is its greedy continuation."""
    model, scales = three()
    ids, mask = padded()
    greedy = of_rows(alone(model, scales, lambda: model.generate(ids, attention_mask=mask, **NEW)))
    got = model.generate(
        ids, attention_mask=mask, adapter_names=NAMES, max_new_tokens=8, do_sample=True, temperature=1e-6,
        num_return_sequences=3,
    )  # fmt: skip
    assert torch.equal(got, greedy.repeat_interleave(3, 0))


def test_a_batch_of_another_size_is_refused():
    model, scales = three()
    with pytest.raises(ValueError, match="the batch must have 3 rows, one for each given scale, got 5"):
        model.generate(tokens(5), adapter_names=["a", "b", "c"], **NEW)
    with pytest.raises(ValueError, match="the batch must have 2 rows, one for each given scale, got 4"):
        model.generate(tokens(4), adapter_names=["a", "b"], num_beams=2, **NEW)
    with scales.adapters_per_row(["a", "b"]), pytest.raises(ValueError, match="must have 2 rows, .* got 4"):
        model(tokens(4))  # which might be two copies of two rows; only generate makes them
    with pytest.raises(ValueError, match="adapter_names must be a list of names, at least one, got 'a'"):
        model.generate(tokens(1), adapter_names="a", **NEW)
    with pytest.raises(ValueError, match="adapter_names must be among .*, got 'z'"):
        model.generate(tokens(1), adapter_names=["z"], **NEW)
    assert model.generate(tokens(2), **NEW).shape == (2, 29), "as before"


def test_generate_is_the_models_own_again(tmp_path):
    model, _ = three()
    assert "generate" in model.__dict__
    seal_ops.detach(model)
    assert "generate" not in model.__dict__ and isinstance(model, transformers.GenerationMixin)


def in_a_thread(work):
    """What ``work`` returns in a second thread, or the error that it raises."""
    found = []

    def run():
        try:
            found.append(work())
        except ValueError as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return found[0]


def test_rows_are_those_of_one_thread():
    """A call of another thread would take the adapters of these rows, in silence where the batch is as large."""
    model = FAMILIES["llama"].build()
    scales = seal_ops.attach(model, "channel")
    randomise(scales)
    plain = model(tokens()).logits
    with scales.adapters_per_row(["default", "base"]):
        inside = model(tokens()).logits
        assert not close(inside[1], plain[1])
        wrong = in_a_thread(lambda: model(tokens()))
        assert "rows with scales of their own must run in the thread that gave them" in str(wrong)
        wrong = in_a_thread(lambda: model.generate(tokens(), max_new_tokens=2, adapter_names=["base", "default"]))
        assert "rows must get scales of their own in one thread at a time, got a second one" in str(wrong)
        assert torch.equal(model(tokens()).logits, inside), "what was refused has changed nothing"
        with scales.adapters_per_row(["base", "base"]):  # one thread may nest them
            assert not close(model(tokens()).logits[0], inside[0])
        assert torch.equal(model(tokens()).logits, inside)
    assert torch.equal(in_a_thread(lambda: model(tokens()).logits), plain)
    names = dict(adapter_names=["base", "default"], max_new_tokens=3, do_sample=False)
    expected = model.generate(tokens(), **names)
    assert torch.equal(in_a_thread(lambda: model.generate(tokens(), **names)), expected), "a thread of its own may"


def test_a_backward_pass_in_another_thread_recomputes_the_rows():
    """As autograd's own do on a GPU."""
    model = FAMILIES["llama"].build().train()
    scales = seal_ops.attach(model, "channel")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    rows = [torch.ones(2, *scale.shape, requires_grad=True) for _, scale in scales.items()]
    with scales.rows(rows):
        loss = model(tokens(), labels=tokens()).loss
        in_a_thread(loss.backward)
    assert all(r.grad.abs().max() > 0 for r in rows)
