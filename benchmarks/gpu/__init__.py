"""What runs on, or predicts, a GPU."""
