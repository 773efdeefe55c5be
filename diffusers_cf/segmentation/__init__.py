"""Patients' scans to heatmap, mask and counterfactual in the scan's own geometry."""
