"""Command lines: options, help, progress, exit status."""
