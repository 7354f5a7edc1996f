"""The encoder, the task heads, and the way in and out of the Hugging Face layout."""
