"""The command line: one file per noun, `output` for what is printed."""
