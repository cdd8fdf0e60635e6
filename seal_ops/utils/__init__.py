"""Files replaced in one step, and progress bars. Nothing here imports from the rest of the package."""
