"""The ops of `torch.ops.seal`: wrappers, schemas, fake kernels, autograd, checks, and which backend runs."""
