"""`python -m tvae` is the command line `tvae`."""

import sys

from .cli import main

sys.exit(main())
