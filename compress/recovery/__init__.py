"""Training after pruning: what a cut has cost, partly won back by low-rank updates of the weights that stay."""
