"""What each decoder layer keeps for the backward pass: measured, planned for the memory that is free, and run."""
