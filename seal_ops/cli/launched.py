"""Commands in several processes that a launcher has started (torchrun, accelerate): a device and a place for each."""

import os


def join(args) -> bool:
    """Makes this process known to the others, gives it a GPU of its own, and says whether it is the one that prints."""
    import torch
    import torch.distributed as dist

    if int(os.environ.get("WORLD_SIZE") or 1) == 1:
        return True
    gpus = torch.cuda.is_available()
    if gpus and args.device == "auto" and args.device_map is None:
        args.device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        torch.cuda.set_device(args.device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if gpus and args.device != "cpu" else "gloo")
    return dist.get_rank() == 0
