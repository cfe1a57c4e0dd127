"""python -m minimath: the command line."""
import sys

from minimath.cli import main

if __name__ == "__main__":
    sys.exit(main())
