import sys

from ..benchmark.measure import keep_memory
from .run import main
from .workers import be_quiet

if __name__ == "__main__":
    keep_memory()
    be_quiet()
    sys.exit(main())
