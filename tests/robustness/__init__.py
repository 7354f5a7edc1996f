"""Failures on purpose: killed processes, full disks, damaged and hostile input, other ranks.

Inputs are spoilt by content (fuzz, files) and by circumstance: what lies where outputs go, what was
done before, settings, options, streams, a second process, arguments of operators.

    python -m tests.robustness [--json FILE]

makes the whole report; ``test_faults.py`` a small part of each in the test suite.
"""
