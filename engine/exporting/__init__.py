"""Export a run as a model folder that other libraries load."""
