"""Work in pieces: halved where memory does not suffice, said, and nothing left out or done twice."""

import types

import pytest
import torch
from own_tasks import Colours
from retrieval_fixtures import model, one_thread, tokenizer  # noqa: F401

import seal_ops
from seal_ops.evaluation import decoding, runner, static_decoding
from seal_ops.experiments import head_importance
from seal_ops.utils.memory import Pieces


def limited(most, done):
    def work(piece):
        if len(piece) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        done.extend(piece)
        return [i * i for i in piece]

    return work


def test_halves_until_it_fits():
    done, pieces = [], Pieces(8, "seal_ops.evaluate")
    with pytest.warns(UserWarning) as said:
        found = list(pieces.run(range(11), limited(2, done)))
    assert [str(w.message) for w in said] == [
        "seal_ops.evaluate: 8 at once do not fit into the GPU's memory; going on with 4",
        "seal_ops.evaluate: 4 at once do not fit into the GPU's memory; going on with 2",
    ]
    assert done == list(range(11)) and [i for piece, _ in found for i in piece] == done
    assert [v for _, result in found for v in result] == [i * i for i in done]
    assert list(pieces.run([3, 4, 5], limited(2, done))) == [([3, 4], [9, 16]), ([5], [25])], "it stays at what fits"


def test_one_item_that_does_not_fit_is_an_error():
    with pytest.raises(torch.OutOfMemoryError), pytest.warns(UserWarning):
        list(Pieces(2, "x").run([1, 2], limited(0, [])))


def out_of_memory_above(monkeypatch, module, name, rows):
    original = getattr(module, name)

    def bounded(model, *arguments, **options):
        count = len(arguments[1]) if name == "generate" else arguments[0].shape[0]
        if count > rows:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(model, *arguments, **options)

    monkeypatch.setattr(module, name, bounded)


def test_evaluation_and_importance_go_on_with_less(monkeypatch):
    lm, tok = model().eval(), tokenizer()

    def both():
        found = seal_ops.evaluate(lm, tok, Colours(), [60, 90], 5, max_new_tokens=8)
        heads = seal_ops.measure_head_importance(lm, tok, Colours(), 60, 2, methods=["ablation"])
        return found.records, heads.change("logprob")

    whole = both()
    out_of_memory_above(monkeypatch, runner, "generate", 2)
    out_of_memory_above(monkeypatch, head_importance, "answer_logprobs", 3)
    with pytest.warns(UserWarning, match="do not fit into the GPU's memory; going on with"):
        less = both()
    assert less[0] == whole[0]
    torch.testing.assert_close(less[1], whole[1], rtol=1e-4, atol=1e-4)


def test_an_output_does_not_depend_on_its_batch():
    lm, tok = model().eval(), tokenizer()
    seal_ops.attach(lm, "channel")
    torch.nn.init.uniform_(lm.seal_scales.layers["1"].scale, 0.5, 1.5)
    options = {"max_new_tokens": 12}
    records = [
        seal_ops.evaluate(lm, tok, "lines", [190, 230], 7, batch_size=n, **options).records for n in (1, 3, 7, None)
    ]
    assert records[0] == records[1] == records[2] == records[3]
    assert decoding.rows_at_once(lm, 100) > 7


@pytest.mark.parametrize("length", [100, 300])
def test_rows_that_fit_are_as_many_as_their_caches_allow(monkeypatch, length):
    """One row more would take more than its share of the free memory, by the caches that decoding makes."""
    lm, made = model().eval(), []
    free, reserved, allocated = 10_000_000, 3_000_000, 1_000_000  # what torch holds and does not use is free as well
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 2 * free))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: reserved)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: allocated)
    share = static_decoding.CACHE_SHARE * (free + reserved - allocated)
    rows = static_decoding.rows_that_fit(lm, length)
    assert 1 < rows < static_decoding.MOST_ROWS

    class Seen(static_decoding._FixedCache):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            made.append(self)

    monkeypatch.setattr(static_decoding, "_FixedCache", Seen)
    for count in (rows, rows + 1):
        static_decoding.decode(lm, [[5] * (length - 2)] * count, 2, lambda tokens: False)
    taken = [sum(t.nbytes for kept in cache.kept.values() for t in kept) for cache in made]
    assert taken[0] <= share < taken[1]

    free = reserved = allocated = 0
    assert static_decoding.rows_that_fit(lm, length) == 1
    free = 10**12
    assert static_decoding.rows_that_fit(lm, length) == static_decoding.MOST_ROWS


def test_evaluation_takes_as_many_at_once_as_fit(monkeypatch):
    lm, tok, asked, batches = model().eval(), tokenizer(), [], []
    generate = runner.generate

    def rows_at_once(model, length):
        asked.append(length)
        return 3

    def seen(model, tokenizer, prompts, **options):
        batches.append(len(prompts))
        return generate(model, tokenizer, prompts, **options)

    monkeypatch.setattr(runner, "rows_at_once", rows_at_once)
    monkeypatch.setattr(runner, "generate", seen)
    seal_ops.evaluate(lm, tok, Colours(), 60, 7, max_new_tokens=8)
    assert asked == [68] and batches == [3, 3, 1]


def test_rows_on_a_gpu_are_what_its_memory_holds(monkeypatch):
    config = types.SimpleNamespace(
        num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, hidden_size=64, intermediate_size=100
    )
    lm = types.SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16, config=config)
    monkeypatch.setattr(static_decoding, "supports", lambda model: True)
    monkeypatch.setattr(static_decoding, "rows_that_fit", lambda model, length: 10_000 // length)
    monkeypatch.setattr(decoding, "learns_prompt", lambda model: False)
    monkeypatch.setattr(decoding, "_without_peft", lambda model: model)
    assert decoding.rows_at_once(lm, 100) == 100
    monkeypatch.setattr(static_decoding, "supports", lambda model: False)
    free, token = 0, 2 * (2 * 3 * 2 * 16 + 12 * 64 + 4 * 100)
    monkeypatch.setattr(decoding, "free_on_gpu", lambda device: free)
    least = decoding.BATCH_TOKENS[1] // 100
    assert decoding.rows_at_once(lm, 100) == least
    free = round((least + 7.5) * 100 * token / decoding.SHARE)
    assert decoding.rows_at_once(lm, 100) == least + 7
    assert decoding.rows_at_once(lm, 10**7) == 1
    free = 10**12
    assert decoding.rows_at_once(lm, 100) == static_decoding.MOST_ROWS
    config.intermediate_size = None  # as a model of another kind calls it
    assert decoding.rows_at_once(lm, 100) == least
