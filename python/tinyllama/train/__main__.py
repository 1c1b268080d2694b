"""``torchrun … -m tinyllama.train ARGUMENTS``: `tinyllama train`, on many devices."""

import sys

from ..cli import main

if __name__ == "__main__":
    status = main(["train", *sys.argv[1:]])
    from .distributed import leave

    leave()
    sys.exit(status)
