"""At home in frameworks: a module for each, which needs the extra of its name."""
