"""`nf4kernels compare`: what 4-bit data types cost a model, on a text."""
