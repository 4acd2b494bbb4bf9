"""What an adapter is: format, checks, store, residency, the layers that apply it, the base it attaches to."""
