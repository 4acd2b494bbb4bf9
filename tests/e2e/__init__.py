"""A real server process, real adapters, a real socket."""
