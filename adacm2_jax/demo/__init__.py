"""The page of ``adacm2 demo``: a video or a webcam, asked about while it is read."""
