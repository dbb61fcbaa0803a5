"""``python -m pop_mm`` is the command ``pop-mm``."""

from .cli import main

main()
