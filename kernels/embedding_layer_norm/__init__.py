"""BERT's embedding layer in one pass."""
