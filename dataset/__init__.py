"""From files to batches: annotations, images, detections, caches, synthetic scenes."""
