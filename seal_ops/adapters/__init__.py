"""What is learned, and how it is stored: the scales of a model, put on, taken off, merged, saved and loaded."""
