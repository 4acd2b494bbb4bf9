"""What no adapter may get imported: importing it leaves a trace. No test lives here."""

import os

from tests.e2e.spoiling import trace_of

trace_of(os.getppid()).touch()
