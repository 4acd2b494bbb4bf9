"""Multi-adapter inference: the client, the stubs and the command line. Imports nothing heavier than grpc."""
