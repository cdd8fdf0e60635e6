"""Longer contexts for a loaded model: other rotary frequencies, or other positions and masks in its attention."""
