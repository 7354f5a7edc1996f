"""The encoder, adapters and heads; weights from and to the Hugging Face layout."""
