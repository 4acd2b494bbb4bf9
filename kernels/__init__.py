"""Numerical operations of the serving path, each with a pure-torch reference; a leaf."""
