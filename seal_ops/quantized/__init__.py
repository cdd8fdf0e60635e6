"""A quantised base model, fine-tuned in its weak columns: chosen, attached, trained beside the scales, stored, merged."""
