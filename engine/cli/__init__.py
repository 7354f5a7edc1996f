"""What the commands share: options, help, progress, exit status."""
