"""A machine's life: defined or adopted, started, paused, stopped, forgotten."""
