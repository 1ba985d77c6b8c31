"""python -m qft: the `qft` command."""

from .cli import main

main()
