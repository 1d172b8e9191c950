"""What ``check`` is made of: facts gathered, judged, put right."""
