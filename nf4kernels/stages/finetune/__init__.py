"""`nf4kernels finetune`: a recipe and files of examples to adapters, on weights in 4 bits.

recipe.py reads what is to be done, loading.py the model, examples.py makes what it sees of the data, and run.py does it
on TRL's trainer, which trainer.py completes. forecast.py says before how much memory it takes, progress.py meanwhile
how long. outputs.py and answers.py make what a person reads afterwards. shipped.py has the ready recipes, with no
framework imported.
"""
