"""The machine: device, processes, memory, signals, files, metrics, console."""

import time

STARTED = time.monotonic()
"""When this process began, about: a resumed run pays for its time from here on."""
