"""What is measured over many runs: head importance, comparisons, transfer, studies and the demo."""
