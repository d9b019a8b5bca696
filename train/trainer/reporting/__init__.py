"""What a run tells while it goes on: lines of metrics, evaluations, trackers."""
