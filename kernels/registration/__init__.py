"""Register operators: checks, fakes, derivatives, backends."""
