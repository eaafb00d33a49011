"""The page that smis demo writes."""
