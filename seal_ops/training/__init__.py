"""One run of training: loop, checkpoint, collator."""
