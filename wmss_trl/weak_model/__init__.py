"""Where weak logits come from."""
