"""Packed rows that say by restarting positions alone where documents begin, and flash-attention's arguments: each
document by itself, through the fused op, with the losses and gradients that the padded batch gives."""

import pytest
import torch
import transformers
from families import FAMILIES, close, logits, randomise, tokens

import seal_ops
from seal_ops.huggingface import attention, call_arguments, documents, masks

LENGTHS = (9, 1, 12, 4)


def attached(family, **overrides):
    model = FAMILIES[family].build(**overrides)
    randomise(seal_ops.attach(model, "channel"))
    return model


def examples(lengths=LENGTHS):
    return [{"input_ids": tokens(1, n, seed=n)[0].tolist()} for n in lengths]


def flattened(rows, flash: bool = False):
    """The batch of DataCollatorWithFlattening."""
    return transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=flash)(rows)


def padded(rows, side: str = "right"):
    """The same examples as a padded batch, whose labels leave each first token out, as the flattened one's do."""
    longest = max(len(row["input_ids"]) for row in rows)
    batch = dict(input_ids=[], attention_mask=[], labels=[])
    for row in rows:
        ids, fill = row["input_ids"], [0] * (longest - len(row["input_ids"]))
        parts = dict(input_ids=(ids, 0), attention_mask=([1] * len(ids), 0), labels=([-100, *ids[1:]], -100))
        for name, (values, empty) in parts.items():
            filling = [empty] * len(fill)
            batch[name].append(values + filling if side == "right" else filling + values)
    return {name: torch.tensor(values) for name, values in batch.items()}


