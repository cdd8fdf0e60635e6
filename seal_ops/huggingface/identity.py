"""The identity of a model, for resuming: two models that compute different things differ in it."""
import hashlib

import torch


@torch.no_grad()
def fingerprint(model, trainable: bool = True) -> str:
    """Hash of a model's weights (up to 64 evenly spaced values of each): tells runs of different models apart.

    ``trainable=False`` leaves out the parameters that require gradients.
    """
    attachment = getattr(getattr(model, "seal_scales", None), "attachment", None)
    off = attachment is not None and not attachment.seam.installed  # inside seal_ops.disabled
    digest = hashlib.sha256(b"scales off" if off else b"")
    for name, parameter in sorted(model.named_parameters(), key=lambda item: item[0]):
        if parameter.requires_grad and not trainable:
            continue
        flat = parameter.detach().reshape(-1)
        values = flat[:: max(1, flat.numel() // 64)]
        values = values.double() if values.is_floating_point() else values.long()
        digest.update(f"{name}{list(parameter.shape)}".encode() + values.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
