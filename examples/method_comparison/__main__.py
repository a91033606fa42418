import sys

from ..benchmark.measure import keep_memory
from .run import main

if __name__ == "__main__":
    keep_memory()
    sys.exit(main())
