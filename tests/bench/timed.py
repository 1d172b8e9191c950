"""Runs a program and prints what it took: ``timed.py WORD...``, in a small process of its own.

The kernel counts the memory of a program from its fork on, so what starts it must be smaller than what is measured.
"""

import os
import subprocess
import sys
import time

with open(os.devnull, "w+b") as null:  # noqa: PTH123 - nothing but these modules
    since = time.monotonic()
    process = subprocess.Popen(sys.argv[1:], stdin=null, stdout=null)
    _, status, used = os.wait4(process.pid, 0)
    wall = time.monotonic() - since
    process.returncode = os.waitstatus_to_exitcode(status)
print(wall, used.ru_utime + used.ru_stime, used.ru_maxrss)
sys.exit(abs(process.returncode))
