"""The demonstration: a real language model quantized, fine-tuned with LoRA, evaluated, merged and saved."""
