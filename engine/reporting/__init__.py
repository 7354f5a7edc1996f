"""Reports: a run as a page with plots, systems of the papers and series of runs as tables."""
