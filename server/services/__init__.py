"""One file per gRPC service, and the table from error types to statuses."""
