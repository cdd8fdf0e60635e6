"""AdamW, and Muon for the matrices, on one flat parameter vector.

Every value that changes is a tensor, so that a CUDA graph can hold a step.
"""

import math

import torch


def _orthogonalise(g, steps=5):
    """Newton-Schulz iteration towards the nearest orthogonal matrix, for a stack ``[n, rows, cols]``."""
    transposed = g.shape[-2] > g.shape[-1]
    x = g.mT if transposed else g
    x = (x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)).to(torch.bfloat16)
    for _ in range(steps):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    x = x.float()
    return x.mT if transposed else x


class Optimizer:
    """Decoupled weight decay, gradient clipping, bias correction; ``lr`` is a tensor to be filled before each step.

    With ``muon`` the matrices inside the layers follow Muon (Jordan, 2024) with its update brought to AdamW's size, so
    that one learning rate serves both.
    """

    def __init__(self, model, muon=False, betas=(0.9, 0.95), weight_decay=0.01, clip=1.0):
        named = list(model.named_parameters())
        self.params = [p for _, p in named]
        self.flat = torch.cat([p.detach().flatten() for p in self.params])
        groups, at = {}, 0
        for name, p in named:
            p.data = self.flat[at : at + p.numel()].view_as(p)
            if muon and p.ndim == 2 and ".layers." in name:
                groups.setdefault(tuple(p.shape), []).append(at)
            at += p.numel()
        self.groups = groups
        self.mean, self.square = torch.zeros_like(self.flat), torch.zeros_like(self.flat)
        self.momentum = torch.zeros_like(self.flat) if muon else None
        self.count = torch.zeros((), device=self.flat.device)
        self.lr = torch.zeros((), device=self.flat.device)
        self.betas, self.weight_decay, self.clip = betas, weight_decay, clip

    def zero_grad(self):
        for p in self.params:
            p.grad = None

    @torch.no_grad()
    def step(self):
        b1, b2 = self.betas
        grad = torch.cat([p.grad.flatten() for p in self.params])
        grad = grad * (self.clip / (grad.norm() + 1e-6)).clamp(max=1.0)
        self.count += 1
        self.mean.lerp_(grad, 1 - b1)
        self.square.mul_(b2).addcmul_(grad, grad, value=1 - b2)
        update = self.mean / (1 - b1**self.count) / ((self.square / (1 - b2**self.count)).sqrt() + 1e-8)
        if self.groups:
            self.momentum.mul_(0.95).add_(grad)
            ahead = grad + 0.95 * self.momentum
            for (rows, cols), places in self.groups.items():
                stack = torch.stack([ahead[a : a + rows * cols].view(rows, cols) for a in places])
                turned = _orthogonalise(stack) * (0.2 * math.sqrt(max(rows, cols)))
                for a, u in zip(places, turned):
                    update[a : a + rows * cols] = u.flatten()
        self.flat.mul_(1 - self.lr * self.weight_decay)
        self.flat.sub_(self.lr * update)
