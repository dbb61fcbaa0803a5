"""Every setting of a session, checked when it is made."""
