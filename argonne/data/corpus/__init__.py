"""From a glob to the text of a row."""
