"""Finding a model, checking it, and what its configuration means."""
