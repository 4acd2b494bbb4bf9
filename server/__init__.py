"""The serving engine and its gRPC face."""