def losses(out, labels):
    """The summed loss of each example, in order."""
    each = torch.nn.functional.cross_entropy(
        out[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="none"
    )
    return each.view(out.shape[0], -1)


def by_document(each, lengths=LENGTHS):
    """[1, T - 1] of a flattened batch as the sum of each document."""
    return torch.stack([part.sum() for part in torch.nn.functional.pad(each[0], (0, 1)).split(lengths)])


def gradients(model, loss):
    return torch.autograd.grad(loss, list(model.seal_scales.parameters()), retain_graph=True)


@pytest.mark.parametrize("flash", [False, True], ids=["positions", "flash-arguments"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "gemma2", "mistral"])
def test_equals_the_padded_batch_example_by_example(family, flash, called):
    model = attached(family).train()
    rows = examples()
    flat, batch = flattened(rows, flash), padded(rows)
    labels, expected_labels = flat.pop("labels"), batch.pop("labels")
    called.clear()
    got = by_document(losses(model(**flat, use_cache=False).logits, labels))
    if family == "gemma2":  # soft-capped scores are composed
        assert called == ["rope", "_composed"] * 2
    else:
        assert called == ["rope", "attention-packed"] * 2
    expected = losses(model(**batch, use_cache=False).logits, expected_labels).sum(1)
    assert (got - expected).abs().max() <= 1e-4 * expected.abs().max()
    for number in (0, 2):
        for a, b in zip(gradients(model, got[number]), gradients(model, expected[number])):
            assert b.abs().max() > 0 and (a - b).abs().max() <= 2e-4 * b.abs().max()


@pytest.mark.parametrize("use_cache", [False, True])
def test_a_document_does_not_feel_its_neighbours(use_cache):
    """Also with a cache, where transformers does not look at positions."""
    model = attached("llama")
    batch = flattened(examples())
    batch.pop("labels")
    with torch.no_grad():
        before = model(**batch, use_cache=use_cache).logits
        changed = batch["input_ids"].clone()
        changed[0, 10:22] = (changed[0, 10:22] + 7) % 90 + 1  # the third document
        after = model(**{**batch, "input_ids": changed}, use_cache=use_cache).logits
    same = torch.ones(26, dtype=torch.bool)
    same[10:22] = False
    assert torch.equal(before[0, same], after[0, same])
    assert (before[0, ~same] - after[0, ~same]).abs().amax(-1).min() > 1e-3


def test_several_packed_rows_with_scales_of_their_own():
    model = attached("llama")
    positions = torch.cat([torch.arange(n) for n in (5, 8, 3, 6, 2, 8)]).view(2, 16)
    ids = tokens(2, 16)
    rows = 1 + torch.rand(2, 2, 4)
    with model.seal_scales.rows(rows):
        got = logits(model, ids, position_ids=positions)
    for row, parts in enumerate(((5, 8, 3), (6, 2, 8))):
        with model.seal_scales.rows(rows[:, row : row + 1]):
            expected = [logits(model, part[None])[0] for part in ids[row].split(parts)]
        assert close(got[row], torch.cat(expected))


def test_what_is_given_wins_over_positions():
    """Positions that jump (as in PoSE) are no documents where cu_seq_lens_q says where these begin."""
    model = attached("llama")
    ids, positions = tokens(1, 12), torch.tensor([[0, 1, 2, 7, 8, 9, 0, 1, 2, 3, 4, 5]])
    lengths = torch.tensor([0, 6, 12], dtype=torch.int32)
    got = logits(model, ids, position_ids=positions, cu_seq_lens_q=lengths, cu_seq_lens_k=lengths, max_length_q=6)
    parts = [
        logits(model, ids[:, a:b], position_ids=positions[:, a:b], attention_mask=torch.ones(1, 6))
        for a, b in ((0, 6), (6, 12))
    ]
    assert close(got, torch.cat(parts, 1))


def test_the_longest_document_is_checked_on_the_cpu():
    model = attached("llama")
    batch = flattened(examples(), flash=True)
    with pytest.raises(ValueError, match="max_seqlen"):
        model(**{**batch, "max_length_q": 11}, use_cache=False)


def test_models_that_ask_for_tensors_get_tensors():
    """Their code works on the mask, which a description does not survive."""
    assert transformers.LlamaModel and transformers.FalconModel  # imported when they are named
    assert documents._hands_masks_on(transformers.LlamaConfig)
    assert not documents._hands_masks_on(transformers.FalconConfig)
    assert not documents._hands_masks_on(type("RemoteConfig", (transformers.PreTrainedConfig,), {}))  # no code to read


def test_hooks_go_with_the_scales():
    model = FAMILIES["llama"].build()
    seal_ops.attach(model)
    assert call_arguments._look in model.model._forward_pre_hooks.values()
    seal_ops.detach(model)
    assert not model.model._forward_pre_hooks and not model.model._forward_hooks
    assert not model.model._forward_pre_hooks_with_kwargs


def _trains(tmp_path, collate, rows):
    """The scales after two steps of transformers' Trainer."""
    model = attached("llama")
    arguments = transformers.TrainingArguments(
        str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=4,
        learning_rate=0.05,
        weight_decay=0.0,
        lr_scheduler_type="constant",
        optim="sgd",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        seed=0,
    )
    transformers.Trainer(
        model, arguments, train_dataset=rows, data_collator=collate, callbacks=[seal_ops.SealCallback()]
    ).train()
    return [scale.detach() for _, scale in model.seal_scales.items()]


@pytest.mark.parametrize("flash", [False, True], ids=["positions", "flash-arguments"])
def test_trainer_learns_the_same_from_flattened_and_padded_batches(tmp_path, flash, called):
    pytest.importorskip("accelerate")
    rows = examples((9, 6, 12, 4, 7, 11, 5, 8))
    expected = _trains(tmp_path, padded, rows)
    called.clear()
    got = _trains(tmp_path, transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=flash), rows)
    assert called.count("attention-packed") == 4 and "_composed" not in called
    for a, b in zip(got, expected):
        assert (a - b).abs().max() <= 1e-4


# -- faults that these tests must notice -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault", ["positions ignored", "positions ignored with a cache", "arguments ignored", "shifted"]
)
def test_the_faults_are_noticed(fault, monkeypatch):
    """Each fault is put in, and the check above it must fail."""
    if fault == "positions ignored":
        monkeypatch.setattr(masks, "_documents", lambda numbers, window: masks._structure(1, window, 26, "cpu"))
        check = lambda: test_a_document_does_not_feel_its_neighbours(False)
    elif fault == "positions ignored with a cache":
        monkeypatch.setattr(call_arguments, "begins_by_position", lambda p, batch: torch.zeros_like(p, dtype=bool))
        check = lambda: test_a_document_does_not_feel_its_neighbours(True)
    elif fault == "arguments ignored":
        monkeypatch.setattr(attention, "with_documents", lambda mask, *args: mask)
        check = test_what_is_given_wins_over_positions
    else:

        def late(begins):
            return documents.boundaries(torch.roll(begins, 1, 1))

        monkeypatch.setattr(masks, "boundaries", late)
        check = test_several_packed_rows_with_scales_of_their_own
    with pytest.raises(AssertionError):
        check()
