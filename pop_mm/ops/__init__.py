"""Products that read chosen rows of a matrix, what they need around them, and their references.

Each operation has a plain torch version (:mod:`.reference`), which says what it computes, and faster ones that choose the same
rows: C for the CPU (:mod:`.rows`) and Triton for GPUs (:mod:`.gpu_rows`). Nothing is compiled or imported before it is used.
"""
