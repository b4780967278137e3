"""The embedded example: a chat corpus of ours, and a small target that learned it."""
