"""Every causal language model of the installed transformers, at a tiny size: what it attaches, computes, merges."""

import warnings

import causal_lms
import family_table
import pytest
import scaled_reference
import torch
import transformers
from families import close, largest, logits, randomise, tokens

import seal_ops

with open(family_table.DOCS, encoding="utf-8") as _file:
    DOCUMENTED = _file.read()

ATTACHED = "| yes |"


def check_row(family: str, row: str) -> None:
    """The committed table says what was seen, where it was made with the installed transformers."""
    if family_table.version(DOCUMENTED) == transformers.__version__:
        assert row == family_table.rows(DOCUMENTED).get(family), "run python tests/fixtures/family_table.py"


def attach(model, granularity):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return seal_ops.attach(model, granularity)


@pytest.mark.parametrize("family", causal_lms.FAMILIES)
def test_family(family):
    if family in causal_lms.OUT_OF_REACH:
        check_row(family, family_table.row_of(family))
        pytest.skip(causal_lms.OUT_OF_REACH[family])
    model = causal_lms.build(family)
    ids = tokens(2, 13)
    base = logits(model, ids)
    try:
        scales = attach(model, "channel")
    except ValueError as error:
        assert str(error).startswith("seal_ops.attach: model must ")
        check_row(family, family_table.refused_row(family, str(error)))
        assert torch.equal(logits(model, ids), base) or family == "reformer"  # hashes with random numbers
        return
    check_row(family, family_table.attached_row(family, scales))
    assert close(logits(model, ids), base)
    seal_ops.detach(model)
    assert torch.equal(logits(model, ids), base)

    untouched = causal_lms.build(family)
    scales = attach(model, "channel")
    randomise(scales)
    layers = scales.attachment.patch.layers
    leaves = {s.name: s.scaling.scale for s in layers}
    reference, reference_leaves = scaled_reference.scaled(untouched, leaves)
    expected = logits(reference, ids)
    got = logits(model, ids)
    assert close(got, expected)
    assert largest(expected, base) > 1e-3 * base.abs().max()  # the scales matter

    for a, b in zip(
        scaled_reference.gradients(model, ids, leaves.values()),
        scaled_reference.gradients(reference, ids, reference_leaves.values()),
    ):
        assert torch.isfinite(a).all() and b.abs().max() > 0
        assert largest(a, b) <= 1e-3 * b.abs().max()

    check_padding(model, reference, ids)

    mergeable = "| yes |" in family_table.attached_row(family, scales).split("|", 3)[3]
    try:
        seal_ops.merge(model)
        assert mergeable and close(logits(model, ids), expected)
    except ValueError as error:
        assert not mergeable and str(error).startswith("seal_ops.merge: ")
        assert torch.equal(logits(model, ids), got)


def check_padding(model, reference, ids) -> None:
    """Generates what the reference does, which for a left-padded prompt is mostly what the prompt alone gives."""
    row, width = ids[:1, :7], 4
    padded = torch.cat([torch.zeros(1, width, dtype=ids.dtype), row], 1)
    attention_mask = torch.cat([torch.zeros_like(padded[:, :width]), torch.ones_like(row)], 1)
    options = dict(max_new_tokens=3, do_sample=False, eos_token_id=None, pad_token_id=0)

    def generate(m):
        return (
            m.generate(row, attention_mask=torch.ones_like(row), **options)[:, 7:],
            m.generate(padded, attention_mask=attention_mask, **options)[:, 7 + width :],
        )

    try:
        expected = generate(reference)
    except Exception:  # a model that transformers itself cannot generate with
        return
    alone, with_padding = generate(model)
    assert torch.equal(alone, expected[0])
    if torch.equal(*expected):  # else positions or recurrent states feel the padding, with and without scales
        assert torch.equal(with_padding, alone)


def test_the_table_names_all_families():
    if family_table.version(DOCUMENTED) != transformers.__version__:
        pytest.skip(f"the table was made with transformers {family_table.version(DOCUMENTED)}")
    rows = family_table.rows(DOCUMENTED)
    assert sorted(rows) == causal_lms.FAMILIES
    assert sum(ATTACHED in row for row in rows.values()) >= 60
    assert all(row.split("|")[5].strip() for row in rows.values() if ATTACHED not in row)  # each refusal says why
