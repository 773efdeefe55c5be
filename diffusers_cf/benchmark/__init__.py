"""Tables 1 and 2 and Figures 1 to 4 of the paper: every method under one protocol."""
