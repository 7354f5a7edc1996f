"""From files to batches: files to tables, tables to tokens, tokens to packed batches.

In this order: :mod:`~.table` reads a file into a table, :mod:`~.tokenizer` turns its sentences into
token ids, :mod:`~.cache` keeps these on disk, :mod:`~.sampler` decides which examples make up a
batch, :mod:`~.collate` lays them side by side in one stream of tokens, and :mod:`~.loader` does the
last two ahead of time.  :mod:`~.demo` writes a corpus to try it all on.
"""
