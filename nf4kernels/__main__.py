"""`python -m nf4kernels`."""

import sys

from .cli import main

sys.exit(main())
