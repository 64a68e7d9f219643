"""What sft.py and rl.py share beside the method: schedules, checkpoints, what a step costs."""
import math
import random
import sys
import time

import torch

try:
    import resource
except ImportError:  # Windows
    resource = None

from lib.errors import UserError, one_line


# ---------------------------------------------------------------- schedules and random numbers
def learning_rate(step, steps, peak, schedule, warmup=0):
    """Linear warm-up over `warmup` steps, then constant at `peak`, or cosine from there to 1e-9."""
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule == "constant":
        return peak
    angle = math.pi * (step - warmup) / max(1, steps - warmup)
    return 1e-9 + 0.5 * (peak - 1e-9) * (1 + math.cos(angle))


def set_learning_rates(optimizer, peaks, step, steps, schedule, warmup=0):
    """The learning rate of each parameter group, from its peak."""
    for group, peak in zip(optimizer.param_groups, peaks):
        group["lr"] = learning_rate(step, steps, peak, schedule, warmup)


def seeded(device, *names):
    """A generator that follows from the names alone: no state to save, tied to a device."""
    return torch.Generator(device).manual_seed(random.Random(str(names)).getrandbits(63))


def backward(policy, loss):
    """The backward pass of a part of the loss, for `clipped_step`. In float16 the loss is scaled
    up: its gradients would vanish."""
    policy.scaler.scale(loss).backward()


def clipped_step(policy, optimizer, max_norm, loss, problem):
    """An optimiser step with the gradient's norm clipped to max_norm, after `backward`.

    In float16 the scale of the loss may have been too large for its gradient: then no step is made,
    and the next one has half the scale.
    Returns: the norm before clipping, or None for a step that was not made.
    Raises: UserError with `problem` if the loss (a number) or the norm is not finite; the weights
        are then as they were.
    """
    scaler = policy.scaler
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(policy.trainable.values(), max_norm).item()
    too_large = not math.isfinite(norm) and scaler.is_enabled() and scaler.get_scale() > 1
    if not math.isfinite(loss) or not (math.isfinite(norm) or too_large):
        raise UserError(f"{problem} (the last checkpoint is intact)")
    scaler.step(optimizer)
    scaler.update()
    return None if too_large else norm


# ---------------------------------------------------------------- checkpoints
def save_state(folder, state):
    """Optimiser and environment state of a checkpoint, in a form that `weights_only` loads."""
    torch.save(state, folder / "trainer.pt")


# of a checkpoint that was written before these were counted
UNCOUNTED = {"official_extra": {"train": math.nan, "inference": math.nan},
             "official_gflops": math.nan}


def load_state(folder):
    """The state that `save_state` wrote. Raises: UserError if it is missing or damaged."""
    try:
        state = torch.load(folder / "trainer.pt", map_location="cpu", weights_only=True)
    except Exception as error:  # what a damaged file raises in torch's reader, nobody lists
        raise UserError(f"checkpoint {folder} is missing or damaged: {one_line(error)}") from None
    for name in ("optimizer", "tokens", "gflops"):
        if not isinstance(state, dict) or name not in state:
            raise UserError(f"checkpoint {folder} is damaged: its trainer.pt has no {name}")
    return {**UNCOUNTED, **state}


def save_checkpoint(folder, policy, optimizer, **more):
    """Everything that a stopped run needs again; `more` is the script's own plain data."""
    policy.save(folder)
    save_state(folder, {"optimizer": optimizer.state_dict(), "tokens": policy.tokens,
                        "scaler": policy.scaler.state_dict(),  # empty except in float16
                        "official_extra": policy.official_extra, "gflops": policy.flops() / 1e9,
                        "official_gflops": policy.official_flops() / 1e9, **more})


def load_checkpoint(folder, policy, optimizer):
    """Take over what `save_checkpoint` wrote. Returns: the state, with the script's own data.

    Raises: UserError if it is damaged or of another shape.
    """
    state = load_state(folder)
    policy.load(folder)
    try:
        optimizer.load_state_dict(state["optimizer"])
        policy.tokens = {name: state["tokens"][name] for name in policy.tokens}
        policy.official_extra = dict(state["official_extra"])
        if policy.scaler.is_enabled():
            policy.scaler.load_state_dict(state["scaler"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"checkpoint {folder} is damaged: {one_line(error)}") from None
    return state


def begin_at(init, policy):
    """Give a policy the weights of the checkpoint `init` where another training starts.

    Args: init: its folder, or None for the bare base. Init's compute counts: X_RL = 6N(D_init +
        D_RL) + 2N D_buffer (paper, C.3).
    """
    if init is not None:
        policy.load(init, value_head=False)
        state = load_state(init)
        policy.tokens, policy.official_extra = state["tokens"], dict(state["official_extra"])


# ---------------------------------------------------------------- what is logged
def peak_memory(device):
    """Peak memory so far in GiB: of the GPU, or of this process on a CPU (None on Windows)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if resource is None:
        return None
    units = 2**30 if sys.platform == "darwin" else 2**20  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / units


class Meter:
    """What a step or update costs. Made when it begins."""

    def __init__(self, policy):
        self.policy = policy
        self.began = time.time()
        self.tokens_before = sum(policy.tokens.values())

    def spent(self):
        """Tokens and GFLOPs of the run so far, seconds of this step, peak memory."""
        policy = self.policy
        return {"tokens": dict(policy.tokens), "gflops": policy.flops() / 1e9,
                "seconds": time.time() - self.began, "peak_memory_gib": peak_memory(policy.device)}

    def rate(self):
        """Text: tokens per second of this step."""
        tokens = sum(self.policy.tokens.values()) - self.tokens_before
        return f"{tokens / (time.time() - self.began):,.0f} tok/s"
