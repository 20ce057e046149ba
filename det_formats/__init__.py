"""Formats of detections, one reader each."""
