"""The shop as a FastAPI application, whose process works the jobs too."""
