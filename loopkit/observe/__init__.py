"""What is shown and written down between updates: iterator in, iterator out."""
