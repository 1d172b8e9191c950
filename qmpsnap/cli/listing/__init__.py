"""Commands that only read, and answer at once: they load neither argparse nor msgspec."""
