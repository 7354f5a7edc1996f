"""A training engine for one BERT shared by several tasks."""
