"""The data room: files to tables, tables to tokens, tokens to packed batches.

A run goes through it in this order: :mod:`~.read` reads a file into a table, :mod:`~.tokenizer`
turns its sentences into token ids, :mod:`~.cache` keeps these on disk, :mod:`~.sample` decides
which examples make up a batch, :mod:`~.pack` lays them side by side in one stream of tokens, and
:mod:`~.loader` does the last two ahead of time.  :mod:`~.demo` writes a corpus to try it all on.
"""
