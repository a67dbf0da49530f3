"""Side by side with the peers: the same work, interleaved, whole processes; prints ratios. See README.md."""
