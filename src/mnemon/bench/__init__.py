"""Benchmarks: what a memory costs beside the plain decoder, measured in one process, beside the arithmetic."""
