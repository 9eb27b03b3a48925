"""`python -m recollect.cli`, as torchrun starts it."""

from recollect.cli import main

main()
