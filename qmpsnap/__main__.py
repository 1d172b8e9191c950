"""``python -m qmpsnap``."""

from qmpsnap.cli.start import run

if __name__ == "__main__":
    run()
