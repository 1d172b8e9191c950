"""Where ``launch/`` lies: inside the installed package, or beside it in a checkout."""

from pathlib import Path


def launch_dir() -> Path:
    """The folder with profiles, the small guest's recipe and the systemd unit."""
    package = Path(__file__).parents[2]
    shipped = package / "_launch"
    return shipped if shipped.is_dir() else package.parent / "launch"
