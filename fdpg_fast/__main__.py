"""`python -m fdpg_fast`, which torchrun starts."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
