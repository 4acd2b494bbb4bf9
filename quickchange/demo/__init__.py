"""The whole story on one machine: train, serve, ask, swap live, merge. `story.py` tells it in order."""
