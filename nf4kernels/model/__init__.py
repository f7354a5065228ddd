"""A whole model: layers to 4 bits and back."""
