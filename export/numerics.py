#!/usr/bin/env python
"""python export/numerics.py CHECKPOINT -o numerics.json  -  see --help.

Works from a bare checkout: the three packages are found next to this file.
"""

import sys
from pathlib import Path

_CHECKOUT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(_CHECKOUT), str(_CHECKOUT / "export"), str(_CHECKOUT / "runtime")]

from car_export.precision.numerics import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
