"""How numbers are written, tables printed, and results folders created."""
