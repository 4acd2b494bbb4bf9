"""`python -m quickchange`."""

import sys

from quickchange.cli import main

sys.exit(main())
