"""Goals, tables and pictures."""
