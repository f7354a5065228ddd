"""`nf4kernels finetune`: a recipe and files of examples to adapters, on weights in 4 bits.

recipe.py reads what is to be done, examples.py makes what the model sees of the data, run.py does it on TRL's trainer,
outputs.py writes what a person reads afterwards, and shipped.py has the ready recipes, with no framework imported.
"""
