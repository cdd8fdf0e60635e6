"""Scores of a known answer by one forward pass, without generating."""

import torch

from ..huggingface.logits import logits_at


def answer_logprobs(model, input_ids: torch.Tensor, sample) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of a sample's answer, and whether greedy decoding would write it token for token.

    Args:
        input_ids: the sample's ids, once a row: ``[B, S]``; rows differ in what the model does with them.

    Returns:
        ``(logprob [B] in nats, exact [B] bool)``.
    """
    keep = torch.arange(len(sample.prompt_ids) - 1, len(sample) - 1, device=input_ids.device)
    logits = logits_at(model, keep, input_ids=input_ids, use_cache=False)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    targets = torch.tensor(sample.answer_ids, device=logits.device)
    logprob = logits.log_softmax(-1).gather(-1, targets.expand(logits.shape[0], -1)[..., None])[..., 0].sum(1)
    return logprob, (logits.argmax(-1) == targets).all(1)
