"""What a verb of the command line does, as a function: a file or a folder a stage, which imports the frameworks it needs."""
