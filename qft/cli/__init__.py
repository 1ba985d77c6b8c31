"""The `qft` command, one file per subcommand.

Results go to stdout, as a table or as JSON; progress and errors go to stderr. torch and transformers are imported by
the commands that need them.
"""

from . import adapter, calibrate, compose, demo, evaluate, explain, finetune, generate, info, plan, quantize, sweep
from .app import main

__all__ = [
    "adapter",
    "calibrate",
    "compose",
    "demo",
    "evaluate",
    "explain",
    "finetune",
    "generate",
    "info",
    "main",
    "plan",
    "quantize",
    "sweep",
]
