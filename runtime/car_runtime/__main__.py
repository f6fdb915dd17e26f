"""`python -m car_runtime` is `car-run`."""

import sys

from car_runtime.cli.main import main

sys.exit(main())
