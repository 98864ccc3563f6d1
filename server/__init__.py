"""The gRPC server: requests become rows, a scheduler steps them together, replies carry images and what they cost."""
