"""Data: the sources of images, and the slice data set that training and evaluation read."""
