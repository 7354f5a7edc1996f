"""Bad days on purpose: killed processes, damaged and hostile input, other numbers of ranks.

    python -m tests.faults [--kills 50] [--inputs 10000] [--seed 0] [--json FILE]

makes the whole report; ``test_faults.py`` a small part of each in the test suite.
"""
