"""`python -m qat`, from an installed package or from a bare source tree."""

import sys

from qat.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
