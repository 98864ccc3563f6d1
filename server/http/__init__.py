"""HTTP in the server's own event loop: OpenAI's images API, KServe v2, health and metrics over the same requests as gRPC."""
