"""What is learned from calibration text before pruning."""
