"""What registering an operator takes: checks, fakes, derivatives, backends."""
