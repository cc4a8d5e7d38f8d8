"""The command `gradlens`: every answer of the library from a shell.

Exit status 0 is success, 1 a `verify` that found a fault, 2 bad input, which is one line on standard error, 130 and
143 an interruption by Ctrl-C and by SIGTERM. A module here imports at its top only what its help page needs.
"""

from gradlens.cli.program import app, main

__all__ = ["app", "main"]
