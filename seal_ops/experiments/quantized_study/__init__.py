"""What a model loses in 4 bits, and what weak columns, QLoRA and scales bring back: perplexity and retrieval."""
