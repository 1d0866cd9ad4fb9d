"""Adapters for frameworks and tools, each with an extra of its own."""
