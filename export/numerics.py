#!/usr/bin/env python
"""python export/numerics.py CHECKPOINT -o numerics.json  -  see --help.

Works from a bare checkout: the three packages are found next to this file.
"""

import sys
from pathlib import Path

_CHECKOUT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(_CHECKOUT), str(_CHECKOUT / "export"), str(_CHECKOUT / "runtime")]

try:
    from car_export.precision.numerics import main
except KeyboardInterrupt:  # PyTorch takes seconds to import, in which nothing is there to clear up
    sys.exit(130)

if __name__ == "__main__":
    sys.exit(main())
