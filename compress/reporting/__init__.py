"""Reports of studies and runs: tables, plots, one HTML page, comparisons."""
