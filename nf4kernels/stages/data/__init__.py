"""Examples to fine-tune on: what a file of them holds, what is wrong in it, and the split into two parts."""
