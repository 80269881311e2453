"""
What the commands have in common: flags, errors in one line, progress with the time left, resuming.
"""
import argparse
import math
import os
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import torch


class ArgumentParser(argparse.ArgumentParser):
    """A wrong flag ends like every other mistake, in one line; see one_line_errors()."""

    def error(self, message):
        raise ValueError(f"{message}; --help explains every flag")


def number(low, high, kind=float):
    """An argparse type: a number from low to high, both included."""
    def read(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            name = "a whole number" if kind is int else "a number"
            message = f"{name} from {low:,} to {high:,} expected, found {text}"
            raise argparse.ArgumentTypeError(message)
        return value
    return read


positive = number(1, 10 ** 9, int)


@contextmanager
def one_line_errors():
    """Around main(): a user's mistake ends in one line and exit status 2, not in a traceback."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")       # odd names in log lines stop nothing
    try:
        yield
    except KeyboardInterrupt:
        print("stopped; --resume continues a training from its last evaluation", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError, RecursionError) as error:
        message = str(error)
    except (MemoryError, RuntimeError) as error:            # PyTorch raises RuntimeError
        if "memory" not in f"{type(error)} {error}".lower():
            raise
        message = f"not enough memory; try a smaller --batch-size or --seq-len ({error})"
    else:
        return
    printable = "".join(letter if letter.isprintable() else " " for letter in message)
    print(f"error: {printable}", file=sys.stderr)
    sys.exit(2)


def check_writable(folder):
    """Make a folder and raise ValueError unless files can be written into it."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(f"{folder}: a folder to write into expected ({error.strerror}); "
                         "give another, or run the command in another") from None


def progress(items, text, total=None):
    """Pass items through; print how many are done and the time left, after two seconds or more."""
    total = total or len(items)
    start = time.time()
    printed = 0
    for done, item in enumerate(items, 1):
        yield item
        seconds = time.time() - start
        if total > 1 and seconds > 2 and done * 20 // total > printed:
            printed = done * 20 // total
            seconds_left = seconds / done * (total - done)
            end = "\r" if sys.stderr.isatty() and done < total else "\n"
            print(f"{text}: {done}/{total}, {seconds_left:.0f} s left ", end=end, file=sys.stderr,
                  flush=True)


def time_left(start, done, total):
    """Milliseconds a step and the time left, for a log line."""
    seconds = (time.time() - start) / done
    minutes, seconds_left = divmod(int(seconds * (total - done)), 60)
    return f"{1000 * seconds:4.0f} ms  {minutes}:{seconds_left:02d} left"


def pick_device(name):
    """A device by name; None: CUDA where there is one, otherwise the CPU."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {name}: a device of this machine expected ({reason})") from None
    torch.set_float32_matmul_precision("high")              # on a GPU: TF32, faster and enough
    return name


def free_memory(device):
    """Bytes: free memory of a GPU, or all memory of this computer (where Python can tell)."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if not hasattr(os, "sysconf"):                          # Windows
        return math.inf
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def learning_rate(args, step):
    """args.lr, times a warm-up over 20 steps, times a straight line from 1 at step 0 to 0 at
    --steps; with --halve-lr-every it is halved at fixed steps instead, as the paper does."""
    decay = 1 - step / args.steps
    if args.halve_lr_every:
        decay = 0.5 ** (step // args.halve_lr_every)
    return args.lr * min(1, (step + 1) / 20) * decay


def training_state(optimiser, step, log, best, args, data):
    """What a checkpoint holds beside the model, to resume exactly."""
    state = {"dataset": data.metadata(), "flags": vars(args), "step": step, "log": log,
             "best": best, "optimiser": optimiser.state_dict(), "rng": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["rng_cuda"] = torch.cuda.get_rng_state()
    return state


FREE_FLAGS = {"data", "vq", "wav2vec2", "init_audio", "out", "steps", "eval_every", "log_every",
              "device", "resume"}       # they may differ when a run is resumed


def resume_training(checkpoint, optimiser, args):
    """Continue from last.pt: step, log, best. ValueError if another flag would change the run."""
    for name, saved in checkpoint["flags"].items():
        found = getattr(args, name, saved)
        if name not in FREE_FLAGS and found != saved:
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"{flag}: this run was started with {saved}, found {found}; give the "
                             "same to resume, or start anew without --resume")
    optimiser.load_state_dict(checkpoint["optimiser"])
    torch.set_rng_state(checkpoint["rng"])
    if torch.cuda.is_available() and "rng_cuda" in checkpoint:
        torch.cuda.set_rng_state(checkpoint["rng_cuda"])
    return checkpoint["step"], checkpoint["log"], checkpoint["best"]
