"""One file per command: `add_parser` says what may be typed, `run` does it and returns the exit code."""
