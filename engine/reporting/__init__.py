"""Reports: a run as a page with plots, runs of the papers' systems as tables."""
