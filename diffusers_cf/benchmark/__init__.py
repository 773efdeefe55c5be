"""Tables 1 and 2 and the figures of the paper, every method under one protocol."""
