"""Lines that tell how far the report has come."""

import sys
import time


def say(text: str) -> None:
    """Print a line on stderr, at once, behind the time of day."""
    print(f"{time.strftime('%H:%M:%S')}  {text}", file=sys.stderr, flush=True)
