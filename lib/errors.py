"""Errors and signals, as the user sees them: one line on stderr, no traceback. No torch.

A `UserError` ends a script with exit code 2.
"""
import os
import re
import signal
import sys
from contextlib import contextmanager, suppress


class UserError(Exception):
    """Something the user can mend: the message says what and how, in one line."""


class Terminated(KeyboardInterrupt):
    """SIGTERM: what a cluster or a container stops a program with, before it kills it."""


def terminate(number, frame):
    """The handler of SIGTERM."""
    raise Terminated


def run_main(main):
    """Run a script's main(arguments): a UserError becomes one line and exit code 2, Ctrl-C 130,
    SIGTERM 143; where stdout is read no further (`| head`), nothing is said and it is 141."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # a locale may know ASCII alone
    if signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
        signal.signal(signal.SIGTERM, terminate)
    try:
        main(sys.argv[1:])
        sys.stdout.flush()
    except UserError as error:
        with suppress(OSError):  # the disk may be full where stderr goes, too
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is left
        sys.exit(141)
    except KeyboardInterrupt as stop:
        at_once = "stopped; run the same command again to continue from the last checkpoint"
        print(str(stop) or at_once, file=sys.stderr)
        sys.exit(143 if isinstance(stop, Terminated) else 130)


def one_line(error):
    """An exception as one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


OUT_OF_MEMORY = re.compile("|".join([
    "MemoryError", "out of memory", "not enough memory", "allocate memory", "ALLOC_FAILED",
    "ALLOCATION_FAILED", "CUBLAS_STATUS_NOT_INITIALIZED"]))  # the last: cuBLAS on a full card


def out_of_memory(error):
    """Whether an exception says so; torch's differ by device and library."""
    return bool(OUT_OF_MEMORY.search(f"{type(error).__name__} {error}"))


@contextmanager
def within_memory(doing, cfg, *remedies):
    """Running out of memory inside becomes a UserError that says what to change.

    Args:
        doing: what is done inside, "sampling".
        remedies: settings to lower ("ppo.micro_tokens") or to set ("model.quantization=nf4"); those
            that already are as low, or set so, are not mentioned.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch's errors are RuntimeErrors
        if not out_of_memory(error):
            raise
        ways = _ways_to_save(cfg, remedies)
        advice = " or ".join(ways) or "it needs a larger machine"
        raise UserError(f"out of memory while {doing}: {advice}; `python plan.py CONFIG` shows "
                        "what takes how much (the last checkpoint is intact)") from None


def _ways_to_save(cfg, remedies):
    ways = []
    for remedy in remedies:
        name, sets, wanted = remedy.partition("=")
        section, key = name.split(".")
        value = str(getattr(getattr(cfg, section), key)).lower()  # as YAML writes it
        if sets and value != wanted:
            ways.append(f"set {remedy}")
        if not sets and value != "1":
            ways.append(f"lower {name} ({value})")
    return ways
