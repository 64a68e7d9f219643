"""What sft.py and rl.py share: schedules, trainer state on disk, peak memory."""
import math
import pickle
import resource

import torch

from lib.settings import UserError, one_line


def learning_rate(step, steps, peak, schedule, warmup=0):
    """Learning rate of a step: linear warm-up over `warmup` steps, then constant or cosine to 1e-9."""
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule == "constant":
        return peak
    return 1e-9 + 0.5 * (peak - 1e-9) * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def save_state(folder, state):
    """Optimiser, RNG and environment state of a checkpoint, in a form that `weights_only` loads."""
    torch.save(state, folder / "trainer.pt")


def load_state(folder):
    """The state that `save_state` wrote. Raises: UserError if it is missing or damaged."""
    try:
        return torch.load(folder / "trainer.pt", map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, KeyError, ValueError, pickle.UnpicklingError) as error:
        raise UserError(f"checkpoint {folder} is missing or damaged: {one_line(error)}") from None


def peak_memory(device):
    """Peak memory so far in GiB: of the GPU, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
