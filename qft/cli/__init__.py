"""The `qft` command, one file per subcommand.

Results go to stdout, as a table or as JSON; progress and errors go to stderr. torch and transformers are imported by
the commands that need them.
"""

from . import (
    adapter,
    bench,
    calibrate,
    compose,
    demo,
    evaluate,
    explain,
    export,
    finetune,
    generate,
    info,
    merge,
    plan,
    quantize,
    report,
    sweep,
)
from .app import main

__all__ = [
    "adapter",
    "bench",
    "calibrate",
    "compose",
    "demo",
    "evaluate",
    "explain",
    "export",
    "finetune",
    "generate",
    "info",
    "main",
    "merge",
    "plan",
    "quantize",
    "report",
    "sweep",
]
