"""Speed against peers: each figure a ratio of two things timed in turn in one run."""
