"""How the demo fails: one line with the remedy. Knows no step."""


class DemoError(Exception):
    """The story cannot go on."""
