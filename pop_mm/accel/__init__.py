"""What speeds up a decode step outside the pruned matrices, by the compiled library: linear modules, attention, norms."""
