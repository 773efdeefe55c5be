"""Measuring anomaly maps: one protocol for every method, and the choice of settings and thresholds."""
