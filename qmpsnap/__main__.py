"""``python -m qmpsnap``."""

from qmpsnap.cli.main import run

if __name__ == "__main__":
    run()
