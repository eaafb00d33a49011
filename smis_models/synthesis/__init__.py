"""From label maps to pictures: many of one layout, edits, applications."""
