"""`python -m gradlens`."""

from gradlens.cli import main

main()
