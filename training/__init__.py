"""Makes adapters, and folds them into a base."""
