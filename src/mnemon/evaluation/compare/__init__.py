"""Finished runs side by side: `mnemon compare` reads folders, groups training seeds, tests, and writes one document.

runs        which kind of run a folder holds, and what stands in it
entries     names of the models, and which of them are training seeds of one recipe
suites      per-sample scores of any suite as a table with paired tests
curves      losses of training runs
published   numbers from papers
document    sections of tables, figures and notes; forms: Markdown, page (HTML), latex
build       from runs to the document
"""
