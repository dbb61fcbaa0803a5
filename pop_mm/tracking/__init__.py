"""Which part of a generation a forward belongs to: prompt or decode step, of which sequence."""
