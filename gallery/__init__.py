"""Search: an index of image tiles, queries over it, and pages for people."""
