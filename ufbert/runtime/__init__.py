"""What belongs to the machine and not to the model."""

import time

STARTED = time.monotonic()
"""When this process began, about: a resumed run pays for its time from here on."""
