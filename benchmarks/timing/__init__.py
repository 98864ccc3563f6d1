"""Latency by stage: what is timed, how it is timed, and the speed-up that follows."""
