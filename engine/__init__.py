"""A training engine for one BERT shared by several tasks."""

__version__ = "0.1.0"
