"""Generated from protos/quickchange/v1; do not edit."""
