"""``python -m tests.outsider``: the tester for so many minutes or steps, with one seed."""

import argparse
import signal
import sys
import time

from tests.outsider import typed
from tests.outsider.tester import Tester


def out(line: str) -> None:
    """Print it now, whoever reads."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def numbers(text: str) -> tuple[int, ...]:
    """Numbers as typed."""
    return tuple(int(number) for number in text.split(","))


def run() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(prog="outsider")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--minutes", type=float, default=0)
    parser.add_argument("--steps", type=int, default=0)
    parser.add_argument("--only", type=numbers, default=(), help="these steps alone, as 3,7,12: to make a case small")
    parser.add_argument("--fault", default="", help="this kind alone, at every step")
    parser.add_argument("--keep", action="store_true", help="keep the homes in which something was found")
    parser.add_argument("--loud", action="store_true", help="print every step")
    arguments = parser.parse_args()
    typed.load()
    out(f"seed {arguments.seed}")

    def say(line: str) -> None:
        if arguments.loud or line.startswith("seed "):
            out(line)

    tester = Tester(arguments.seed, only=arguments.fault, keep=arguments.keep, say=say)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also where a shell in the background has it ignored
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what it has started ends with it
    until = time.monotonic() + 60 * arguments.minutes
    told = time.monotonic()
    number = 0
    try:
        while number < max((arguments.steps, *arguments.only)) or time.monotonic() < until:
            number += 1
            if number in arguments.only or not arguments.only:
                tester.step(number)
            if time.monotonic() > told + 300:
                told = time.monotonic()
                out(f"step {number}: {len(tester.figures.violations)} violations so far")
    finally:
        tester.close()
        out(tester.figures.table())
    return 1 if tester.figures.violations else 0


if __name__ == "__main__":
    sys.exit(run())
