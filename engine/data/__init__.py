"""Turn files into batches: files to tables, tables to tokens, tokens to packed batches.

In this order: :mod:`~.table` reads a file into a table, :mod:`~.tokenizer` turns its sentences into
token ids, :mod:`~.cache` keeps these on disk, :mod:`~.sampler` chooses the examples of a batch,
:mod:`~.collate` concatenates them to one stream of tokens, and :mod:`~.loader` does the last two in
the background.  :mod:`~.demo` writes a corpus to try it all on.
"""
