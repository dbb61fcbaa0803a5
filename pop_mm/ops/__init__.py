"""Operations on tensors that know neither models nor sessions: a torch reference each, and faster ones beside it."""
