"""Work in pieces: halved where memory does not suffice, said, and nothing left out or done twice."""

import pytest
import torch
from own_tasks import Colours
from retrieval_fixtures import model, one_thread, tokenizer  # noqa: F401

import seal_ops
from seal_ops.evaluation import decoding, runner
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
