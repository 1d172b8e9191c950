"""Who else uses an image, and whether anything has written to one that must not change."""
