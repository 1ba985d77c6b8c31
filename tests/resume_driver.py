"""Runs a tuning job in forked children and kills some of them; started by test_job.py.

Usage: resume_driver.py MODEL DATA OUT
OUT/whole is a run that was left alone, OUT/0 .. OUT/4 were killed at a random moment of its length and started again.
Prints a line per kill: the exit code of the child started again, and its notes.
"""

import os
import random
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path

import torch

from qft.training.finetune import Recipe
from qft.training.job import Start, tune

MOMENTS = 5


def start(model: Path, data: Path, out: Path) -> tuple[int, int]:
    """A child that runs the job: its process id, and a pipe with its notes."""
    read, write = os.pipe()
    process = os.fork()  # everything is imported and nothing has run yet, so no thread is lost
    if process:
        os.close(write)
        return process, read
    code = 1
    try:
        # a checkpoint a step: a good part of a child's life is spent writing one
        recipe = Recipe(steps=6, batch_size=2, learning_rate=1e-3, save_every=1, gradient_checkpointing=False)
        done = tune(Start(model, "nf4 g64 f32", rank=4), out, data, recipe, block_size=32)
        os.write(write, "; ".join(done["notes"]).encode())
        code = 0
    except FileExistsError:
        code = 0  # the kill came after the end
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def finish(process: int, notes: int) -> tuple[int, str]:
    _, status = os.waitpid(process, 0)
    with os.fdopen(notes) as file:
        return os.waitstatus_to_exitcode(status), file.read()


if __name__ == "__main__":
    torch.set_num_threads(1)
    model, data, out = map(Path, sys.argv[1:])
    began = time.monotonic()
    code, _ = finish(*start(model, data, out / "whole"))
    life = time.monotonic() - began
    draw = random.Random(0)
    killed = 0
    while code == 0 and killed < MOMENTS:
        process, notes = start(model, data, out / str(killed))
        time.sleep(draw.uniform(0.05, 0.95) * life)
        os.kill(process, signal.SIGKILL)
        code, _ = finish(process, notes)
        if code == 0:  # it was quicker than the first: that was no kill
            shutil.rmtree(out / str(killed))
            life *= 0.8
        elif code == -signal.SIGKILL:
            code, said = finish(*start(model, data, out / str(killed)))
            print(code, said, flush=True)
            killed += 1
