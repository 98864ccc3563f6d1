"""`python -m flashdiff` is `flashdiff`."""

import sys

from flashdiff.cli import main

sys.exit(main())
