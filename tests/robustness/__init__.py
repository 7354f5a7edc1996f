"""Failures on purpose: killed processes, full disks, damaged and hostile input, other ranks.

Inputs are corrupted by content (fuzz, files) and by circumstance: files where outputs go, earlier
commands, settings, options, streams, a second process, arguments of operators.

    python -m tests.robustness [--json FILE]

makes the whole report; ``test_robustness.py`` a small part of each in the test suite.
"""
