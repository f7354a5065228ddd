"""`nf4kernels compare`: what data types cost a model, on a text, on tasks, and after LoRA.

variants.py names the ways to store a weight, dense.py sets them in the dense model's place, text.py and tasks.py
measure what comes of it, finetunes.py trains LoRA on each, and losses.py is the table of that, with no framework.
"""
