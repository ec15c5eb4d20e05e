"""How much an engine works on at once."""

import torch


def workspace(per_thread: int, device: torch.device) -> int:
    """Returns a number of bytes: on a CPU what the threads' caches hold, elsewhere what keeps a device busy."""
    return per_thread * torch.get_num_threads() if device.type == "cpu" else 64 * per_thread
