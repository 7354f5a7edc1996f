"""Objectives that need no labels: masked language modelling, next sentence prediction, SimCSE.

An objective is trained like a task: it has examples (:class:`~engine.data.part.Examples`), a head,
and a row of gradients.  It predicts nothing, so the score that its head gives is its loss.
"""
