"""The command and its end: every bad input is one line on stderr."""

from __future__ import annotations

import logging
import sys

import typer

app = typer.Typer(
    help="Quantize, fine-tune and measure language models whose weights are packed to 2, 3, 4 or 8 bits.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """The console script: every bad input ends here, as one line on stderr and exit code 2."""
    logging.basicConfig(format="qft: %(message)s")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # transformers loads it, through PEFT, where installed
    try:
        sys.exit(app(standalone_mode=False) or 0)
    except KeyboardInterrupt:
        print("qft: interrupted", file=sys.stderr)
        sys.exit(130)
    except (ValueError, TypeError, OSError) as error:
        _refuse(str(error))
    except Exception as error:
        # typer's complaints about the command line; their class depends on its version
        if not hasattr(error, "format_message"):
            raise
        _refuse(error.format_message())


def _refuse(message: str) -> None:
    if message:  # a bare `qft` has printed its help instead
        print("qft:", " ".join(message.split()), file=sys.stderr)
    sys.exit(2)
