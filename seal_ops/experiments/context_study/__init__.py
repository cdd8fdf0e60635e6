"""How far a pretrained model reads under each method of context extension, and what training adds to it."""
