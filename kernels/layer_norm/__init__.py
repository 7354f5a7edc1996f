"""Layer norm, plain and with dropout and residual."""
