"""Bad days on purpose: killed processes, full disks, damaged and hostile input, other ranks.

    python -m tests.faults [--json FILE]

makes the whole report; ``test_faults.py`` a small part of each in the test suite.
"""
