"""What happens while a batch passes through a pruned model: probe, decide, cut, learn."""
