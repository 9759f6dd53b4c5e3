"""`python -m gguftool`."""

from .cli import main

main()
