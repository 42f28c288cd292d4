"""`python -m cenacle`: the command line."""

from .cli.main import main

main()
