"""The command `gradlens`: the library's analyses from a shell.

The exit status is 0 on success, 1 if `verify` found a fault, 2 on bad input (one line on standard error says what is
wrong), 130 after Ctrl-C and 143 after SIGTERM. Modules here import at their top only what the help pages need, so that
these start fast.
"""

from gradlens.cli.program import app, main

__all__ = ["app", "main"]
