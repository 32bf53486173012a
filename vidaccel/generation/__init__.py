"""One video from one request: loading, calling, timing."""
