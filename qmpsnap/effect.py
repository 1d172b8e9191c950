"""What a failed call has changed, as a type: apart from the errors, which every start of the command line loads."""

from typing import Literal

Effect = Literal["none", "applied", "unknown"]
