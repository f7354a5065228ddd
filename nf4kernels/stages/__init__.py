"""What a verb of the command line does, as a function: a file or folder a stage, importing the frameworks it needs."""
