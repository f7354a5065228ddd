"""Talking to a model: loading it with its adapters, answering, the terminal and the page."""
