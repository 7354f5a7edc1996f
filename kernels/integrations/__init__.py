"""Drop-in classes and patches for torch, transformers and flash-attn code."""
