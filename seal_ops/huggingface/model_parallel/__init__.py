"""Models whose attention is divided among processes: by heads (tensor parallelism), or by tokens (Ulysses)."""
