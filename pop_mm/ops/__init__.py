"""Operations on tensors that know neither models nor sessions: a torch reference each, and faster ones beside it.

:mod:`.select` chooses among candidates. :mod:`.reference` says what a product with chosen rows of a matrix computes; C for the
CPU (:mod:`.rows`) and Triton for GPUs (:mod:`.gpu_rows`) choose the same rows. Nothing is compiled or imported before it is used.
"""
