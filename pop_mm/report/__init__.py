"""What a session did and what it read: as numbers, JSON, tables and pictures."""
