"""At home in frameworks: one module each, and each an extra of its own."""
