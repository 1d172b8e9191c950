"""The library's API: a controller, a machine's handle, progress; composes, decides nothing."""
