"""Comparison of all balancing methods on real text: recipes, data, commands (``compare.sh``)."""
